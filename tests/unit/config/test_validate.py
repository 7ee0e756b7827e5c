"""The checks between fields: each fault of the list, and nothing for what is valid."""

import pytest

from megatron_ttt.config import derived
from megatron_ttt.config.schema import AttentionBackend, Precision
from megatron_ttt.config.validate import validate
from tests.unit.config.compose import configured

BIG = ["+model=qwen3_4b", "data.path=corpus"]
TINY = ["+model=tiny"]
# a small batch arithmetic that never is the fault under test
ONE_ROW = ["train.micro_batch_size=1", "train.global_batch_size=16"]


def faults(
    words: list[str], world_size: int = 1, *, cuda: bool = False, engine: bool = False
) -> list[str]:
    """Lines of the faults of a composed configuration."""
    config = configured(*words)
    found = validate(config, world_size, cuda=cuda, transformer_engine=engine)
    return [fault.line() for fault in found]


@pytest.mark.parametrize(
    ("words", "world_size", "expected"),
    [
        ([*TINY, "ttt.layers=[1,6]"], 1, "ttt.layers=[1,6]: tiny has no layer 6: layers are 0"),
        ([*TINY, "ttt.layers=[-1]"], 1, "tiny has no layer -1"),
        ([*TINY, "ttt.layers=[2,2]"], 1, "ttt.layers=[2,2]: names a layer twice"),
        ([*TINY, "ttt.layers=[]"], 1, "ttt.layers=[]: is empty"),
        (
            [*TINY, "parallel.cp=2", "train.seq_length=1000"],
            2,
            "train.seq_length=1000: must be a multiple of 256 for parallel.cp=2 (zigzag),"
            " ttt.chunk_size=64; nearest valid: 768 or 1024",
        ),
        (
            [*TINY, "parallel.cp=2", "parallel.cp_order=contiguous", "train.seq_length=100"],
            2,
            "must be a multiple of 128 for parallel.cp=2 (contiguous), ttt.chunk_size=64;"
            " nearest valid: 128",
        ),
        (
            [*TINY, "parallel.cp=2", "train.seq_length=1002", "ttt=off"],
            2,
            "must be a multiple of 4 for parallel.cp=2 (zigzag); nearest valid: 1000 or 1004",
        ),
        (
            [*TINY, "parallel.tp=2", "train.seq_length=1001"],
            2,
            "train.seq_length=1001: must be a multiple of 2 for parallel.tp=2 with sequence"
            " parallelism; nearest valid: 1000 or 1002",
        ),
        ([*BIG, "train.seq_length=65536"], 1, "has 32768 positions (model.max_positions)"),
        (
            [*BIG, "parallel.tp=2", "parallel.cp=2"],
            6,
            "world_size=6: parallel.tp=2 * cp=2 * pp=1 = 4 does not divide it;"
            " start 4 or 8 processes",
        ),
        (
            [*BIG, "parallel.tp=16"],
            16,
            "parallel.tp=16: does not divide model.kv_groups=8; valid for this model: 1, 2, 4, 8",
        ),
        (
            [*TINY, "model.heads=6", "model.kv_groups=4"],
            1,
            "model.kv_groups=4: must divide model.heads=6 evenly",
        ),
        (
            [*TINY, "parallel.tp=2", "model.heads=3", "model.kv_groups=3"],
            2,
            "parallel.tp=2: does not divide model.heads=3, kv_groups=3; valid for this model: 1",
        ),
        (
            [*TINY, "parallel.pp=2"],
            2,
            "ttt.target=input_embeddings: later pipeline stages have no input embeddings:"
            " parallel.pp=2 must be 1, or ttt.target=hidden_states",
        ),
        (
            [*BIG, "parallel.pp=5"],
            5,
            "parallel.pp=5: model.layers=36 does not split evenly; valid: 1, 2, 3, 4, 6, 9, 12",
        ),
        (
            [*BIG, "train.global_batch_size=6", "train.micro_batch_size=2"],
            4,
            "train.global_batch_size=6: must be a multiple of train.micro_batch_size=2 times"
            " 4 data-parallel ranks; nearest valid: 8",
        ),
        ([*BIG, "parallel.sequence_parallel=on"], 1, "parallel.sequence_parallel=on: needs parall"),
        ([*BIG, "parallel.cp_comm_type=ring"], 1, "must be one of p2p, a2a, all_gather"),
        ([*BIG, "parallel.overlap_param_gather=true"], 1, "needs parallel.overlap_grad_reduce"),
        ([*BIG, "parallel.bucket_size=5"], 1, "parallel.bucket_size=5: needs parallel.overlap"),
        (
            [*BIG, "parallel.overlap_grad_reduce=true", "parallel.bucket_size=0"],
            1,
            "parallel.bucket_size=0: must be at least 1",
        ),
        ([*BIG, "ttt.chunk_size=0"], 1, "ttt.chunk_size=0: must be at least 1"),
        ([*BIG, "ttt.eta=-1"], 1, "ttt.eta=-1.0: must be at least 0"),
        ([*BIG, "ttt.eta=nan"], 1, "ttt.eta=nan: must be at least 0"),
        ([*BIG, "ttt.decay=0"], 1, "ttt.decay=0.0: must lie in (0, 1]"),
        ([*BIG, "ttt.decay=1.5"], 1, "ttt.decay=1.5: must lie in (0, 1]"),
        (
            [*BIG, "ttt.clip.mode=relative", "ttt.clip.bound=0"],
            1,
            "ttt.clip.bound=0.0: must be above 0",
        ),
        ([*BIG, "model.rope.factor=2"], 1, "has no effect with model.rope.scaling=none"),
        (
            [*BIG, "model.rope.scaling=yarn", "model.rope.factor=0.5"],
            1,
            "model.rope.factor=0.5: must be at least 1",
        ),
        (
            [*BIG, "model.rope.scaling=yarn", "model.rope.beta_slow=40"],
            1,
            "model.rope.beta_slow=40.0: must lie in (0, beta_fast=32)",
        ),
        (
            [*BIG, "model.rope.scaling=llama3", "model.rope.low_freq_factor=4"],
            1,
            "model.rope.low_freq_factor=4.0: must lie in (0, high_freq_factor=4)",
        ),
        ([*BIG, "model.head_dim=127"], 1, "model.head_dim=127: must be even"),
        ([*BIG, "model.sliding_window=0"], 1, "model.sliding_window=0: must be at least 1"),
        ([*TINY, "model.vocab_size=256"], 1, "model.vocab_size=256: data.tokenizer.kind=bytes has"),
        ([*BIG, "optimizer.lr=-1"], 1, "optimizer.lr=-1.0: must be at least 0"),
        ([*BIG, "optimizer.min_lr=1"], 1, "optimizer.min_lr=1.0: is above optimizer.lr=5e-06"),
        ([*BIG, "optimizer.warmup_steps=1000"], 1, "must be below train.steps=1000"),
        ([*BIG, "optimizer.decay_fraction=0"], 1, "optimizer.decay_fraction=0.0: must lie in (0,"),
        ([*BIG, "optimizer.decay_fraction=0.02"], 1, "ends the decay at step 20 of 1000"),
        ([*BIG, "optimizer.warmup_fraction=1"], 1, "optimizer.warmup_fraction=1.0: must lie in"),
        ([*BIG, "optimizer.beta2=1"], 1, "optimizer.beta2=1.0: must lie in [0, 1)"),
        ([*BIG, "train.steps=0"], 1, "train.steps=0: must be at least 1"),
        ([*BIG, "checkpoint.interval=0"], 1, "checkpoint.interval=0: must be at least 1"),
        ([*BIG, "validation.interval=0"], 1, "validation.interval=0: must be at least 1"),
        ([*BIG, "logging.interval=0"], 1, "logging.interval=0: must be at least 1"),
        ([*BIG, "run.resume=''"], 1, "must be never, auto or the path of a checkpoint folder"),
        (["+model=qwen3_4b"], 1, "data.path=null: name the corpus"),
        ([*BIG, "data.split='1,2'"], 1, "data.split=1,2: must be three shares"),
        ([*BIG, "data.split='a,b,c'"], 1, "data.split=a,b,c: must be three shares"),
        (
            [*BIG, "data.split='100,0,0'", "validation.interval=5"],
            1,
            "data.split=100,0,0: leaves nothing to validate on",
        ),
        (
            ["+model=qwen3_4b", "data=python_stdlib", "data.tokenizer.kind=huggingface"],
            1,
            "data.tokenizer.name=null: data.tokenizer.kind=huggingface needs",
        ),
        (
            [*BIG, "train.recompute=selective", "train.recompute_modules=[moe]"],
            1,
            "train.recompute_modules=[moe]: must name some of core_attn, layernorm, mlp",
        ),
        (
            [*BIG, "train.recompute=selective", "train.recompute_modules=[layernorm]"],
            1,
            "train.recompute_modules=[layernorm]: layernorm needs the package transformer_engine,"
            " which Megatron-core asks for its state there; use core_attn, mlp",
        ),
    ],
)  # fmt: skip
def test_each_fault(words: list[str], world_size: int, expected: str) -> None:
    (line,) = faults(words, world_size)
    assert expected in line


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        ([*TINY, "train.seq_length=1001"], 1),  # one rank: an unfinished last chunk is fine
        ([*TINY, "parallel.cp=4", "train.seq_length=1024", "ttt.chunk_size=128"], 4),
        ([*TINY, "parallel.cp=2", "parallel.tp=2", "train.seq_length=512"], 4),
        ([*TINY, "parallel.pp=2", "ttt=off"], 2),
        ([*TINY, "parallel.pp=3", "ttt.target=hidden_states"], 3),
        ([*TINY, *ONE_ROW], 16),
        ([*BIG, "parallel.scan=ring", "ttt.decay=1", "ttt.eta=0"], 1),
        ([*BIG, "parallel.scan=doubling", "train.recompute=selective"], 1),
        (["+model=qwen3_4b", "run.dry_run=true"], 1),
        ([*TINY, "ttt.layers=[9]", "ttt=off", "ttt.layers=null"], 1),
    ],
)
def test_valid(words: list[str], world_size: int) -> None:
    assert faults(words, world_size) == []


def test_every_fault_is_reported_at_once() -> None:
    words = [*TINY, "ttt.layers=[7]", "parallel.cp=2", "train.seq_length=1000", "ttt.decay=2"]
    keys = [line.split("=")[0] for line in faults(words, 3)]
    assert keys == ["ttt.layers", "ttt.decay", "train.seq_length", "world_size"]


@pytest.mark.parametrize("key", ["parallel.tp", "parallel.cp", "parallel.pp", "model.kv_groups",
                                 "model.layers", "ttt.chunk_size", "train.micro_batch_size",
                                 "train.global_batch_size", "train.seq_length"])  # fmt: skip
@pytest.mark.parametrize("value", [0, -2])
def test_zero_and_negative_sizes_are_faults_not_crashes(key: str, value: int) -> None:
    words = [*TINY, f"{key}={value}", "model.attention=transformer_engine"]
    found = faults(words, 4, cuda=True, engine=True)
    assert f"{key}={value}: must be at least 1" in found


ENGINE = [*BIG, "model.attention=transformer_engine"]
PAIR = ["parallel.cp=2", "train.seq_length=8192", "data.reset_attention=false"]


@pytest.mark.parametrize(
    ("words", "ranks", "cuda", "engine", "expected"),
    [
        (ENGINE, 1, False, False, "needs a GPU; use auto or torch"),
        (ENGINE, 1, True, False, "the package transformer_engine is not installed"),
        (ENGINE, 1, True, True, "document masks"),
        ([*ENGINE, "data.reset_attention=false"], 1, True, True, None),
        ([*ENGINE, *PAIR], 2, True, True, None),
        ([*ENGINE, *PAIR, "data.reset_attention=true"], 2, True, True, "zigzag per document"),
        ([*ENGINE, *PAIR, "parallel.cp_order=contiguous"], 2, True, True, "cp_order=zigzag"),
        ([*ENGINE, *PAIR, "model.sliding_window=512"], 2, True, True, "cp_comm_type=a2a"),
        (
            [*ENGINE, *PAIR, "model.sliding_window=512", "parallel.cp_comm_type=a2a"],
            2, True, True, None,
        ),
        (
            [*ENGINE, *PAIR, "parallel.tp=8", "parallel.cp_comm_type=a2a"],
            16, True, True, "deals 1 kv groups (per tp rank) to parallel.cp=2 ranks",
        ),
    ],
)  # fmt: skip
def test_transformer_engine(
    words: list[str], ranks: int, cuda: bool, engine: bool, expected: str | None
) -> None:
    found = [line for line in faults(words, ranks, cuda=cuda, engine=engine)
             if line.startswith("model.attention=transformer_engine")]  # fmt: skip
    if expected is None:
        assert found == []
    else:
        assert any(expected in line for line in found), found


def test_auto_takes_the_engine_where_it_can() -> None:
    def choice(*words: str, cuda: bool = True, engine: bool = True) -> AttentionBackend:
        config = configured(*BIG, *words)
        return derived.resolve_attention(config, cuda=cuda, transformer_engine=engine).value

    able = [*PAIR]
    assert choice(*able) is AttentionBackend.transformer_engine
    assert choice(*able, cuda=False) is AttentionBackend.torch
    assert choice(*able, engine=False) is AttentionBackend.torch
    assert choice(*able, "data.reset_attention=true") is AttentionBackend.torch
    assert choice("model.attention=torch") is AttentionBackend.torch


def test_derived_values() -> None:
    config = configured(*BIG, "parallel.tp=2", "train.global_batch_size=64")
    assert derived.ttt_layers(config) == [0, 6, 12, 18, 24, 30]
    assert derived.sequence_parallel(config.parallel)
    assert derived.data_parallel_size(config, 16) == 8
    assert derived.micro_batches(config, 16) == 8
    assert derived.warmup_steps(config) == 20
    assert derived.resolve_precision(config.train.precision, cuda=True) is Precision.bf16
    assert derived.resolve_precision(config.train.precision, cuda=False) is Precision.fp32
    tiny = configured(*TINY, "ttt.layers=[5,1]", "parallel.sequence_parallel=off",
                        "parallel.tp=4", "train.seq_length=1001")  # fmt: skip
    assert derived.ttt_layers(tiny) == [1, 5]
    assert derived.padded_vocab_size(tiny.model, 4) == 260
    assert derived.padded_vocab_size(tiny.model, 2) == 258
    assert derived.cp_tile(tiny) == 1
