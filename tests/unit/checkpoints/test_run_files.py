"""Checkpoint folders: complete or absent, and every kind of damage named."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ttt.checkpoints import run_files as files
from megatron_ttt.checkpoints.manifest import DamagedCheckpoint, check_files, read_manifest
from megatron_ttt.checkpoints.progress import Progress

CONTENT = {"__0_0.distcp": b"weights" * 100, "__1_0.distcp": b"moments" * 50, ".metadata": b"index"}


def save(root: Path, step: int) -> Path:
    """A checkpoint as two ranks save it: each records its own file, the rest is rank 0's."""
    root.mkdir(exist_ok=True)
    partial = files.partial_folder(root, step, "0123abcd")
    partial.mkdir()
    for name, content in CONTENT.items():
        (partial / name).write_bytes(content)
    files.record_files(partial, ["__0_0.distcp"], writer=0)
    files.record_files(partial, ["__1_0.distcp"], writer=1)
    progress = Progress(step, 4 * step, 512 * step, 100 * step)
    return files.publish(root, partial, progress, {"layout": {"tp": 2}, "rate": 0.1})


def verify(folder: Path) -> Progress:
    manifest = read_manifest(folder)
    check_files(folder, manifest.files)
    return manifest.progress


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_what_is_published_is_what_was_written(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 7)
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    assert verify(folder) == Progress(7, 28, 3584, 700)
    manifest = read_manifest(folder)
    assert manifest.facts == {"layout": {"tp": 2}, "rate": 0.1}
    assert manifest.files.keys() == CONTENT.keys()
    assert {path.name for path in folder.iterdir()} == {*CONTENT, "manifest.json"}
    assert (folder.parent / "latest").read_text() == "step_00000007\n"
    assert {path.name for path in folder.parent.iterdir()} == {"latest", folder.name}


def test_newest_first_and_nothing_but_complete_ones(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000):
        save(tmp_path, step)
    files.partial_folder(tmp_path, 11, "aa").mkdir()
    files.set_aside(save(tmp_path, 12))
    (tmp_path / "step_notes").mkdir()
    names = [path.name for path in files.complete_folders(tmp_path)]
    assert names == ["step_100000000", "step_00000010", "step_00000009"]


@pytest.mark.parametrize("name", [*CONTENT, "manifest.json"])
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1)
    size = (folder / name).stat().st_size
    for place in range(0, size, max(1, size // 40)):
        flip(folder / name, place)
        with pytest.raises(DamagedCheckpoint, match=name.replace(".", r"\.")):
            verify(folder)
        flip(folder / name, place)
    verify(folder)


def change_progress(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    document["progress"]["step"] += 1
    (folder / "manifest.json").write_text(json.dumps(document))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "__1_0.distcp").write_bytes(b"moments"), "7 bytes instead of 350"),
    (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda folder: (folder / "manifest.json").write_text('{"progress"'), "is unreadable"),
    (lambda folder: (folder / "manifest.json").write_text("[]"), "is unreadable"),
    (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00"), "is unreadable"),
    (change_progress, "does not match its own checksum"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = save(tmp_path, 3)
    damage(folder)
    with pytest.raises(DamagedCheckpoint, match=message.replace(".", r"\.")):
        verify(folder)


def test_shares_of_the_check_cover_every_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    records = read_manifest(folder).files
    for name in records:
        flip(folder / name, 2)
        finders = []
        for part in range(2):
            try:
                check_files(folder, records, part=part, parts=2)
            except DamagedCheckpoint:
                finders.append(part)
        assert len(finders) == 1
        flip(folder / name, 2)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    old = save(tmp_path, 5)
    (old / "leftover").touch()
    new = save(tmp_path, 5)
    assert not (new / "leftover").exists()
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000005"]


def test_leftovers_of_killed_runs_go_and_nothing_else(tmp_path: Path) -> None:
    good, damaged = save(tmp_path, 1), files.set_aside(save(tmp_path, 2))
    leftover = files.partial_folder(tmp_path, 3, "dead")
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    files.remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {good, damaged, tmp_path / "latest"}


def test_setting_aside_never_overwrites(tmp_path: Path) -> None:
    names = [files.set_aside(save(tmp_path, 4)).name for _ in range(3)]
    assert names == ["step_00000004.damaged", "step_00000004.damaged.1", "step_00000004.damaged.2"]


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [
        (None, None, [10, 20, 30, 40, 50]),
        (2, None, [40, 50]),
        (1, 20, [20, 40, 50]),
        (9, None, [10, 20, 30, 40, 50]),
    ],
)
def test_retention(tmp_path: Path, last: int | None, every: int | None, kept: list[int]) -> None:
    for step in range(10, 60, 10):
        save(tmp_path, step)
    removed = files.remove_surplus(tmp_path, keep_last=last, keep_every=every)
    left = sorted(int(path.name[5:]) for path in files.complete_folders(tmp_path))
    assert left == kept
    assert len(removed) + len(left) == 5
    assert len(list(tmp_path.iterdir())) == len(kept) + 1  # and `latest`


def test_killed_before_every_rank_recorded_is_no_checkpoint(tmp_path: Path) -> None:
    partial = files.partial_folder(tmp_path, 8, "cc")
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half")
    files.record_files(partial, ["__0_0.distcp"], writer=0)
    assert files.complete_folders(tmp_path) == []
    assert not (tmp_path / "latest").exists()


def test_errors_travel_between_ranks() -> None:
    error = pickle.loads(pickle.dumps(DamagedCheckpoint("x is missing")))
    assert str(error) == "x is missing"
