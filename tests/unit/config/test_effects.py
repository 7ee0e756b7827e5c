"""No key that a user gives is ignored in silence: the table, its sentences, its completeness."""

from typing import Any

import pytest

from megatron_ttt.config.bounds import flat_values
from megatron_ttt.config.effects import (
    TRAINING_EFFECTS,
    Condition,
    Effects,
    Else,
    given_keys,
    idle_faults,
    notices,
)
from megatron_ttt.config.load import CONFIG_DIR, compose_root, run_program, run_with_config
from megatron_ttt.config.overrides import group_options
from megatron_ttt.config.schema import Config
from megatron_ttt.evaluation.schema import EVALUATION, EVALUATION_EFFECTS, EvaluationConfig
from megatron_ttt.evaluation.tasks import TASKS
from tests.unit.config.compose import configured

# Words under which a condition on the key before them does not hold.
IDLE = {
    "ttt.mode": "ttt=off",
    "ttt.clip.mode": "ttt.clip.mode=off",
    "ttt.conv": "ttt.conv=next_token",
    "ttt.write.kind": "ttt.write.kind=plain",
    "parallel.cp": "parallel.cp=1",
    "parallel.tp": "parallel.tp=1",
    "parallel.scan": "parallel.scan=ring",
    "model.attention": "model.attention=torch",
    "model.rope.scaling": "model.rope.scaling=none",
    "data.source": "data=python_stdlib",
    "data.tokenizer.kind": "data.tokenizer.kind=bytes",
    "optimizer.schedule": "optimizer.schedule=constant",
    "optimizer.warmup_steps": "optimizer.warmup_steps=5",
    "train.recompute": "train.recompute=full",
    "train.loss_tokens": "train.loss_tokens=512",
    "train.trainable": "train.trainable=fast_layers",
    "run.resume": "run.resume=outputs/other/checkpoints/step_00000002",
    "checkpoint.keep_last": "checkpoint.keep_last=null",
    "validation.interval": "validation.interval=null",
    "logging.wandb": "logging.wandb=disabled",
    "parallel.distributed_optimizer": "parallel.distributed_optimizer=false",
}
OF_ONE_KEY = {"data.changed": "run.resume=never"}  # where another key's word would not do
# Words under which every condition holds, and every value is there.
ACTIVE = [
    "+model=qwen3_4b", "data=files", "data.path=corpus", "ttt.layers=[0]", "parallel.cp=2",
    "ttt.clip.mode=relative", "ttt.write.kind=bounded", "parallel.tp=2", "parallel.scan=auto",
    "parallel.scan_constants=f",
    "model.attention=transformer_engine", "data.tokenizer.kind=huggingface", "run.dry_run=true",
    "data.tokenizer.name=t", "optimizer.schedule=cosine", "optimizer.warmup_steps=null",
    "train.recompute=selective", "run.resume=auto", "checkpoint.load=x", "checkpoint.keep_last=2",
    "checkpoint.keep_every=10", "validation.interval=5", "logging.wandb=offline",
    "logging.wandb_entity=me",
]  # fmt: skip
CONDITIONS = [(key, condition) for key, found in TRAINING_EFFECTS.items() for condition in found]


def said(config: Any, effects: Effects, given: set[str]) -> list[str]:
    refused = [f"refused: {fault.line()}" for fault in idle_faults(config, effects, given)]
    return refused + notices(config, effects, given)


@pytest.mark.parametrize(
    ("schema", "effects"),
    [(Config, TRAINING_EFFECTS), (EVALUATION.schema, EVALUATION_EFFECTS)],
)
def test_every_key_says_what_it_depends_on(schema: Any, effects: Effects) -> None:
    """A key that is added to a schema without an entry fails here."""
    assert set(effects) == {key for key, _ in flat_values(schema())}


@pytest.mark.parametrize("scaling", ["yarn", "llama3"])
def test_where_all_conditions_hold_nothing_is_said(scaling: str) -> None:
    config = configured(*ACTIVE, f"model.rope.scaling={scaling}")
    only = {"yarn": ("low_freq_factor", "high_freq_factor"), "llama3": ("beta_fast", "beta_slow")}
    others = {f"model.rope.{name}" for name in only[scaling]}
    given = set(TRAINING_EFFECTS) - others
    assert said(config, TRAINING_EFFECTS, given) == []
    assert len(said(config, TRAINING_EFFECTS, others)) == 2


@pytest.mark.parametrize(("key", "condition"), CONDITIONS)
def test_the_table(key: str, condition: Condition) -> None:
    """Each condition that does not hold is named, for each key; not given, nothing is said."""
    scaling = "model.rope.scaling=yarn"
    idle = OF_ONE_KEY.get(key, IDLE[condition.key])
    config = configured(*ACTIVE, scaling, idle)
    (line,) = said(config, TRAINING_EFFECTS, {key})
    value = idle.rpartition("=")[2]
    if condition.otherwise is Else.REFUSE:
        assert line.startswith(f"refused: {key}=") and condition.advice in line
    else:
        assert line == f"notice: {key} has no effect with {condition.key}={value}"
    assert said(config, TRAINING_EFFECTS, set()) == []


def test_a_group_of_keys_stands_for_all_of_them() -> None:
    config = configured("+model=tiny", "ttt=off")
    assert said(config, TRAINING_EFFECTS, {"ttt.clip"}) == [
        "notice: ttt.clip.mode has no effect with ttt.mode=off",
        "notice: ttt.clip.bound has no effect with ttt.mode=off",
    ]


def test_recipes_are_not_the_users_keys() -> None:
    groups = group_options(CONFIG_DIR)
    words = ["+experiment=qwen3_4b_32k", "ttt=off", "--multirun", "optimizer=default", "run.name=a"]
    assert given_keys(words, groups) == {"run.name"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ttt.clip.bound=0.2"], ["notice: ttt.clip.bound has no effect with ttt.clip.mode=off"]),
        (
            ["parallel.scan=ring", "logging.wandb_project=p", "optimizer.lr=0.1"],
            [
                "notice: parallel.scan has no effect with parallel.cp=1",
                "notice: logging.wandb_project has no effect with logging.wandb=disabled",
            ],
        ),
        (["ttt=off"], []),
        (["--cfg", "job", "ttt=off", "ttt.eta=1"], []),
    ],
)
def test_the_program_says_it(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_with_config(lambda config, given: 0, ["+model=tiny", "run.dry_run=true", *words]) == 0
    )
    assert capsys.readouterr().err.splitlines() == expected


def test_another_corpus_than_the_one_that_is_named_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["+model=tiny", "data.path=/nonexistent/corpus"]
    assert run_with_config(lambda config, given: 0, words) == 2
    assert capsys.readouterr().err == (
        "data.path=/nonexistent/corpus: has no effect with data.source=python_stdlib:"
        " add data=files\n"
    )


@pytest.mark.parametrize("name", group_options(CONFIG_DIR)["experiment"])
def test_no_recipe_is_told_anything(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"+experiment={name}", "run.dry_run=true", "train.steps=10000"]
    assert run_with_config(lambda config, given: 0, words) == 0
    assert capsys.readouterr().err == ""


EVALUATE = ["checkpoint=nowhere"]


def test_fast_weights_are_switched_off_as_in_training() -> None:
    found = []

    def start(config: EvaluationConfig) -> int:
        found.append(config.ttt.mode.name)
        return 0

    for word in ("ttt=off", "ttt.mode=in_place"):
        assert run_program(EVALUATION, start, ["task=speed", *EVALUATE, word]) == 0
    assert found == ["off", "in_place"]


@pytest.mark.parametrize("task", list(TASKS))
def test_an_evaluation_reads_the_keys_of_its_own_task(task: str) -> None:
    config = compose_root(EVALUATION, [*EVALUATE, f"task={task}"])
    for section in TASKS:
        found = said(config, EVALUATION_EFFECTS, {section})
        if section == task:
            assert found == []
        else:
            assert found and all(line.endswith(f"has no effect with task={task}") for line in found)


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (["task=perplexity"], "seed", "seed has no effect with task=perplexity"),
        (["task=ruler", "data.path=x"], "data.path", "data.path has no effect with task=ruler"),
        (["task=speed", "ttt.mode=off"], "ttt.eta", "ttt.eta has no effect with ttt.mode=off"),
        (["task=health"], "parallel.scan", "parallel.scan has no effect with parallel.cp=1"),
        (
            ["task=ruler", "ruler.tasks=[common_words]", "ruler.haystack=f"],
            "ruler.haystack",
            "ruler.haystack has no effect with ruler.tasks=[common_words]",
        ),
    ],
)
def test_other_keys_of_an_evaluation(words: list[str], key: str, expected: str) -> None:
    config = compose_root(EVALUATION, [*EVALUATE, *words])
    if key == "ttt.eta":
        config.ttt.eta = 1.0
    assert notices(config, EVALUATION_EFFECTS, {key}) == [f"notice: {expected}"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.seq_length=1024", "ttt.chunk_size=1024"], True),
        (["train.seq_length=1000", "ttt.chunk_size=1024"], True),
        (["train.seq_length=1024", "ttt.chunk_size=1023"], False),
        (["train.seq_length=1024", "ttt.chunk_size=1024", "ttt=off"], False),
    ],
)
def test_rows_of_one_chunk_are_told(
    words: list[str], says: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that fast weights write would be read: said by the dry run as by the run."""
    for more in ([], ["run.dry_run=true"]):
        assert run_with_config(lambda config, given: 0, ["+model=tiny", *words, *more]) == 0
        told = capsys.readouterr().err
        assert ("nothing that fast weights write is ever read" in told) is says
