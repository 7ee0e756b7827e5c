"""The one reader of the variables by which a launcher tells a process its place. No torch."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_ttt.config.faults import ConfigError, Fault

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")  # where ranks meet; one process needs none
LARGEST_PORT = 65535
LARGEST_WORLD = 2**31 - 1
SLURM_TASKS = "SLURM_STEP_NUM_TASKS"  # processes that one srun started


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together.

    Attributes:
        rank: from 0 to ``world_size - 1``.
        world_size: processes of the job.
        local_rank: from 0, among the processes of this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process prints what concerns all of them."""
        return self.rank == 0


class LaunchError(ConfigError):
    """Variables of a launcher that do not fit together; every process prints its own."""


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """Return what torchrun's variables say; one process where there are none.

    Variables that a shell has kept from another launcher name a place that does not exist. They
    are refused: a process that believed them would wait for others, or keep its errors to itself.

    Args:
        environment: of the process; ``None``: its own.

    Raises:
        LaunchError: a variable is missing, is not a number or contradicts another.
    """
    environment = os.environ if environment is None else environment
    faults = list(_faults(environment))
    if faults:
        raise LaunchError(faults)
    return Launch(
        rank=int(environment.get("RANK", 0)),
        world_size=int(environment.get("WORLD_SIZE", 1)),
        local_rank=int(environment.get("LOCAL_RANK", 0)),
    )


def one_process(work: str, environment: Mapping[str, str] | None = None) -> None:
    """Raise if several processes were started for work that one does.

    Args:
        work: the beginning of the sentence, for example "a checkpoint is converted".
        environment: as in :func:`launched`.

    Raises:
        LaunchError: there are several, or the variables do not fit together.
    """
    environment = os.environ if environment is None else environment
    size = environment.get("WORLD_SIZE", "1")
    if _is_whole(size) and int(size) > 1:  # whatever else is missing beside it
        message = (
            f"{work} by one process, the job has {size}: start it without torchrun, or unset it"
        )
        raise LaunchError([Fault("WORLD_SIZE", size, message)])
    launched(environment)


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def _faults(environment: Mapping[str, str]) -> Iterator[Fault]:
    numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}  # and their values for one process
    unset = "start the processes with torchrun, or unset it"
    for name, alone in numbers.items():
        text = environment.get(name, str(alone))
        if not (_is_whole(text) and alone <= int(text) <= LARGEST_WORLD):
            message = f"must be a whole number of at least {alone}: {unset}"
            yield Fault(name, f"{text[:40]!r}", message)
            return
    rank, size, local = (int(environment.get(name, alone)) for name, alone in numbers.items())
    if "WORLD_SIZE" not in environment:
        for name, value in (("RANK", rank), ("LOCAL_RANK", local)):
            if value > 0:
                yield Fault(name, value, f"WORLD_SIZE is not set beside it: {unset}")
                return
        tasks = environment.get(SLURM_TASKS, "1")
        if _is_whole(tasks) and int(tasks) > 1 and "RANK" not in environment:
            yield Fault(
                SLURM_TASKS,
                tasks,
                "srun started these processes without RANK and WORLD_SIZE, each would do the whole"
                " work: let srun start one torchrun a node (launch/slurm/pretrain.sbatch), or unset"
                " it",
            )
        return
    for name, value in (("RANK", rank), ("LOCAL_RANK", local)):
        if value >= size:
            yield Fault(name, value, f"must be below WORLD_SIZE={size}: {unset}")
            return
    if size > 1:
        for name in ("RANK", "LOCAL_RANK", *RENDEZVOUS):
            if not environment.get(name):
                yield Fault("WORLD_SIZE", size, f"{name} is not set beside it: {unset}")
                return
        port = environment["MASTER_PORT"]
        if not (_is_whole(port) and 0 < int(port) <= LARGEST_PORT):
            message = f"must be a port, 1 to {LARGEST_PORT}: {unset}"
            yield Fault("MASTER_PORT", f"{port[:40]!r}", message)
