"""The dry run's arithmetic against published sizes and hand-made numbers."""

import pytest

from megatron_ttt.config.flops import training_flops, training_flops_per_token
from megatron_ttt.config.summary import (
    parameter_counts,
    state_bytes,
    summarize,
)
from megatron_ttt.training.step import visible_pairs
from tests.unit.config.compose import configured

# elements that the released checkpoints hold (a tied output layer counts once)
RELEASED = {
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "llama3_1_8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", RELEASED)
def test_totals_are_those_of_the_released_checkpoints(name: str) -> None:
    plain = parameter_counts(configured(f"+model={name}", "ttt=off"))
    assert (plain.total, plain.fast, plain.added) == (RELEASED[name], 0, 0)
    fast = parameter_counts(configured(f"+model={name}"))
    assert fast.total - fast.added == plain.total


def test_fast_and_added() -> None:
    def counts(*words: str) -> tuple[int, int]:
        found = parameter_counts(configured("+model=qwen3_4b", "ttt.layers=[0,35]", *words))
        return found.fast, found.added

    assert counts() == (2 * 2560 * 9728, 2 * (2560 * 2560 + 5 * 2560))
    assert counts("ttt.proj=false") == (2 * 2560 * 9728, 2 * 5 * 2560)
    assert counts("ttt.conv=off") == (2 * 2560 * 9728, 2 * 2560 * 2560)


def test_biases_are_counted() -> None:
    plain = parameter_counts(configured("+model=tiny")).total
    biased = parameter_counts(configured("+model=tiny", "model.attention_bias=true")).total
    assert biased - plain == 6 * (4 + 2 + 2) * 64


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("qwen3_4b", 100), ("qwen3_8b", 201), ("llama3_1_8b", 235), ("qwen3_14b", 357)],
)
def test_state_sizes(name: str, megabytes: int) -> None:
    assert round(state_bytes(configured(f"+model={name}")) / 1e6) in (megabytes, megabytes - 1)
    halved = configured(f"+model={name}", "parallel.tp=2")
    assert 2 * state_bytes(halved) == state_bytes(configured(f"+model={name}"))


def test_flops_of_a_model_counted_by_hand() -> None:
    words = ["+model=tiny", "model.layers=1", "ttt.layers=[0]", "train.seq_length=4"]
    words += ["model.sliding_window=2"]
    attention = 2 * 256 * (256 + 128 + 128) + 2 * 256 * 256
    pairs = 1 + 2 + 2 + 2
    scores = 4 * 256 * pairs / 4
    mlp, output = 3 * 2 * 256 * 768, 2 * 256 * 258
    dense = 3 * (attention + scores + mlp + output)
    assert training_flops_per_token(configured(*words, "ttt=off")) == dense
    # 7 products instead of 3 in the down projection, and the target generator
    extra = 4 * 2 * 256 * 768 + 3 * (2 * 256 * 256 + 2 * 5 * 256)
    assert training_flops_per_token(configured(*words)) == dense + extra


def test_the_cost_of_fast_weights_is_the_known_share() -> None:
    """Added share of a training step, every sixth layer, no CP: 2.7 % for 4B at 32k."""

    def share(name: str, length: int) -> float:
        words = [f"+model={name}", f"train.seq_length={length}", "model.max_positions=131072"]
        plain = training_flops_per_token(configured(*words, "ttt=off"))
        return 100 * (training_flops_per_token(configured(*words)) / plain - 1)

    assert share("qwen3_4b", 32768) == pytest.approx(2.7, abs=0.35)
    assert share("llama3_1_8b", 131072) == pytest.approx(2.3, abs=0.35)


def test_the_text_names_everything() -> None:
    words = ["+model=qwen3_4b", "parallel.tp=2", "parallel.cp=2", "train.seq_length=8192"]
    text = summarize(configured(*words), world_size=16)
    for line in (
        "parameters    total 4,061,866,496, fast 149,422,080, added 39,398,400",
        "fast weights  layers 0, 6, 12, 18, 24, 30",
        "chunks        8 of 1024 tokens a sequence",
        "state         49,807,360 bytes per layer and row (fp32, on each of 2 tp ranks)",
        "ranks         16 = tp 2 * cp 2 * pp 1 * dp 4, sequence parallel",
        "  cp rank 0   tokens 0-2,047, 6,144-8,191",
        "  cp rank 1   tokens 2,048-4,095, 4,096-6,143",
        "batch         8 rows of 8,192 tokens = 65,536 tokens a step",
        "micro-batches 2 of 1 rows on each of 4 dp ranks",
    ):
        assert line in text.splitlines(), text


def test_the_text_without_fast_weights() -> None:
    text = summarize(configured("+model=tiny", "ttt=off"), world_size=1)
    assert "fast weights  none (ttt=off)" in text
    assert "state " not in text


@pytest.mark.parametrize("words", [["+model=tiny"], ["+model=qwen3_0_6b", "ttt=off"]])
def test_the_plan_counts_as_the_training_does(words: list[str]) -> None:
    config = configured(*words, "train.seq_length=300")
    pairs = visible_pairs(None, rows=1, length=300, window=config.model.sliding_window)
    counted = training_flops(config, tokens=300, pairs=pairs)
    assert 300 * training_flops_per_token(config) == pytest.approx(counted, rel=1e-12)
