"""What is built is what was announced, and it starts the same everywhere."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ttt.config.load import load_config
from megatron_ttt.config.schema import Config
from megatron_ttt.config.summary import parameter_counts
from megatron_ttt.model.build import build_model
from megatron_ttt.model.fast_weight_mlp import FastWeightMLP
from megatron_ttt.model.initialize import Origin, initialize, pretraining_draw
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training import loop
from megatron_ttt.training.distributed import Ranks, model_parallel
from megatron_ttt.training.loop import build_trainer
from megatron_ttt.training.step import ForwardStep
from tests.distributed.training_runs import global_batch, tiny_config
from tests.pool import RankPool

SMALL = [
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.layers=5",
    "train.seq_length=64",
]


def built_counts(rank: int, ranks: int, config: Config) -> tuple[int, int, int]:
    """(total, fast, added) elements of the really built model, rows that pad it left out."""
    from megatron_ttt.config.to_megatron import transformer_config

    with megatron_on_cpu(), model_parallel(config) as here:
        model = build_model(config, transformer_config(config, device_is_cuda=False), here.groups)
        total = sum(parameter.numel() for parameter in model.parameters())
        fast = [module for module in model.modules() if isinstance(module, FastWeightMLP)]
        added = sum(
            parameter.numel() for name, parameter in model.named_parameters() if ".ttt_" in name
        )
        return total, sum(module.linear_fc2.weight.numel() for module in fast), added


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["ttt=off"],
        ["ttt.conv=off", "ttt.layers=[4]"],
        ["ttt.proj=false", "model.tied_embeddings=true", "model.qk_norm=false"],
        ["model.attention_bias=true", "model.kv_groups=4"],
    ],
    ids=lambda words: " ".join(words) or "tiny",
)
def test_parameter_counts_are_those_of_the_built_model(pool: RankPool, words: list[str]) -> None:
    config = load_config(["+model=tiny", *SMALL, "ttt.layers=[1,3]", *words])
    counts = parameter_counts(config)
    assert pool.run(built_counts, config, ranks=1) == [(counts.total, counts.fast, counts.added)]


def logits_at_start(rank: int, ranks: int, config: Config, fast: bool) -> torch.Tensor:
    """Logits of freshly initialised weights, fast weights on or off."""
    from megatron_ttt.config.schema import TTTMode

    mode = TTTMode.in_place if fast else TTTMode.off
    with megatron_on_cpu(), model_parallel(config) as here:
        trainer = build_trainer(config, here)
        step = ForwardStep(config, here, scan=trainer.scan, mode=mode)
        batch = global_batch(config, 0, packed=True)
        layout = step.layout(batch)
        with torch.no_grad():
            return trainer.stage(
                input_ids=batch.tokens_BT,
                position_ids=layout.positions,
                attention_mask=None,
                labels=None,
                packed_seq_params=layout,
            )


def test_a_fresh_model_computes_what_the_plain_one_does(pool: RankPool) -> None:
    config = tiny_config()
    (on,) = pool.run(logits_at_start, config, True, ranks=1)
    (off,) = pool.run(logits_at_start, config, False, ranks=1)
    torch.testing.assert_close(on, off, rtol=0, atol=1e-6)


def differs_from_whole_draws(rank: int, ranks: int, config: Config) -> list[str]:
    """Parameters of this rank that are not what it would have drawn alone."""
    with megatron_on_cpu(), model_parallel(config) as here:
        stage = build_trainer(config, here).stage
        found = {name: value.detach().clone() for name, value in stage.named_parameters()}
        initialize(
            stage,
            seed=config.train.seed,
            vocab_size=config.model.vocab_size,
            tp_rank=here.groups.tp.rank(),
            tp_size=here.groups.tp.size(),
            draw=pretraining_draw(config.model),
        )
        drawn = dict(stage.named_parameters())
        return [name for name, value in found.items() if not torch.equal(value, drawn[name])]


@pytest.mark.parametrize(
    ("ranks", "layout"), [(2, {}), (2, {"cp": 2}), (4, {"tp": 2}), (4, {"pp": 2})], ids=str
)
def test_shared_draws_are_those_of_a_rank_alone(
    pool: RankPool, ranks: int, layout: dict[str, int]
) -> None:
    assert pool.run(differs_from_whole_draws, tiny_config(**layout), ranks=ranks) == [[]] * ranks


@pytest.mark.parametrize(
    ("given", "begin"), [(None, Origin.DRAWN), ("hf:somewhere", Origin.LOADED)], ids=str
)
def test_nothing_is_drawn_where_weights_are_loaded(
    given: str | None, begin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def ask(config: Config, ranks: Ranks, origin: Origin) -> None:
        raise Asked(origin)

    config = tiny_config()
    config.run.dir, config.run.resume, config.checkpoint.load = str(tmp_path), "auto", given
    monkeypatch.setattr(loop, "build_trainer", ask)
    with pytest.raises(Asked) as asked:
        loop.pretrain(config)
    assert asked.value.args == (begin,)


def zeros_when_loaded(rank: int, ranks: int, config: Config) -> bool:
    with megatron_on_cpu(), model_parallel(config) as here:
        stage = build_trainer(config, here, Origin.LOADED).stage
        return not any(value.any() for value in stage.parameters())


def test_a_model_to_be_loaded_into_holds_nothing(pool: RankPool) -> None:
    assert pool.run(zeros_when_loaded, tiny_config(), ranks=1) == [True]


def groups_made(rank: int, ranks: int, config: Config) -> tuple[list[int], list[int], float, bool]:
    """Ranks of attention's group and of the scan's, the latter's timeout, whether they are one."""
    with megatron_on_cpu(), model_parallel(config) as here:
        # NCCL has no gloo twins of the groups: no optimizer may ask for one anywhere
        assert parallel_state._DATA_PARALLEL_GROUP_WITH_CP_GLOO is None
        trainer = build_trainer(config, here)
        scan, attention = here.scan_group, here.groups.cp
        assert trainer.scan.group.group is scan
        timeout = scan._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        assert trainer.scan.group.timeout_s < timeout
        members = [dist.get_process_group_ranks(group) for group in (attention, scan)]
        return *members, timeout, scan is attention


def test_states_travel_through_a_communicator_of_their_own(pool: RankPool) -> None:
    config = tiny_config(tp=2, cp=2, timeout_s=75)
    for rank, found in enumerate(pool.run(groups_made, config, ranks=4, timeout=150)):
        same = [rank % 2, rank % 2 + 2]
        assert found == (same, same, 75.0, False)
