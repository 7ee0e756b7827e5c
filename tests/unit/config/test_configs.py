"""Every file under configs/ composes, validates and says what it should."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_ttt.config import derived
from megatron_ttt.config.load import CONFIG_DIR, from_yaml, load_config, to_yaml
from megatron_ttt.config.overrides import group_options
from megatron_ttt.config.schema import (
    AttentionBackend,
    Config,
    DataSource,
    RopeScaling,
    TokenizerKind,
    TTTMode,
)
from megatron_ttt.config.validate import validate
from megatron_ttt.rule import Normalize, TargetSource
from megatron_ttt.training.schedule import lr_schedule
from tests.unit.config.compose import configured

GROUPS = group_options(CONFIG_DIR)
CORPUS = "data.path=corpus"


def faults_of(config: Config) -> list[str]:
    """Lines of the faults with one copy of the model on CPUs."""
    world_size = derived.model_parallel_size(config.parallel)
    return [fault.line() for fault in validate(config, world_size, cuda=False)]


def test_groups_and_files_are_all_known() -> None:
    # a new group or a file elsewhere would escape the tests below
    assert set(GROUPS) == {
        "ablation",
        "data",
        "experiment",
        "model",
        "optimizer",
        "parallel",
        "ttt",
    }
    known = {CONFIG_DIR / "config.yaml", CONFIG_DIR / "evaluation.yaml"}
    known |= {CONFIG_DIR / group / f"{name}.yaml" for group in GROUPS for name in GROUPS[group]}
    assert set(CONFIG_DIR.rglob("*.*")) == known


@pytest.mark.parametrize("switch", ["ttt=in_place", "ttt=off"])
@pytest.mark.parametrize("name", GROUPS["model"])
def test_every_model_alone(name: str, switch: str) -> None:
    config = load_config([f"+model={name}", CORPUS, switch])
    assert config.model.name == name
    assert faults_of(config) == []
    assert (config.ttt.mode is TTTMode.off) == (switch == "ttt=off")
    assert bool(derived.ttt_layers(config)) == (switch == "ttt=in_place")


@pytest.mark.parametrize("name", GROUPS["ablation"])
def test_every_ablation_changes_one_thing(name: str) -> None:
    plain = load_config(["+experiment=evidence_micro"])
    config = load_config(["+experiment=evidence_micro", f"+ablation={name}"])
    assert faults_of(config) == []
    key = name.split("_")[0].replace("chunk", "chunk_size")
    assert getattr(config.ttt, key) != getattr(plain.ttt, key)
    setattr(config.ttt, key, getattr(plain.ttt, key))
    assert config == plain


@pytest.mark.parametrize("switch", ["ttt=in_place", "ttt=off"])
@pytest.mark.parametrize("name", GROUPS["experiment"])
def test_every_experiment_alone(name: str, switch: str) -> None:
    config = load_config([f"+experiment={name}", CORPUS, switch])
    assert config.run.name == name
    assert faults_of(config) == []
    assert (config.ttt.mode is TTTMode.off) == (switch == "ttt=off")


@pytest.mark.parametrize(
    ("group", "name"),
    [(g, n) for g in ("data", "optimizer", "parallel", "ttt") for n in GROUPS[g]],
)
def test_every_other_file_with_a_model(group: str, name: str) -> None:
    config = load_config(
        ["+model=qwen3_0_6b", f"{group}={name}", CORPUS, "train.seq_length=8192",
         "train.steps=2000"]
    )  # fmt: skip
    assert faults_of(config) == []
    written = yaml.safe_load((CONFIG_DIR / group / f"{name}.yaml").read_text())
    section = yaml.safe_load(to_yaml(config))[group]
    for key, value in written.items():
        expected = section[key] | value if isinstance(value, dict) else value
        assert section[key] == expected, (group, name, key)


@pytest.mark.parametrize("name", GROUPS["model"] + GROUPS["experiment"])
def test_text_and_back(name: str) -> None:
    group = "model" if name in GROUPS["model"] else "experiment"
    config = load_config([f"+{group}={name}"])
    assert from_yaml(to_yaml(config)) == config


# layers, hidden, ffn, heads, kv groups, vocabulary, positions, tied: from the released config.json
RELEASED = {
    "qwen3_0_6b": (28, 1024, 3072, 16, 8, 151936, 32768, True),
    "qwen3_1_7b": (28, 2048, 6144, 16, 8, 151936, 32768, True),
    "qwen3_4b": (36, 2560, 9728, 32, 8, 151936, 32768, True),
    "qwen3_8b": (36, 4096, 12288, 32, 8, 151936, 32768, False),
    "qwen3_14b": (40, 5120, 17408, 40, 8, 151936, 32768, False),
    "llama3_1_8b": (32, 4096, 14336, 32, 8, 128256, 131072, False),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_architectures(name: str) -> None:
    model = load_config([f"+model={name}"]).model
    sizes = (model.layers, model.hidden_size, model.ffn_hidden_size, model.heads, model.kv_groups)
    assert (
        *sizes, model.vocab_size, model.max_positions, model.tied_embeddings
    ) == RELEASED[name]  # fmt: skip
    llama = name == "llama3_1_8b"
    assert model.head_dim == 128
    assert model.qk_norm is not llama
    assert model.norm_epsilon == (1e-5 if llama else 1e-6)
    assert model.rope.base == (5e5 if llama else 1e6)
    assert model.rope.scaling is (RopeScaling.llama3 if llama else RopeScaling.none)
    assert model.attention is AttentionBackend.auto


# tokens of the published recipes, and those of one step
BUDGETS = {
    "qwen3_4b_32k": (20e9, 2**22),
    "qwen3_4b_128k_yarn": (15e9, 2**22),
    "llama3_1_8b_32k": (20e9, 2**22),
    "llama3_1_8b_64k": (20.97e9, 2**22),
    "qwen3_8b_64k": (20.97e9, 2**22),
    "qwen3_14b_32k": (20e9, 2**22),
    "scratch_500m_32k": (20e9, 2**21),
    "scratch_1_5b_32k": (60e9, 2**22),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_recipes_read_the_published_tokens(name: str) -> None:
    config = load_config([f"+experiment={name}"])
    budget, tokens_per_step = BUDGETS[name]
    train = config.train
    assert train.seq_length * train.global_batch_size == tokens_per_step
    assert abs(train.steps * tokens_per_step - budget) < tokens_per_step
    lengths = {"_32k": 32768, "_64k": 65536, "_128k": 131072}
    assert train.seq_length == next(lengths[part] for part in lengths if part in name)
    scratch = name.startswith("scratch")
    assert config.ttt.target.name == ("input_embeddings" if scratch else "hidden_states")
    assert derived.warmup_steps(config) == (1024 if scratch else round(0.02 * train.steps))
    rate = {"scratch_500m_32k": 5e-4, "scratch_1_5b_32k": 3e-4}.get(name, 5e-6)
    assert config.optimizer.lr == rate
    assert derived.transformer_engine_limit(config) is None, "a recipe is for the fast kernels"


@pytest.mark.parametrize("name", ["qwen3_8b_64k", "llama3_1_8b_64k"])
def test_public_configurations(name: str) -> None:
    """Cosine to 1e-7 at 90 % of the steps, then flat; raw sums over chunks of 4096 with eta 3."""
    config = load_config([f"+experiment={name}"])
    assert (config.ttt.eta, config.ttt.chunk_size) == (3.0, 4096)
    assert (config.ttt.normalize, config.optimizer.weight_decay) == (Normalize.none, 0.1)
    assert config.model.name == name.removesuffix("_64k")
    assert config.model.rope == load_config([f"+model={config.model.name}"]).model.rope
    parameter = {"params": [], "lr": 0.0}
    schedule = lr_schedule(config, SimpleNamespace(param_groups=[parameter]))  # type: ignore
    rates = []
    for step in (100, 2300, 4500, 5000):
        schedule.step(step * 64 - schedule.num_steps)
        rates.append(parameter["lr"])
    middle = 1e-7 + (5e-6 - 1e-7) / 2
    assert rates == pytest.approx([5e-6, middle, 1e-7, 1e-7])


def test_yarn_recipe_stretches_four_times() -> None:
    rope = load_config(["+experiment=qwen3_4b_128k_yarn"]).model.rope
    assert (rope.scaling, rope.factor, rope.original_max_positions) == (
        RopeScaling.yarn, 4.0, 32768
    )  # fmt: skip
    assert rope.base == 1e6, "the delta must keep what the model says"


def test_tiny_brings_its_data_and_its_training() -> None:
    config = load_config(["+model=tiny"])
    assert config.data.source is DataSource.python_stdlib
    assert config.data.tokenizer.kind is TokenizerKind.bytes
    assert config.model.vocab_size == 258
    assert config.model.sliding_window < config.train.seq_length // 4, "or memory would not matter"
    assert config.ttt.target is TargetSource.input_embeddings
    assert config.ttt.normalize is Normalize.key_energy
    assert len(derived.ttt_layers(config)) >= 2
    assert validate(load_config(["+model=tiny", "parallel.cp=2"]), 2, cuda=False) == []


def test_the_command_line_wins() -> None:
    words = ["data=files", "data.path=corpus", "optimizer=default", "train.steps=7", "ttt=off"]
    config = load_config(["+model=tiny", *words])
    assert config.data.source is DataSource.files
    assert config.data.path == "corpus"
    assert config.train.steps == 7
    assert config.ttt.mode is TTTMode.off
    assert load_config([*words, "+model=tiny"]) == config
    assert configured("+model=tiny", *words) == config, "the shortcut of the tests beside this one"


def test_an_experiment_with_another_model() -> None:
    config = load_config(["+experiment=scratch_500m_32k", "model=qwen3_0_6b"])
    assert config.model.name == "qwen3_0_6b"
    assert config.run.name == "scratch_500m_32k"
    assert config.train.global_batch_size == 64


def test_data_path_takes_lists_and_weights() -> None:
    assert load_config(["+model=tiny", "data.path=[a,b]"]).data.path == ["a", "b"]
    weights = load_config(["+model=tiny", "data.path={a: 0.5, b/c: 2}"]).data.path
    assert weights == {"a": 0.5, "b/c": 2}


def test_nothing_is_written_by_composing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_config(["+model=tiny"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        (["+model=tiny"], 1),
        (["+model=tiny", "parallel.cp=2"], 2),
        (["+model=qwen3_4b", CORPUS, "parallel.tp=2", "parallel.cp=4"], 8),
        (["+model=qwen3_4b", CORPUS, "parallel.cp=4"], 8),
        (["+experiment=qwen3_4b_32k", CORPUS], 8),
        (["+experiment=qwen3_4b_32k", CORPUS], 128),
    ],
)
def test_the_commands_that_the_documents_show(words: list[str], world_size: int) -> None:
    assert validate(load_config(words), world_size, cuda=False) == []
