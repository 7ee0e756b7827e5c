"""From a command line to a checked :class:`Config`, and the wrapper of the programs that need one.

Hydra composes ``configs/`` with the overrides; every mistake is reported as one line and exit
status 2, before anything is written and before torch is imported.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_ttt.config.derived import model_parallel_size, unread_writes
from megatron_ttt.config.effects import (
    TRAINING_EFFECTS,
    Effects,
    given_keys,
    idle_faults,
    notices,
)
from megatron_ttt.config.faults import ConfigError, Fault, suggest
from megatron_ttt.config.here import faults_here
from megatron_ttt.config.launcher import LaunchError, launched
from megatron_ttt.config.overrides import (
    as_typed,
    check_overrides,
    group_options,
    missing_key,
    missing_model,
    shape_faults,
)
from megatron_ttt.config.schema import Config

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
HYDRA_VERSION = "1.3"  # of Hydra's behaviour, not of the package
# Hydra's flags that print something and compose no run.
_INFORMING_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--info", "-i")
_FLAGS = (
    *_INFORMING_FLAGS,
    *("--cfg", "-c", "--resolve", "--package", "-p", "--multirun", "-m", "--run", "-r"),
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"),
    *("--shell-completion", "-sc", "--experimental-rerun"),
)


AnyConfig = TypeVar("AnyConfig")


@dataclass(frozen=True)
class Root(Generic[AnyConfig]):
    """A root file of ``configs/`` and the dataclass that owns its keys.

    Attributes:
        name: of the file, without its ending.
        schema: the dataclass.
        schema_name: by which the file's ``defaults`` refer to it.
        grouped: whether the folders of ``configs/`` are groups of this root.
        effects: under which other keys each of its keys has an effect.
        faults: what types cannot say of its keys.
        shorts: keys that stand for another.
    """

    name: str
    schema: type[AnyConfig]
    schema_name: str
    grouped: bool
    effects: Effects
    faults: Callable[[AnyConfig], list[Fault]]
    shorts: Mapping[str, str] = field(default_factory=dict)

    def full(self, word: str) -> str:
        """Return a word of the command line with its key written out."""
        key, equals, value = word.partition("=")
        is_short = key in self.shorts and not value.startswith("{")
        return f"{self.shorts[key]}{equals}{value}" if is_short else word

    def groups(self, config_dir: Path) -> dict[str, list[str]]:
        """Return the groups with the names of their files; none where the folders mean nothing."""
        return group_options(config_dir) if self.grouped else {}


def load_config(overrides: Sequence[str], *, config_dir: Path = CONFIG_DIR) -> Config:
    """Return the composed configuration of a training run, complete, typed, not yet validated.

    Args:
        overrides: in Hydra's grammar, for example ``["+model=tiny", "train.steps=10"]``.
        config_dir: folder of ``config.yaml`` and its groups.

    Raises:
        ConfigError: an unknown key, option or value, or no model; every one of them listed.
    """
    return compose_root(PRETRAINING, overrides, config_dir=config_dir)


def compose_root(
    root: Root[AnyConfig], overrides: Sequence[str], *, config_dir: Path = CONFIG_DIR
) -> AnyConfig:
    """Return what :func:`load_config` does, for any root file.

    Raises:
        ConfigError: an unknown key, option or value, or a missing one; every one of them listed.
    """
    faults = check_overrides(overrides, root.groups(config_dir), schema=root.schema)
    if faults:
        raise ConfigError(faults)
    register_schema(root)
    try:
        with initialize_config_dir(str(config_dir.resolve()), version_base=HYDRA_VERSION):
            composed = compose(root.name, overrides=as_typed(overrides, root.schema))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([_hydra_fault(error, overrides)]) from error
    return config_of(composed, root, config_dir=config_dir)


def config_of(
    composed: DictConfig, root: Root[AnyConfig], *, config_dir: Path = CONFIG_DIR
) -> AnyConfig:
    """Return the dataclass of what Hydra composed.

    Raises:
        ConfigError: a missing value (of a run: no model), or an interpolation that cannot be
            resolved.
    """
    if "model" in root.groups(config_dir) and OmegaConf.is_missing(composed.model, "name"):
        raise ConfigError([missing_model(config_dir)])
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            lacking = dict.fromkeys(missing_key(key, root.schema) for key in missing)
            raise ConfigError(list(lacking))
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError([_hydra_fault(error, [])]) from error
    assert isinstance(config, root.schema)
    if faults := shape_faults(config):
        raise ConfigError(faults)
    return config


def register_schema(root: Root[Any]) -> None:
    """Make the dataclasses known to Hydra under the name that the root file refers to."""
    ConfigStore.instance().store(name=root.schema_name, node=root.schema)


def to_yaml(config: Config) -> str:
    """Return the configuration as text: what a run keeps in ``config.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def from_yaml(text: str) -> Config:
    """Return the inverse of :func:`to_yaml`.

    Raises:
        ConfigError: the text does not fit the schema.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
    except OmegaConfBaseException as error:
        raise ConfigError([_hydra_fault(error, [])]) from error
    assert isinstance(merged, DictConfig)
    return config_of(merged, PRETRAINING)


def check(config: Config, *, world_size: int) -> None:
    """Raise if a composed configuration cannot run; see :func:`faults_here`.

    Raises:
        ConfigError: with every fault.
    """
    if faults := faults_here(config, world_size=world_size):
        raise ConfigError(faults)


def training_ranks(config: Config) -> int:
    """Return this job's processes; for a dry run without torchrun those of one model."""
    world_size = launched().world_size
    if config.run.dry_run and world_size == 1:
        return model_parallel_size(config.parallel)
    return world_size


PRETRAINING = Root(
    "config",
    Config,
    "schema",
    grouped=True,
    effects=TRAINING_EFFECTS,
    faults=lambda config: faults_here(config, world_size=training_ranks(config)),
)


def tell_idle_keys(root: Root[AnyConfig], config: AnyConfig, words: Sequence[str]) -> None:
    """Print a line to stderr, on the first rank, for each key of ``words`` that has no effect.

    Args:
        root: of the configuration.
        config: valid.
        words: the command line.

    Raises:
        ConfigError: a key without effect by which the user asked for something else.
    """
    given = given_keys(words, root.groups(CONFIG_DIR))
    if faults := idle_faults(config, root.effects, given):
        raise ConfigError(faults)
    if launched().is_first:
        for notice in notices(config, root.effects, given):
            print(notice, file=sys.stderr)


def describe(config: Config, *, world_size: int) -> str:
    """Return the dry run's text: the resolved configuration and what it amounts to."""
    from megatron_ttt.config.summary import summarize

    return f"{to_yaml(config)}\n{summarize(config, world_size)}"


def run_with_config(
    main: Callable[[Config, Collection[str]], int | None],
    argv: Sequence[str],
    *,
    said: Sequence[str] = (),
    look: Callable[[Config, Collection[str]], Sequence[str]] = lambda config, given: (),
    config_dir: Path = CONFIG_DIR,
) -> int:
    """Run ``main`` with the checked configuration of a training run that ``argv`` describes.

    As :func:`run_program`; ``run.dry_run=true`` prints what would be built instead of running
    ``main``.

    Args:
        main: the program, of the configuration and the dotted keys that the user gave; ``None``
            counts as success.
        argv: the arguments without the program's name.
        said: words that nobody typed and that those of ``argv`` overrule.
        look: what a dry run says, or refuses, of the checkpoint that a run would start from.
        config_dir: folder of ``config.yaml`` and its groups.
    """

    def start(config: Config) -> int:
        notice = unread_writes(config)
        if notice is not None and launched().is_first:
            print(notice, file=sys.stderr)
        given = given_keys(argv, PRETRAINING.groups(config_dir))
        if config.run.dry_run:
            if launched().is_first:
                for line in look(config, given):
                    print(line, file=sys.stderr)
                print(describe(config, world_size=training_ranks(config)))
            return 0
        return main(config, given) or 0

    return run_program(PRETRAINING, start, argv, said=said, config_dir=config_dir)


def run_program(
    root: Root[AnyConfig],
    start: Callable[[AnyConfig], int],
    argv: Sequence[str],
    *,
    said: Sequence[str] = (),
    config_dir: Path = CONFIG_DIR,
) -> int:
    """Run ``start`` with the checked configuration that ``argv`` describes.

    Hydra's own flags work: ``--cfg job`` prints the configuration, ``--help`` the choices,
    ``--multirun`` sweeps. ``said``: words that nobody typed, overruled by ``argv``.

    Returns:
        The exit status: that of ``start``; 2 for a mistake of the user, which rank 0 has
        printed to stderr, one line per fault; what is wrong with a process's own place among the
        others (``launcher.py``) every process has printed.
    """
    try:
        launch = launched()
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 2

    argv = [root.full(word) for word in argv]

    def checked(config: AnyConfig) -> int:
        if faults := root.faults(config):
            raise ConfigError(faults)
        tell_idle_keys(root, config, argv)
        return start(config)

    try:
        if any(word.startswith("-") for word in argv):
            return _run_with_flags(root, checked, [*said, *argv], config_dir=config_dir)
        return checked(compose_root(root, [*said, *argv], config_dir=config_dir))
    except ConfigError as error:
        if launch.is_first or isinstance(error, LaunchError):
            print(error, file=sys.stderr)
        return 2


def _run_with_flags(
    root: Root[AnyConfig],
    start: Callable[[AnyConfig], int],
    argv: Sequence[str],
    *,
    config_dir: Path,
) -> int:
    """Hands the command line to Hydra itself, after our own look at it."""
    if faults := list(_flag_faults(argv)):
        raise ConfigError(faults)
    # Hydra's parser takes overrides in one piece only
    argv = sorted(argv, key=lambda word: not word.startswith(("-", "~")) and "=" in word)
    if not any(flag in argv for flag in _INFORMING_FLAGS):
        words = [word for word in argv if "=" in word or word.startswith("~")]
        groups = root.groups(config_dir)
        if "--multirun" not in argv and "-m" not in argv:
            compose_root(root, words, config_dir=config_dir)
        elif faults := check_overrides(words, groups, schema=root.schema, sweep=True):
            raise ConfigError(faults)
        typed = dict(zip(words, as_typed(words, root.schema), strict=True))
        argv = [typed.get(word, word) for word in argv]
    statuses: list[int] = []
    faults_of_jobs: list[Fault] = []

    def task(composed: DictConfig) -> None:
        try:
            statuses.append(start(config_of(composed, root, config_dir=config_dir)))
        except ConfigError as error:  # Hydra would print a traceback
            faults_of_jobs.extend(error.faults)

    register_schema(root)
    run = hydra.main(
        version_base=HYDRA_VERSION, config_path=str(config_dir.resolve()), config_name=root.name
    )(task)
    previous = sys.argv
    sys.argv = [previous[0], *argv]  # the only place where Hydra looks
    try:
        run()
    finally:
        sys.argv = previous
    if faults_of_jobs:
        raise ConfigError(faults_of_jobs)
    return max(statuses, default=0)


def _flag_faults(argv: Sequence[str]) -> Iterator[Fault]:
    """Yield flags that Hydra does not have; its own parser would answer with its usage."""
    for word, value in zip(argv, [*argv[1:], ""], strict=True):
        flag = word.partition("=")[0]
        if word.startswith("-") and flag not in _FLAGS:
            message = "no such option; write KEY=VALUE, or one of " + ", ".join(_FLAGS)
            yield Fault(word, "", f"{suggest(flag, _FLAGS)}{message}")
        elif word in ("--cfg", "-c") and value not in ("job", "hydra", "all"):
            yield Fault(word, value, "must be job, hydra or all")


def _hydra_fault(error: Exception, overrides: Sequence[str]) -> Fault:
    """Return a mistake that only the composition shows, in one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip().splitlines()
    key = getattr(cause, "full_key", None) or "configuration"
    value: Any = " ".join(overrides) if key == "configuration" else ""
    return Fault(str(key), value, text[0][:200] if text else type(cause).__name__)
