"""The corpus of the standard library, built from a small library made for the test."""

from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ttt.data.checks import check_indexed_dataset
from megatron_ttt.data.indexed import bin_path, idx_path
from megatron_ttt.data.python_stdlib import library_files, python_stdlib_corpus


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    files = {f"m{i:02}.py": f"value = {i}\n" for i in range(20)}
    files |= {"pkg/__init__.py": "", "pkg/a.py": "é = 1\n", "readme.txt": "no source"}
    files |= {"site-packages/x.py": "foreign", "pkg/__pycache__/y.py": "foreign"}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    return root


def documents(prefix: str) -> list[bytes]:
    dataset = IndexedDataset(prefix)
    found = [dataset[i].tolist() for i in range(len(dataset))]
    assert all(ids[-1] == 256 for ids in found)
    return [bytes(ids[:-1]) for ids in found]


def test_documents_are_the_sources_shuffled(tmp_path: Path, library: Path) -> None:
    prefix = python_stdlib_corpus(tmp_path / "cache", root=library)
    found = documents(prefix)
    expected = [f"value = {i}\n".encode() for i in range(20)] + ["é = 1\n".encode()]
    assert sorted(found) == sorted(expected)
    assert found != sorted(found)
    sidecar = check_indexed_dataset(prefix).sidecar
    assert sidecar is not None
    assert sidecar.skipped == {"undecodable": 1, "empty": 1}
    assert (sidecar.documents, sidecar.text_bytes) == (21, sum(map(len, expected)))


def test_built_once_and_again_when_the_library_changes(tmp_path: Path, library: Path) -> None:
    prefix = python_stdlib_corpus(tmp_path / "cache", root=library)
    stamp = bin_path(prefix).stat().st_mtime_ns
    assert python_stdlib_corpus(tmp_path / "cache", root=library) == prefix
    assert bin_path(prefix).stat().st_mtime_ns == stamp
    (library / "new.py").write_text("x = 1\n")
    other = python_stdlib_corpus(tmp_path / "cache", root=library)
    assert other != prefix
    assert len(documents(other)) == 22


def test_a_damaged_corpus_is_built_again(tmp_path: Path, library: Path) -> None:
    prefix = python_stdlib_corpus(tmp_path / "cache", root=library)
    content = bin_path(prefix).read_bytes()
    bin_path(prefix).write_bytes(content[:-1])
    assert python_stdlib_corpus(tmp_path / "cache", root=library) == prefix
    assert bin_path(prefix).read_bytes() == content


def test_only_the_builder_builds(tmp_path: Path, library: Path) -> None:
    waited = []

    def build_while_waiting() -> None:
        waited.append(True)
        python_stdlib_corpus(tmp_path / "cache", root=library)

    prefix = python_stdlib_corpus(
        tmp_path / "cache", root=library, is_builder=False, barrier=build_while_waiting
    )
    assert waited == [True]
    assert idx_path(prefix).is_file()
    with pytest.raises(ValueError, match="was not built"):
        python_stdlib_corpus(tmp_path / "elsewhere", root=library, is_builder=False)


def test_a_failing_builder_lets_the_others_go(tmp_path: Path) -> None:
    waited = []
    with pytest.raises(ValueError, match="no source file of Python's library"):
        python_stdlib_corpus(tmp_path, root=tmp_path, barrier=lambda: waited.append(True))
    assert waited == [True]
    assert list((tmp_path / "python_stdlib").iterdir()) == []


def test_the_real_library_is_tens_of_megabytes() -> None:
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    files = library_files(root)
    assert sum(path.stat().st_size for path in files) > 8e6
    assert not any("site-packages" in path.parts for path in files)
