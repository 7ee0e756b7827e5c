"""Whatever a manifest holds, it is read, or the checkpoint is called damaged in one line."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ttt.checkpoints.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    Manifest,
    check_files,
    read_manifest,
)
from megatron_ttt.checkpoints.progress import Progress

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
CONTENT = b"weights"
GOOD: dict[str, Any] = {
    "progress": {
        "step": 3,
        "consumed_samples": 12,
        "consumed_tokens": 1536,
        "metrics_bytes": 0,
        "batches": [[1, 4], [1, 6], [1, 2]],
    },
    "facts": {"layout": {"tp": 2}},
    "files": {"a.distcp": {"bytes": 7, "sha256": hashlib.sha256(CONTENT).hexdigest()}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("step")
    (made / "a.distcp").write_bytes(CONTENT)
    return made


def signed(document: Any) -> str:
    """With the checksum that a program would have written: the content is what is judged."""
    if isinstance(document, dict):
        words = json.dumps(document, sort_keys=True)
        document = {**document, "sha256": hashlib.sha256(words.encode()).hexdigest()}
    return json.dumps(document)


def read(folder: Path, text: str) -> Manifest | None:
    (folder / MANIFEST).write_text(text)
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest.files)
    except DamagedCheckpoint as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return None
    return manifest


def test_a_good_one_is_read(folder: Path) -> None:
    manifest = read(folder, signed(GOOD))
    assert manifest is not None and manifest.facts == GOOD["facts"]
    assert manifest.progress == Progress(3, 12, 1536, 0, ((1, 4), (1, 6), (1, 2)))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_any_json(folder: Path, document: Any) -> None:
    assert read(folder, signed(document)) is None


PLACES = [
    ("progress",),
    ("facts",),
    ("files",),
    *(("progress", key) for key in GOOD["progress"]),
    ("files", "a.distcp"),
    ("files", "a.distcp", "bytes"),
    ("files", "a.distcp", "sha256"),
]


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(PLACES), JSON)
def test_one_value_changed(folder: Path, place: tuple[str, ...], value: Any) -> None:
    """Read only where the value changes nothing that is relied on."""
    document = copy.deepcopy(GOOD)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    manifest = read(folder, signed(document))
    if manifest is not None:
        assert isinstance(manifest.facts, dict)
        progress = manifest.progress
        assert all(type(count) is int and count >= 0 for count in list(vars(progress).values())[:4])
        assert progress.samples_at(progress.step, 1) == progress.consumed_samples
        progress.after_step(4, seq_length=128)


@settings(deadline=None)
@given(
    st.text(max_size=300) | st.sampled_from(["/etc/passwd", "../a.distcp", "a\0b", "", "x" * 999])
)
def test_names_stay_inside_the_folder(folder: Path, name: str) -> None:
    document = copy.deepcopy(GOOD)
    document["files"] = {name: GOOD["files"]["a.distcp"]}
    manifest = read(folder, signed(document))
    assert manifest is None or (folder / name).resolve() == (folder / "a.distcp").resolve()


def test_depth_is_no_traceback(folder: Path) -> None:
    assert read(folder, "[" * 100_000) is None
    assert read(folder, "9" * 10_000) is None
