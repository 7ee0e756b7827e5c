"""The grammar of the programs of ``tools/``: words ``key=value`` into a dataclass of keys.

    python tools/PROGRAM.py [COMMAND] [FILE ...] key=value ...

Words are checked and typed as those of ``launch/pretrain.py``: every mistake is one line that names
the key, the value and what would be valid, exit status 2. Texts and paths are taken as they are
typed, without quotes of their own. Options with dashes, an earlier spelling, are translated with
one line of warning. No torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Generic, TypeVar

from omegaconf import OmegaConf

from megatron_ttt.config.bounds import Bound, bound_faults, flat_values, text_complaint
from megatron_ttt.config.effects import ALWAYS, Effects
from megatron_ttt.config.faults import ConfigError, Fault, show, suggest
from megatron_ttt.config.launcher import LaunchError, launched, one_process
from megatron_ttt.config.load import Root, config_of, tell_idle_keys
from megatron_ttt.config.overrides import check_overrides, parsed_value, strip_optional

MISTAKE = 2  # exit status of a user's mistake
Keys = TypeVar("Keys")


@dataclass(frozen=True)
class Command(Generic[Keys]):
    """One command of a program.

    Attributes:
        keys: the dataclass of its keys; the comments behind them say what they mean.
        run: of the checked keys; returns the exit status.
        bounds: of the numbers.
        effects: conditions of keys; a key without one always acts.
        files: the key, a list, that takes the words without ``=``.
        passes: the key, a list, that takes the words of the configuration of a training run.
        old: earlier spellings: ``{"--flag": "key"}``, or whole words,
            ``{"--flag=value": "key=value"}``; ``--some-key`` of ``some_key`` needs no entry.
        old_places: the keys that words without ``=`` were for, in order.
        alone: the beginning of the sentence that refuses several processes; empty: they may be.
    """

    keys: type[Keys]
    run: Callable[[Keys], int]
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    effects: Effects = field(default_factory=dict)
    files: str | None = None
    passes: str | None = None
    old: Mapping[str, str] = field(default_factory=dict)
    old_places: Sequence[str] = ()
    alone: str = ""

    def read(self, words: Sequence[str]) -> Keys:
        """Return the checked keys of a command line in today's spelling.

        Raises:
            ConfigError: with every fault.
        """
        types = key_types(self.keys)
        texts, lists, rest = self._sort(words, types)
        stand_ins = [f"{key}=x" for key in texts]
        if faults := check_overrides([*stand_ins, *rest], {}, schema=self.keys):
            raise ConfigError(faults)
        composed = OmegaConf.structured(self.keys)
        for word in [*stand_ins, *rest]:
            key, value = parsed_value(word)
            OmegaConf.update(composed, key, value)
        for key in lists:
            OmegaConf.update(composed, key, [])
        root = self._root()
        config = config_of(composed, root)
        faults = [*_path_faults(texts, lists, types), *bound_faults(config, self.bounds)]
        if faults:
            raise ConfigError(faults)
        for key, text in texts.items():
            kind = strip_optional(types[key])
            _set(config, key, None if text == "null" and kind != types[key] else kind(text))
        for key, members in lists.items():
            (kind,) = typing.get_args(types[key])
            _set(config, key, [kind(text) for text in members])
        tell_idle_keys(root, config, [*stand_ins, *rest, *(f"{key}=x" for key in lists)])
        return config

    def _root(self) -> Root[Keys]:
        effects = {key: self.effects.get(key, ALWAYS) for key, _ in flat_values(self.keys())}
        return Root("", self.keys, "", grouped=False, effects=effects, faults=lambda config: [])

    def _sort(
        self, words: Sequence[str], types: Mapping[str, Any]
    ) -> tuple[dict[str, str], dict[str, list[str]], list[str]]:
        """Return texts by key, lists of texts by key, and the other words."""
        texts: dict[str, str] = {}
        lists: dict[str, list[str]] = {}
        rest: list[str] = []
        for word in words:
            key, equals, value = word.partition("=")
            if key == "ttt" and "ttt.mode" in types:  # ttt=off, as everywhere
                key = "ttt.mode"
            kind = types.get(key)
            if kind is None and self.passes is not None and equals:
                lists.setdefault(self.passes, []).append(word)
            elif self.files is not None and (not equals or _is_file(word, kind)):
                lists.setdefault(self.files, []).append(word)
            elif not equals:
                raise ConfigError([Fault(word, "", "write KEY=VALUE (--help lists the keys)")])
            elif key.startswith("hydra"):  # which the check of overrides passes over
                raise ConfigError([Fault(key, value, f"no such key; there are {', '.join(types)}")])
            elif strip_optional(kind) in (str, Path):
                texts[key] = value
            elif kind in (list[str], list[Path]):
                lists.setdefault(key, []).append(value)
            elif _is_list(kind) and value not in ("", "null") and value[0] != "[":
                rest.append(f"{key}=[{value}]")
            else:
                rest.append(f"{key}={value}")
        return texts, lists, rest

    def modern(self, words: Sequence[str]) -> tuple[list[str], str]:
        """Return the words in today's spelling, and a line of warning if some were not.

        Raises:
            ConfigError: an option that there never was, or one without its value.
        """
        types, left = key_types(self.keys), list(words)
        places = [key for key in self.old_places if not any(w.startswith(f"{key}=") for w in words)]
        new: list[str] = []
        replaced: list[tuple[str, str]] = []
        while left:
            word = left.pop(0)
            if word.startswith("--"):
                made = self._translated(word, left, types)
            elif "=" not in word and self.files is None and places:
                made = f"{places.pop(0)}={word}"
            else:
                new.append(word)
                continue
            key = made.partition("=")[0]
            option = word.partition("=")[0] if word.startswith("--") else "words without KEY="
            replaced.append((option, made if len(made) < 60 else f"{key}=..."))
            new.append(made)
        warning = ""
        if replaced:
            before, after = zip(*replaced, strict=True)
            options = ", ".join(dict.fromkeys(before))
            warning = f"warning: write {' '.join(after)} (the next release refuses {options})"
        return _joined_lists(new, types), " ".join(warning.split())

    def _translated(self, word: str, left: list[str], types: Mapping[str, Any]) -> str:
        """Return an option as ``key=value``; its value is taken from ``left`` if it is there."""
        flag, equals, value = word.partition("=")
        key = self.old.get(flag, flag.removeprefix("--").replace("-", "_"))
        whole = {known.partition("=")[0] for known in self.old if "=" in known}
        if key not in types and flag not in whole:
            names = [f"--{name.replace('_', '-')}" for name in types]
            hint = suggest(flag, names).replace("--", "").replace("-", "_")
            message = f"no such option; {hint}write KEY=VALUE (--help lists the keys)"
            raise ConfigError([Fault(word, "", message)])
        kind = strip_optional(types.get(key))
        if not equals and kind is bool and flag not in whole:
            return f"{key}=true"
        if not equals:
            if not left:
                raise ConfigError([Fault(flag, "", f"has no value; write {key}=VALUE")])
            value = left.pop(0)
        if flag in whole:
            found = self.old.get(f"{flag}={value}")
            if found is None:
                valid = [known for known in self.old if known.startswith(f"{flag}=")]
                raise ConfigError([Fault(flag, value, f"must be one of {', '.join(valid)}")])
            return found
        if kind == list[int]:
            while left and left[0].isdigit():
                value = f"{value},{left.pop(0)}"
            value = f"[{'' if value == 'none' else value}]"
        return f"{key}={value}"


def run_command(
    argv: Sequence[str], commands: Command[Any] | Mapping[str, Command[Any]], about: str | None
) -> int:
    """Run a program of one command, or the command that the first word names.

    Args:
        argv: the arguments without the program's name.
        commands: one, or several by name.
        about: the program's docstring, which ``--help`` prints.

    Returns:
        The exit status; 2 for a mistake of the user, printed to stderr by the first rank.
    """
    try:
        words = list(argv)
        wants_help = any(word in ("--help", "-h") for word in words)
        if isinstance(commands, Mapping):
            name = next((word for word in words if word in commands), None)
            if wants_help and name is None:
                print(f"{(about or '').strip()}\n\ncommands (COMMAND --help lists its keys):")
                print("\n".join(f"  {n:<18}{_first_line(c.keys)}" for n, c in commands.items()))
                return 0
            if not words or name != words[0]:
                valid, given = ", ".join(commands), words[0] if words else "???"
                message = f"{suggest(given, commands)}must be given first, one of {valid}"
                raise ConfigError([Fault("COMMAND", given, message)])
            command, words = commands[words.pop(0)], words
        else:
            command = commands
        if wants_help:
            print("\n".join(_help(command, about)))
            return 0
        if command.alone:
            one_process(command.alone)
        is_first = launched().is_first
        words, warning = command.modern(words)
        keys = command.read(words)
        if warning and is_first:
            print(warning, file=sys.stderr)
        return command.run(keys)
    except ValueError as error:
        return tell(error)


def tell(error: ValueError | OSError) -> int:
    """Print a user's mistake to stderr, a line each, on the first rank; return the exit status.

    What is wrong with a process's own place among the others every process prints.
    """
    try:
        speaks = launched().is_first or isinstance(error, LaunchError)
    except LaunchError:
        speaks = True
    if speaks:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if not isinstance(error, ConfigError):
            lines = [f"error: {lines[0]}"]
        print("\n".join(lines), file=sys.stderr)
    return MISTAKE


def key_types(keys: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every dotted key of a dataclass, those of nested ones included."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(keys).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= key_types(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = kind
    return found


def _is_list(kind: Any) -> bool:
    return typing.get_origin(strip_optional(kind)) is list


def _is_file(word: str, kind: Any) -> bool:
    """Whether a word with ``=`` names a file rather than a key."""
    return kind is None and ("/" in word.partition("=")[0] or Path(word).exists())


def _joined_lists(words: Sequence[str], types: Mapping[str, Any]) -> list[str]:
    """Return the words with a list of numbers that was given in several as one."""
    joined: dict[str, str] = {}
    rest = []
    for word in words:
        key, _, value = word.partition("=")
        if strip_optional(types.get(key)) == list[int] and value.startswith("["):
            before = joined.get(key)
            joined[key] = value if before is None else f"{before[:-1]},{value[1:]}"
        else:
            rest.append(word)
    return [*rest, *(f"{key}={value}" for key, value in joined.items())]


def _path_faults(
    texts: Mapping[str, str], lists: Mapping[str, list[str]], types: Mapping[str, Any]
) -> Iterator[Fault]:
    """Yield faults of names and paths; the members of a list of texts may be any."""
    named = [(key, text) for key, text in texts.items()]
    named += [(key, text) for key in lists if types[key] == list[Path] for text in lists[key]]
    for key, text in named:
        complaint = text_complaint(text)
        if complaint is not None:
            yield Fault(key, text, complaint)


def _set(config: Any, key: str, value: Any) -> None:
    *path, name = key.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, name, value)


def _first_line(keys: type) -> str:
    return (keys.__doc__ or "").strip().splitlines()[0]


def _help(command: Command[Any], about: str | None) -> Iterator[str]:
    """Yield the docstrings and a line for each key, with the comment behind it."""
    yield f"{(about or '').strip()}\n\n{_first_line(command.keys)}\n"
    meanings, types = _meanings(command.keys), key_types(command.keys)
    for key, value in flat_values(command.keys()):
        if key == command.passes:
            continue
        default = "..." if value == "???" else show(value)
        kind, meaning = strip_optional(types[key]), meanings.get(key, "")
        if isinstance(kind, type) and issubclass(kind, Enum):
            meaning = f"{', '.join(kind.__members__)}; {meaning}".rstrip("; ")
        yield f"  {f'{key}={default}':<32} {meaning}".rstrip()


def _meanings(keys: type) -> dict[str, str]:
    """Return the comment behind each key, also of nested and inherited ones."""
    found: dict[str, str] = {}
    for owner in reversed(keys.__mro__[:-1]):
        found |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(owner), re.MULTILINE)
    for name, kind in typing.get_type_hints(keys).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= {f"{name}.{inner}": text for inner, text in _meanings(kind).items()}
    return found
