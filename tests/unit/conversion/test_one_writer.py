"""Two programs do not write the same export, import or session at once."""

from pathlib import Path

import pytest

from megatron_ttt.checkpoints.work_folder import WorkFolder, writing
from megatron_ttt.config.faults import ConfigError
from tools.generate import session_held


def test_a_destination_has_one_writer(tmp_path: Path) -> None:
    final = tmp_path / "exported"
    with writing(final):
        folder = WorkFolder(final, {"job": 1})
        folder.write_text("config.json", "{}")
        taken = r"output=.*exported: is being written by "
        with pytest.raises(ConfigError, match=taken), writing(final):
            pytest.fail("two writers")
        assert (folder.path / "config.json").exists()
        folder.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_a_session_is_continued_by_one(tmp_path: Path) -> None:
    session = tmp_path / "talk.session"
    with session_held(session), session_held(tmp_path / "other.session"), session_held(None):
        taken = r"session=.*talk.session: is being written by "
        with pytest.raises(ValueError, match=taken), session_held(session):
            pytest.fail("two writers")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line() -> None:
    nowhere = Path("/proc/no/such/place")
    with pytest.raises(ValueError, match="cannot be written"), session_held(nowhere / "s"):
        pytest.fail("written")
    with pytest.raises(ConfigError, match="cannot be written"), writing(nowhere / "exported"):
        pytest.fail("written")
