"""The training program as a user starts it: one process, and two ranks that share sequences."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    *("+model=tiny", "model.layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48"),
    *("model.head_dim=8", "ttt.layers=[0,1]", "ttt.chunk_size=16", "train.seq_length=128"),
    *("train.steps=8", "train.micro_batch_size=2", "train.global_batch_size=4"),
    *("optimizer.warmup_steps=2", "validation.interval=4", "validation.batches=1"),
    *("checkpoint.interval=null", "data.workers=0"),
]
COLUMNS = {
    *("step", "loss", "grad_norm", "lr", "consumed_tokens", "tokens_per_second"),
    *("tflops_per_device", "step_time_s", "peak_memory_bytes"),
    *("ttt/update_ratio/layer_00", "ttt/update_ratio/layer_01"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, str]:
    """The folder of a run with everything that can be logged, and what it printed."""
    folder = tmp_path_factory.mktemp("one") / "run"
    words = ("logging.plot=true", "logging.tensorboard=true", "logging.wandb=offline")
    return folder, pretrain(folder, cache, *words)


def pretrain(folder: Path, cache: Path, *arguments: str, ranks: int = 1) -> str:
    """Start the program; what it printed. A failure shows both streams."""
    command = [sys.executable, "launch/pretrain.py"]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "launch/pretrain.py"]
    command += [*SMALL, f"run.dir={folder}", f"data.cache_dir={cache}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_process_trains_reports_and_plots(one_process: tuple[Path, str]) -> None:
    run, printed = one_process
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, 9))
    assert all(row.keys() >= COLUMNS for row in found)
    assert found[-1]["loss"] < found[0]["loss"] - 0.05
    assert found[-1]["consumed_tokens"] == 8 * 4 * 128
    assert {"validation/loss", "validation/loss_ttt_off"} <= found[3].keys()
    assert found[7]["validation/loss"] != found[7]["validation/loss_ttt_off"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*")) and list((run / "wandb").glob("offline*"))
    assert (run / "checkpoints" / "latest").read_text() == "step_00000008\n"
    last = printed.strip().splitlines()[-1]
    assert str(run) in last and "loss.png" in last
    assert "Warning" not in printed and "Traceback" not in printed


def test_two_ranks_sharing_sequences_train_the_same_model(
    one_process: tuple[Path, str], tmp_path: Path, cache: Path
) -> None:
    pretrain(tmp_path / "two", cache, "parallel.cp=2", ranks=2)
    for one, two in zip(rows(one_process[0]), rows(tmp_path / "two"), strict=True):
        for column in ("loss", "grad_norm", "ttt/update_ratio/layer_01"):
            assert two[column] == pytest.approx(one[column], rel=2e-4)
        assert two["lr"] == one["lr"]
        assert two["consumed_tokens"] == one["consumed_tokens"]
