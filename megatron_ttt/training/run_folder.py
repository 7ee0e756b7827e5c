"""A run's folder: one run writes there, and what would stop it later is found when it starts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ttt.checkpoints import run_files as files
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.run_directory import CONFIG_FILE
from megatron_ttt.config.schema import Config
from megatron_ttt.locks import Lock, Occupied, acquire
from megatron_ttt.training.distributed import Ranks
from megatron_ttt.training.resilience import on_first_rank, reason

LOCK = "writer.lock"


@contextmanager
def sole_writer(
    config: Config, ranks: Ranks, report: Callable[[str], None]
) -> Iterator[Callable[[], bool]]:
    """Hold ``run.dir`` for this run while the context is open; see :func:`first_rank_holds`.

    Raises:
        ConfigError: another run writes there, or something there cannot be written.
    """
    lock, key = Path(config.run.dir) / LOCK, ("run.dir", config.run.dir)
    with first_rank_holds(lock, ranks, report, key=key, check=lambda: check_places(config)) as ours:
        yield ours


@contextmanager
def first_rank_holds(
    path: Path,
    ranks: Ranks,
    report: Callable[[str], None],
    *,
    key: tuple[str, str],
    check: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[], bool]]:
    """Hold a lock on rank 0 while the context is open; every rank enters it and hears the same.

    Args:
        path: of the lock.
        key: the configuration key that says what is written, and its value.
        check: called on rank 0 under the lock; what it raises is raised on every rank.

    Yields:
        Whether the lock still is this process's, asked on rank 0 (elsewhere always true).

    Raises:
        ConfigError: another process holds it, or the folder cannot be written.
    """
    lock = list[Lock]()

    def take() -> None:
        lock.append(acquire(path, report))
        check()

    try:
        try:
            on_first_rank(ranks, take)
        except Occupied as error:
            raise ConfigError([Fault(*key, str(error))]) from error
        except OSError as error:
            message = f"cannot be written to ({reason(error)})"
            raise ConfigError([Fault(*key, message)]) from error
        yield lambda: not lock or lock[0].ours()
    finally:
        for held in lock:
            held.release()


def check_places(config: Config) -> None:
    """Everything a run writes must be what it is going to write, or not be there yet.

    Raises:
        ConfigError: one fault for each place that is something else.
        OSError: a folder cannot be written to.
    """
    folder, logging = Path(config.run.dir), config.logging
    root = folder / files.CHECKPOINTS
    folders = [root] + [folder / "tensorboard"] * logging.tensorboard
    names = [CONFIG_FILE, "metrics.jsonl"]
    names += ["samples.jsonl"] * logging.sample_ids + ["loss.png"] * logging.plot
    written = [folder / name for name in names]
    written += [root / files.LATEST, root / f"{files.LATEST}{files.PARTIAL}"]
    wrong = [f"{path} is not a folder" for path in folders if _there(path) and not path.is_dir()]
    wrong += [f"{path} is not a file" for path in written if _there(path) and not path.is_file()]
    for path in [] if wrong else written:
        if path.is_file() and not os.access(path, os.W_OK):
            wrong.append(f"{path} cannot be written to")
    if wrong:
        message = "move what is in the way, or choose another run.dir"
        raise ConfigError([Fault("run.dir", folder, f"{line}; {message}") for line in wrong])
    for path in folders:
        if path.is_dir():
            probe = path / f".probe.{os.getpid()}"
            probe.touch()
            probe.unlink()


def _there(path: Path) -> bool:
    """Also a link whose target is missing."""
    return path.is_symlink() or path.exists()
