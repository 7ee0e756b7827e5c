"""Converted models compute what ``transformers`` computes, at every layout, and convert back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ttt.checkpoints.megatron_folder import MegatronFolder
from megatron_ttt.config.schema import TTTConfig
from megatron_ttt.conversion.exporting import HFView, Style, export_checkpoint
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.importing import import_checkpoint
from megatron_ttt.conversion.manifest import described_model, origin
from megatron_ttt.conversion.source import MegatronView
from megatron_ttt.conversion.ttt_config import target_generator
from tests.distributed.conversion_cases import (
    CASES,
    CHUNK,
    Case,
    megatron_logits,
    megatron_parameters,
    random_tokens,
    relative_error,
    run_config,
    save_hf_model,
    whole_logits,
)
from tests.pool import RankPool

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]  # (tp, pp)
FAST = TTTConfig(layers=[0, 3], chunk_size=CHUNK, eta=0.1)


def silent(name: str, size: int) -> None:
    """No progress bar."""


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_models_agree_with_transformers(case: Case, tmp_path: Path, pool: RankPool) -> None:
    hf = save_hf_model(case, tmp_path / "hf")
    with torch.no_grad():
        expected = hf(random_tokens()).logits
    target = target_generator(FAST, layers=4)
    view = MegatronView(HFFolder(tmp_path / "hf"), target=target, seed=11)
    import_checkpoint(view, tmp_path / "megatron", ttt=FAST, report=silent, block_bytes=3000)
    for tp, pp in LAYOUTS:
        config = run_config(view.model, FAST, tp=tp, pp=pp)
        for folder, from_hf in ((tmp_path / "megatron", False), (tmp_path / "hf", True)):
            reports = pool.run(megatron_logits, config, folder, from_hf, ranks=tp * pp, timeout=120)
            error = relative_error(whole_logits(reports), expected)
            assert error < 1e-5, f"tp={tp} pp={pp} from_hf={from_hf}: {error:.1e}"
    folder = MegatronFolder(tmp_path / "megatron")
    back = HFView(folder, *described_model(folder))
    export_checkpoint(
        back,
        tmp_path / "back",
        companions_from=origin(folder),
        style=Style.reference,
        report=silent,
        shard_bytes=70_000,
        block_bytes=2000,
    )
    before, after = stored_tensors(tmp_path / "hf"), stored_tensors(tmp_path / "back")
    added = {name for name in after if ".ttt_" in name}
    assert len(added) == 4
    assert after.keys() - added == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_both_ways_in_give_the_same_parameters(tmp_path: Path, pool: RankPool) -> None:
    save_hf_model(CASES[1], tmp_path / "hf", dtype=torch.bfloat16)
    view = MegatronView(HFFolder(tmp_path / "hf"), target=target_generator(FAST, layers=4), seed=11)
    import_checkpoint(view, tmp_path / "megatron", ttt=FAST, report=silent, block_bytes=3000)
    config = run_config(view.model, FAST, tp=2, pp=2)
    folders = ((tmp_path / "megatron", False), (tmp_path / "hf", True))
    imported, direct = (
        pool.run(megatron_parameters, config, folder, from_hf, ranks=4, timeout=120)
        for folder, from_hf in folders
    )
    for ours, theirs in zip(imported, direct, strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    projections = [
        torch.cat([rank[f"decoder.layers.{layer}.mlp.ttt_proj.weight"] for rank in ranks], dim=1)
        for layer, ranks in ((0, direct[:2]), (3, direct[2:]))
    ]
    for projection in projections:
        assert projection.diagonal().all()
        assert torch.equal(projection, projection.diagonal().diag())
    assert not torch.equal(*projections)
