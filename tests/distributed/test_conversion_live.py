"""A model trained with live fast weights leaves Megatron and computes the same in transformers."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
from megatron_ttt.checkpoints.progress import Progress
from megatron_ttt.config.schema import Config
from megatron_ttt.conversion.exporting import HFView, Style, export_checkpoint
from megatron_ttt.conversion.importing import plain
from megatron_ttt.conversion.manifest import described_model
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training.checkpoint_saver import CheckpointSaver, Retention, SaveMode
from megatron_ttt.training.distributed import model_parallel
from megatron_ttt.training.loop import build_trainer
from tests.distributed.conversion_cases import forward_logits, random_tokens, relative_error
from tests.distributed.training_runs import (
    VOCABULARY,
    RunReport,
    global_batch,
    live_draw,
    redraw,
    tiny_config,
    train_one,
)
from tests.pool import RankPool


def train_and_save(
    rank: int, ranks: int, config: Config, folder: Path
) -> tuple[tuple[int, Tensor] | None, dict[int, float]]:
    """Two steps from live weights, then a checkpoint; (logits, update ratios of the last step)."""
    report = RunReport()
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        redraw(trainer, live_draw)
        for step in range(2):
            train_one(
                trainer, global_batch(config, step, packed=False), report, keep_gradients=False
            )
        saver = CheckpointSaver(
            folder,
            trainer.state,
            ranks=here,
            mode=SaveMode.SYNCHRONOUS,
            facts={"config": {"model": plain(config.model), "ttt": plain(config.ttt)}},
            retention=Retention(),
            report=lambda text: None,
        )
        saver.save(Progress(step=2, consumed_samples=0, consumed_tokens=0, metrics_bytes=0))
        with torch.no_grad():
            tokens = random_tokens() % VOCABULARY
            return forward_logits(trainer.stage.eval(), config, here, tokens), report.ratios[-1]


def test_trained_model_in_transformers(tmp_path: Path, pool: RankPool) -> None:
    from transformers import AutoModelForCausalLM

    import megatron_ttt.hf  # noqa: F401 (registers the classes with fast weights)

    config = tiny_config(tp=2, pp=2, packed=False, window=None, eta=0.0015)
    reports = pool.run(train_and_save, config, tmp_path / "megatron", ranks=4, timeout=150)
    ratios = reports[-1][1]
    assert all(0.05 < ratio < 0.3 for ratio in ratios.values()), ratios
    shards = dict(logits for logits, _ in reports if logits is not None)
    expected = torch.cat([shards[rank] for rank in sorted(shards)], dim=-1)[..., :VOCABULARY]

    folder = MegatronFolder(tmp_path / "megatron" / "latest")
    assert folder.tensors["embedding.word_embeddings.weight"].shape[0] == VOCABULARY + 1
    export_checkpoint(
        HFView(folder, *described_model(folder)),
        tmp_path / "hf",
        companions_from=None,
        style=Style.package,
        report=lambda name, size: None,
        shard_bytes=20_000,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = random_tokens() % VOCABULARY
    with torch.no_grad():
        assert relative_error(model(tokens).logits, expected) < 1e-4
        model.config.ttt_mode = False  # what the fast weights contribute is no rounding error
        assert relative_error(model(tokens).logits, expected) > 1e-2
