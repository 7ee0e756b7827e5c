"""Every key takes every value or refuses it in one line: never a traceback or a later failure."""

import copy
import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from megatron_ttt.config.bounds import RULE_BOUNDS, TRAINING_BOUNDS
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.load import (
    CONFIG_DIR,
    PRETRAINING,
    Root,
    check,
    config_of,
    load_config,
    register_schema,
    run_with_config,
)
from megatron_ttt.config.overrides import as_typed, check_overrides
from megatron_ttt.config.reading import ReadingRule, rule_faults
from megatron_ttt.config.schema import Config
from megatron_ttt.config.summary import memory_faults, summarize
from megatron_ttt.evaluation.schema import EVALUATION, EVALUATION_BOUNDS, evaluation_faults
from tests.unit.config.compose import configured

EDGES = [
    "0", "-1", "1", "2147483648", "9223372036854775808", "100000000000000000000", "1" + "0" * 400,
    "nan", "inf", "-inf", "1e38", "1e-400", "-0.0", "1.5", "1e3", "007", "1_000", "0x10", "'5'",
    "''", "' '", "'\t'", "'a\nb'", "a/b", "..", "'../..'", "ü", "'\u202e'", "x" * 300, "x/" * 3000,
    "null", "yes", "no", "on", "off", "true", "[1]", "[]", "[???,???]", "[a,null]", "[[1]]",
    "{a:1}", "{}", "{a:nan}", "'${nope}'", "'${oc.env:NOPE}'", "'${seed}'", "'${train}'",
    "'${run.name}'", "???", "'1,2,3'", "'nan,1,0'", "'{x'", "a%b", "hf:nowhere", "",
]  # fmt: skip


def keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a schema, groups of keys among them, with their types."""
    for name, annotation in typing.get_type_hints(schema).items():
        yield f"{prefix}{name}", annotation
        if dataclasses.is_dataclass(annotation):
            yield from keys(annotation, f"{prefix}{name}.")


TRAINING_KEYS = [key for key, _ in keys(Config)]
EVALUATION_KEYS = [key for key, _ in keys(EVALUATION.schema)]
PLAIN: list[tuple[Root[Any], list[str]]] = [
    (PRETRAINING, ["+model=tiny"]),
    (EVALUATION, ["task=speed", "checkpoint=nowhere"]),
]


@pytest.fixture(scope="module")
def composed() -> dict[str, DictConfig]:
    found = {}
    for root, words in PLAIN:
        register_schema(root)
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            found[root.name] = compose(root.name, overrides=words)
    return found


def outcome(word: str, root: Root[Any], composed: DictConfig) -> list[Fault]:
    """The faults of one word more, by what a command line goes through.

    Composition is that of the words before; test_configs.py holds this form equal to Hydra's.
    """
    groups = root.groups(CONFIG_DIR)
    if faults := check_overrides([word], groups, schema=root.schema):
        return faults
    override = OverridesParser.create().parse_override(as_typed([word], root.schema)[0])
    if override.key_or_group in groups:
        return []
    try:
        changed = copy.deepcopy(composed)
        OmegaConf.update(changed, override.key_or_group, override.value())
        config = config_of(changed, root)
        if root is EVALUATION:
            return evaluation_faults(config)
        check(config, world_size=1)
        summarize(config, 1)
    except ConfigError as error:
        return list(error.faults)
    return []


def lines_of(faults: list[Fault]) -> list[str]:
    lines = [fault.line() for fault in faults]
    for line in lines:
        assert len(line.splitlines()) == 1 and len(line) < 1300, line
    assert len(lines) <= 4 and len(set(lines)) == len(lines), lines
    return lines


@settings(max_examples=120, deadline=None)
@given(key=st.sampled_from(TRAINING_KEYS), value=st.sampled_from(EDGES))
@example(key="model.rope", value="'${run.name}'")
@example(key="run", value="'${train}'")
@example(key="ttt.layers", value="[[1]]")
@example(key="run.dir", value="x" * 300)
@example(key="run.name", value="x/" * 3000)
@example(key="ttt.eta", value="1" + "0" * 400)
@example(key="data.split", value="'nan,1,0'")
@example(key="model.layers", value="0")
@example(key="model.heads", value="-1")
def test_any_value_of_any_training_key(
    composed: dict[str, DictConfig], key: str, value: str
) -> None:
    lines_of(outcome(f"{key}={value}", PRETRAINING, composed["config"]))


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from(EVALUATION_KEYS), value=st.sampled_from(EDGES))
@example(key="ruler.lengths", value="[[1]]")
@example(key="ruler.lengths", value="[???,???]")
@example(key="ttt.clip", value="'${data}'")
def test_any_value_of_any_evaluation_key(
    composed: dict[str, DictConfig], key: str, value: str
) -> None:
    lines_of(outcome(f"{key}={value}", EVALUATION, composed["evaluation"]))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.seed=100000000000000000000", "must be at most 4294967295"),
        ("train.seed=4294967296", "must be at most 4294967295"),
        ("train.steps=9223372036854775808", "must be at most 2147483647"),
        ("optimizer.lr=1e38", "must be at most 1000"),
        ("optimizer.lr=inf", "must be at most 1000"),
        ("optimizer.weight_decay=1e38", "must be at most 1000"),
        ("ttt.clip.bound=inf", "must be at most 1e+30"),
        ("parallel.timeout_s=9223372036854775808", "must be at most 2147483647"),
        ("data.workers=100000", "must be at most 1024"),
        ("model.max_positions=1099511627776", "must be at most 2147483647"),
        ("train.micro_batch_size=4000000", "is 4096000000 tokens in a micro-batch, at most 2147"),
        ("logging.wandb_project=a/b", "must be at most 128 characters without any of /"),
        ("logging.wandb_entity='a#b'", "must be at most 128 characters without any of /"),
        ("run.resume=no", "must be never, auto or the path of a checkpoint folder; did you mean"),
        ("run.resume=off", "did you mean never?"),
        ("run.resume=False", "did you mean never?"),
        ("run.name=", "must not be empty"),
        ("run.name=' '", "must not be empty"),
        ("checkpoint.load=''", "must not be empty"),
        ("run.name=..", "give run.dir for another"),
        ("data.path=[]", "must be the prefix of a .bin/.idx pair, a list of prefixes, or"),
        ("data.path={a:nan}", "a weight must be a number above 0"),
        ("data.path=[a,a]", "names a prefix twice"),
        ("data.split='nan,1,0'", "must be three shares"),
    ],
)  # fmt: skip
def test_values_that_would_fail_later(
    composed: dict[str, DictConfig], word: str, expected: str
) -> None:
    found = lines_of(outcome(word, PRETRAINING, composed["config"]))
    (line,) = [line for line in found if not line.startswith("train.global_batch_size")]
    key, _, value = word.partition("=")
    assert line.startswith(f"{key}=") and expected in line
    assert value.startswith(("'", "{", "[")) or value[:8] in line or "e" in value or value == "inf"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("run.name=1e3", "1e3"),
        ("run.name=007", "007"),
        ("run.name=on", "on"),
        ("data.cache_dir=1_0", "1_0"),
        ("data.path=5e1", "5e1"),
        ("data.cache_dir=null", None),
        ("run.name='a b'", "a b"),
    ],
)
def test_text_is_taken_as_it_is_typed(word: str, expected: str | None) -> None:
    config = load_config(["+model=tiny", word])
    section, key = word.split("=")[0].split(".")
    assert getattr(getattr(config, section), key) == expected


def test_text_is_taken_as_it_is_typed_in_a_sweep() -> None:
    words = ["run.name=1e3,b,2", "train.steps=1,2", "run.name='a,b'", "ttt.layers=[1,2]"]
    assert as_typed(words, Config) == ["run.name='1e3',b,'2'", *words[1:]]


def test_the_programs_path(capsys: pytest.CaptureFixture[str]) -> None:
    """The same through the program itself: exit status 2 and one line."""
    for word in ("train.seed=100000000000000000000", "run.name=", "model.rope='${run.name}'"):
        assert (
            run_with_config(lambda config, given: 0, ["+model=tiny", "run.dry_run=true", word]) == 2
        )
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith(word.split("=")[0])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--multrun", "--multrun=: did you mean --multirun? no such option; write KEY=VALUE"),
        ("-x", "-x=: no such option"),
        ("--cfg", "--cfg=train.steps=1: must be job, hydra or all"),
    ],
)
def test_flags_that_hydra_does_not_have(
    word: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with_config(lambda config, given: 0, ["+model=tiny", word, "train.steps=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(expected) and captured.err.count("\n") == 1


def test_every_number_has_a_bound() -> None:
    """A key that is added without one fails here."""
    for schema, bounds in ((Config, TRAINING_BOUNDS), (EVALUATION.schema, EVALUATION_BOUNDS)):
        for key, annotation in keys(schema):
            numbers = {int, float} & {annotation, *typing.get_args(annotation)}
            for arm in typing.get_args(annotation):
                numbers |= {int, float} & set(typing.get_args(arm))
            assert bool(numbers) == (key in bounds), key


def test_the_rule_of_a_checkpoint_has_the_same_bounds() -> None:
    for key in RULE_BOUNDS:
        rule = ReadingRule()
        part: Any = rule.clip if "clip" in key else rule
        setattr(part, key.rpartition(".")[2], math.inf)
        (fault,) = rule_faults(rule)
        assert fault.key == key


def test_what_no_machine_holds() -> None:
    config = configured("+model=qwen3_4b", "train.micro_batch_size=512", "data.path=corpus")
    lines = [fault.line() for fault in memory_faults(config, 10**9)]
    assert lines == [
        "model.name=qwen3_4b: its weights are 8 GB on each rank, this machine has 1 GB",
        "train.micro_batch_size=512: with train.seq_length=32768 the logits of a micro-batch are"
        " 5,098 GB on each rank, this machine has 1 GB",
    ]
    assert memory_faults(config, 10**13) == []
