"""The checks of ``tests/gpu``, small and on the CPU: what they call works and they can fail."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_ttt.config.load import run_with_config
from megatron_ttt.fast_weights import Direction
from tests.end_to_end.lives import TINY, Run
from tests.gpu.checks import (
    MailTransport,
    seconds_until_given_up,
    stream_scan_error,
    train_save_resume,
)
from tests.gpu.test_device import SHAPE
from tests.nccl.cuda_paths import cuda_paths

CPU = torch.device("cpu")


@pytest.mark.parametrize("direction", Direction)
def test_scan_on_streams(direction: Direction) -> None:
    with cuda_paths():
        assert stream_scan_error(CPU, direction, ranks=4, width=37, busy=1) < 1e-5


def test_a_lost_message_is_an_error_of_the_size_of_the_numbers() -> None:
    def forget(self: MailTransport, request: object) -> None:
        """Leave what should have been received as it is."""

    with cuda_paths(), mock.patch.object(MailTransport, "exchange", forget):
        assert not stream_scan_error(CPU, Direction.FORWARD, ranks=4, width=37, busy=1) < 1e-5


def test_the_watchdog_gives_up() -> None:
    assert 0.1 < seconds_until_given_up(lambda: False, timeout_s=0.1) < 5


def test_trains_saves_and_resumes(tmp_path: Path) -> None:
    rows = train_save_resume(Run(tmp_path / "run"))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_large_configuration_is_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, *SHAPE, f"run.dir={tmp_path}/run", "run.dry_run=true"]
    assert run_with_config(pytest.fail, words) == 0
    printed = capsys.readouterr().out
    assert "28 layers" in printed
