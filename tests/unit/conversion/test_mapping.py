"""Row runs: every row of either side is placed exactly once."""

import pytest
import torch

from megatron_ttt.config.schema import Family
from megatron_ttt.conversion.families import FAMILIES
from megatron_ttt.conversion.hf_config import model_from_hf
from megatron_ttt.conversion.mapping import TargetGenerator, build_mapping
from megatron_ttt.conversion.rules import InterleavedQKV, Run, TensorMap
from megatron_ttt.rule import TARGET_PARAMETERS
from tests.unit.conversion.folders import QWEN3

BOTH = TargetGenerator((0, 1), TARGET_PARAMETERS)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_row_has_one_place(family: Family) -> None:
    config = {**QWEN3, "model_type": FAMILIES[family].model_type, "attention_bias": True}
    mapping = build_mapping(model_from_hf(config, name="m", where="m"), BOTH)
    taken: dict[str, list[int]] = {}
    for tensor in mapping.tensors:
        assert sum(run.count for run in tensor.runs) == tensor.shape[0]
        for run in tensor.runs:
            taken.setdefault(run.tensor, []).extend(range(run.start, run.start + run.count))
    for name, shape in mapping.hf_shapes().items():
        assert sorted(taken[name]) == list(range(shape[0])), name
    for name, places in mapping.megatron_runs().items():
        assert sum(run.count for _, run in places) == mapping.hf_shapes()[name][0]


def test_query_key_value_rows_as_megatron_reads_them() -> None:
    heads, groups, head, hidden = 6, 3, 4, 5
    sizes = {"E": head, "K": groups * head, "Q": heads * head, "H": hidden}
    rule = InterleavedQKV("qkv", "q", "k", "v", columns="H")
    shape, runs = rule.expand(sizes)
    torch.manual_seed(0)
    parts = {
        "q": torch.randn(heads * head, hidden),
        "k": torch.randn(groups * head, hidden),
        "v": torch.randn(groups * head, hidden),
    }
    stacked = torch.cat([parts[run.tensor][run.start : run.start + run.count] for run in runs])
    assert stacked.shape == shape
    # Megatron's SelfAttention: view [groups, (heads per group + 2) * head], then split
    token = torch.randn(hidden)
    grouped = (stacked @ token).view(groups, (heads // groups + 2) * head)
    query, key, value = grouped.split([heads // groups * head, head, head], dim=1)
    torch.testing.assert_close(query.reshape(heads, head), (parts["q"] @ token).view(heads, head))
    torch.testing.assert_close(key, (parts["k"] @ token).view(groups, head))
    torch.testing.assert_close(value, (parts["v"] @ token).view(groups, head))


def test_select_rows_cuts_runs() -> None:
    tensor = TensorMap("m", (9, 2), (Run("a", 10, 4), Run("b", 0, 5)))
    assert list(tensor.select_rows(0, 9)) == list(tensor.runs)
    assert list(tensor.select_rows(2, 6)) == [Run("a", 12, 2), Run("b", 0, 2)]
    assert list(tensor.select_rows(5, 6)) == [Run("b", 1, 1)]


def test_tied_models_store_the_embedding_once() -> None:
    model = model_from_hf({**QWEN3, "tie_word_embeddings": True}, name="m", where="m")
    mapping = build_mapping(model, TargetGenerator(()))
    assert "lm_head.weight" not in mapping.hf_shapes()
    assert "output_layer.weight" not in {tensor.megatron for tensor in mapping.tensors}
