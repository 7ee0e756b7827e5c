"""What is wrong with a composed training configuration on this machine."""

import os

from megatron_ttt.config.faults import Fault
from megatron_ttt.config.run_directory import run_directory_faults
from megatron_ttt.config.schema import AttentionBackend, Config, Precision
from megatron_ttt.config.validate import validate


def faults_here(config: Config, *, world_size: int) -> list[Fault]:
    """All faults that a composed configuration has on this machine.

    A dry run plans for another machine: neither devices nor folders of this one count.
    """
    if config.run.dry_run:
        faults = validate(config, world_size, cuda=True, transformer_engine=True)
    else:
        cuda = _cuda_matters(config) and _cuda_present()
        # Asked where it could be used alone: the answer takes importing it.
        matters = cuda and _transformer_engine_matters(config)
        installed = matters and _transformer_engine_present()
        faults = validate(config, world_size, cuda=cuda, transformer_engine=installed)
        if not {fault.key for fault in faults} & {"model.name", "run.name", "run.dir"}:
            faults += run_directory_faults(config)
        if not faults:
            from megatron_ttt.config.summary import memory_faults

            faults = memory_faults(config, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return faults


def _cuda_matters(config: Config) -> bool:
    """Whether a check depends on a GPU; if not, torch (seconds) need not be imported for it."""
    return (
        config.model.attention is AttentionBackend.transformer_engine
        or config.train.precision is Precision.bf16
    )


def _transformer_engine_matters(config: Config) -> bool:
    """As above, of Transformer Engine; Megatron-core (seconds) is asked for it."""
    return (
        config.model.attention is AttentionBackend.transformer_engine
        or "layernorm" in config.train.recompute_modules
    )


def _transformer_engine_present() -> bool:
    from megatron_ttt.config.to_megatron import transformer_engine_present

    return transformer_engine_present()


def _cuda_present() -> bool:
    import torch

    return torch.cuda.is_available()
