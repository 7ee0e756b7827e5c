"""Damaged inputs, full disks and killed conversions: one line, and nothing half-written visible."""

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ttt.checkpoints import work_folder
from megatron_ttt.checkpoints.megatron_folder import CheckpointWriter
from megatron_ttt.config.faults import ConfigError
from tests.unit.conversion.folders import (
    QWEN3,
    assert_equal_tensors,
    export_folder,
    import_folder,
    write_hf,
)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_config(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config cut": (lambda folder: truncate(folder / "config.json"), "config.json"),
    "no shard": (lambda f: (f / "model-1.safetensors").unlink(), "model-1.safetensors"),
    "shard cut": (lambda f: truncate(f / "model-1.safetensors"), "model-1.safetensors"),
    "shard empty": (
        lambda f: (f / "model-0.safetensors").write_bytes(b""),
        "model-0.safetensors",
    ),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        "only safetensors are read",
    ),
    "index of nothing": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "weight_map",
    ),
    "another size": (change_config("intermediate_size", 24), "its config.json says"),
    "a layer too many": (change_config("num_hidden_layers", 3), "lacks model.layers.2."),
    "a layer too few": (change_config("num_hidden_layers", 1), "without a place"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sources(damage: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3, files=2)
    act, words = DAMAGES[damage]
    act(tmp_path / "hf")
    with pytest.raises(ConfigError) as caught:
        import_folder(tmp_path / "hf", tmp_path / "megatron")
    assert words in str(caught.value)
    assert all(str(tmp_path) in line for line in str(caught.value).splitlines())
    assert not (tmp_path / "megatron").exists()


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


MEGATRON_DAMAGES: dict[str, Callable[[Path], None]] = {
    "metadata.json": lambda folder: (folder / "metadata.json").unlink(),
    ".metadata is missing": lambda folder: (folder / ".metadata").unlink(),
    ".metadata: is damaged": lambda folder: truncate(folder / ".metadata"),
    "__3_0.distcp": lambda folder: (folder / "__3_0.distcp").unlink(),
    "__4_0.distcp: is damaged": lambda folder: truncate(folder / "__4_0.distcp"),
    "does not match its checksum": lambda folder: flip(folder / "__5_0.distcp", 300),
    "manifest.json": lambda folder: truncate(folder / "manifest.json"),
    "does not describe the model": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("words", MEGATRON_DAMAGES)
def test_damaged_megatron_checkpoints(words: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    MEGATRON_DAMAGES[words](tmp_path / "megatron")
    with pytest.raises(ConfigError) as caught:
        export_folder(tmp_path / "megatron", tmp_path / "back")
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "back").exists()


def test_metadata_runs_no_code(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    marker = tmp_path / "marker"
    evil = f"cposix\nsystem\n(S'touch {marker}'\ntR."
    (tmp_path / "megatron" / ".metadata").write_bytes(evil.encode())
    with pytest.raises(ConfigError, match=r"posix\.system"):
        export_folder(tmp_path / "megatron", tmp_path / "back")
    assert not marker.exists()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # stands for a full disk
    try:
        with pytest.raises(ConfigError, match=r"output=.*cannot be written") as caught:
            import_folder(tmp_path / "hf", tmp_path / "again")
        assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(ConfigError, match="cannot be written"):
            export_folder(tmp_path / "megatron", tmp_path / "back")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "again").exists() and not (tmp_path / "back").exists()


def test_an_existing_destination_is_left_alone(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        import_folder(tmp_path / "hf", tmp_path / "megatron")
    assert (tmp_path / "megatron" / "precious").read_text() == "x"


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("written", [1, 7, 17])
def test_a_killed_import_continues(
    written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = write_hf(tmp_path / "hf", QWEN3)
    add = CheckpointWriter.add
    fresh = []

    def counted(self: CheckpointWriter, *args: object) -> bool:
        fresh.append(add(self, *args))  # type: ignore[arg-type]
        if len(fresh) == written:
            raise Killed
        return fresh[-1]

    monkeypatch.setattr(CheckpointWriter, "add", counted)
    with pytest.raises(Killed):
        import_folder(tmp_path / "hf", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
    journal = tmp_path / "megatron.partial" / work_folder.JOURNAL
    journal.write_text(journal.read_text() + '{"file": "__9')  # killed within a line
    total, fresh = len(tensors), []
    written = 0
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    assert fresh.count(False) in (1, 7, 17), total
    assert not (tmp_path / "megatron.partial").exists()
    assert_equal_tensors(export_folder(tmp_path / "megatron", tmp_path / "back"), tensors)


def test_another_source_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(tmp_path / "hf", QWEN3)
    monkeypatch.setattr(CheckpointWriter, "complete", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        import_folder(tmp_path / "hf", tmp_path / "megatron")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "hf")
    tensors = write_hf(tmp_path / "hf", {**QWEN3, "rope_theta": 5e5})
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    assert_equal_tensors(export_folder(tmp_path / "megatron", tmp_path / "back"), tensors)


def test_a_killed_export_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write_hf(tmp_path / "hf", QWEN3)
    import_folder(tmp_path / "hf", tmp_path / "megatron")
    finish = work_folder.WorkFolder.finish
    monkeypatch.setattr(work_folder.WorkFolder, "finish", _killed_at(finish, 2))
    with pytest.raises(Killed):
        export_folder(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    seen: list[str] = []

    def noting(self: work_folder.WorkFolder, name: str, **notes: object) -> None:
        seen.append(name)
        finish(self, name, **notes)

    monkeypatch.setattr(work_folder.WorkFolder, "finish", noting)
    assert_equal_tensors(export_folder(tmp_path / "megatron", tmp_path / "back"), tensors)
    first = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))[0]
    assert first not in seen


def _killed_at(finish: Callable[..., None], count: int) -> Callable[..., None]:
    calls = []

    def finishing(self: work_folder.WorkFolder, name: str, **notes: object) -> None:
        calls.append(name)
        if len(calls) == count:
            raise Killed
        finish(self, name, **notes)

    return finishing
