"""The one place where a training program meets its environment: ranks, device, process groups."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.launcher import LaunchError, launched
from megatron_ttt.config.schema import ComputeConfig, ParallelConfig
from megatron_ttt.parallel.cpu import megatron_on_cpu
from megatron_ttt.training.environment import missing_for_compilation


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and the groups it communicates in.

    Attributes:
        rank, world_size: in the whole job.
        groups: Megatron's process groups; everything below the entry point takes them from here.
        scan_group: the context-parallel ranks once more, for states alone; ``None`` with cp = 1.
        device: where tensors live.
    """

    rank: int
    world_size: int
    groups: ProcessGroupCollection
    scan_group: Any
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes logs and files that exist once."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def data_rank(self) -> int:
        """Which part of the global batch is read here."""
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        """Into how many parts the global batch is cut."""
        return self.groups.dp.size()

    def sum_over_data_and_stages(self, values: Tensor) -> Tensor:
        """In-place sum over dp, cp and pp; tensor ranks hold equal values."""
        dist.all_reduce(values, group=self.groups.dp_cp)
        dist.all_reduce(values, group=self.groups.pp)
        return values


def local_device(local_rank: int, devices: int) -> int:
    """Return the number of this process's GPU.

    Args:
        local_rank: among the processes of this machine.
        devices: GPUs that this process sees.

    Raises:
        LaunchError: there are fewer GPUs than processes.
    """
    if local_rank >= devices:
        message = f"there are {devices} GPUs here; start at most {devices} processes on a machine"
        raise LaunchError([Fault("LOCAL_RANK", local_rank, message)])
    return local_rank


@contextmanager
def model_parallel(config: ComputeConfig) -> Iterator[Ranks]:
    """Megatron's groups over an initialised ``torch.distributed``, taken down on leaving."""
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        distributed_timeout_minutes=-(-parallel.timeout_s // 60),
        create_gloo_process_groups=False,  # the optimizer is told so as well: build_trainer
    )
    scan_group = None
    try:
        model_parallel_cuda_manual_seed(config.train.seed, force_reset_rng=True)
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        groups = ProcessGroupCollection.use_mpu_process_groups()
        scan_group = _scan_group(parallel, groups)
        yield Ranks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            groups=groups,
            scan_group=scan_group,
            device=device,
        )
    finally:
        if scan_group is not None:
            dist.destroy_process_group(scan_group)
        # Megatron destroys two of its groups and forgets the others, which keep their threads.
        for group in parallel_state._global_process_group_list or []:
            if group is not None:  # the list's None stands for the whole world
                dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()


def _scan_group(parallel: ParallelConfig, groups: ProcessGroupCollection) -> Any:
    """Return a communicator of its own for the ranks of ``groups.cp``; ``None`` for a single rank.

    On NCCL what two users send through one communicator runs one after the other: a scan would
    wait for attention's keys and values, and they for it.
    """
    if parallel.cp == 1:
        return None
    generator = parallel_state.RankGenerator(
        tp=parallel.tp,
        ep=1,
        dp=groups.dp.size(),
        pp=parallel.pp,
        cp=parallel.cp,
        order="tp-cp-ep-dp-pp",  # Megatron's default
    )
    own, _ = dist.new_subgroups_by_enumeration(
        generator.get_ranks("cp"), timeout=timedelta(seconds=parallel.timeout_s)
    )
    assert dist.get_process_group_ranks(own) == dist.get_process_group_ranks(groups.cp)
    return own


@contextmanager
def distributed(config: ComputeConfig) -> Iterator[Ranks]:
    """Everything a training process needs, from torchrun's variables or as a single process.

    NCCL with a GPU, gloo without; in the latter case Megatron-core runs through
    ``parallel/cpu.py``.

    Raises:
        LaunchError: the launcher's variables do not fit together, or do not fit this machine, or
            name a place where the ranks do not meet.
        ConfigError: a node with GPUs lacks what ``torch.compile`` needs.
    """
    launch = launched()
    device = None  # to which the process group is bound
    if torch.cuda.is_available():
        lacking = missing_for_compilation()
        if lacking is not None:
            raise ConfigError([Fault("node", socket.gethostname(), lacking)])
        number = local_device(launch.local_rank, torch.cuda.device_count())
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    with megatron_on_cpu():
        try:
            dist.init_process_group(
                "gloo" if device is None else "nccl",
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timedelta(seconds=config.parallel.timeout_s),
                store=dist.HashStore() if launch.world_size == 1 else None,
                device_id=device,
            )
        except dist.DistNetworkError as error:
            reason = str(error).splitlines()[0]
            message = f"the ranks do not meet there ({reason}); is it another launcher's?"
            raise LaunchError([Fault("MASTER_ADDR", os.environ["MASTER_ADDR"], message)]) from error
        try:
            with model_parallel(config) as ranks:
                yield ranks
        finally:
            dist.destroy_process_group()
