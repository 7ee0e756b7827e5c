"""Keeps messages off the terminal that a user of this project can do nothing about.

Megatron-core warns about optional packages when it is imported, about modules that it does not
know, and calls functions that torch has renamed. Each silenced message is one line of the table
with its reason; everything else passes.
"""

import logging
import warnings

SILENCED_WARNINGS = (
    # message (start, regular expression), why it says nothing a user can act on
    ("Transformer Engine and Apex are not installed", "optional; the dry run names the backend"),
    ("Apex is not installed", "optional, as above"),
    ("full scope is deprecated", "about CUDA graphs, which this project refuses"),
    (r"`torch.distributed.\w+` is deprecated", "called by Megatron-core, renamed in torch"),
    (r"The \.grad attribute of a Tensor that is not a leaf", "Megatron-core looks for it"),
    ("`is_compiling` is deprecated", "called by Megatron-core, renamed in torch"),
    ("`load_state_dict` is deprecated", "called by Megatron-core, renamed in torch"),
    ("torch.distributed is disabled", "each rank reads the common state of a checkpoint alone"),
    ("The argument order of load has been changed", "called by Megatron-core"),
    ("MimoModelConfig is experimental", "imported by Megatron-core, not used here"),
)
SILENCED_LOGS = (
    # logger, start of the message, why
    (
        "megatron.core.transformer.transformer_layer",
        "Unknown MLP type",
        "it means our FastWeightMLP, which needs none of the arguments that others are given",
    ),
    (
        "megatron.core.transformer.transformer_layer",
        "Rewrapping ModuleSpec",
        "the newer line's wish for plain MLPs; the older one knows only the ModuleSpec",
    ),
    (
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel: full_param_layout not provided",
        "the newer line computes it itself, as it says; the older one has none",
    ),
    (
        "torch.utils.cpp_extension",
        "No CUDA runtime is found",
        "a machine with a CUDA toolkit and no GPU runs on its CPU, as the dry run says",
    ),
    (
        "megatron.core.models.gpt.gpt_model",
        "GPTModel IS DEPRECATED",
        "docs/decisions/hybrid-model.md says what is used of it, and what happens when it goes",
    ),
    (
        "megatron.core.dist_checkpointing.strategies.torch",
        "MCore's async save is deprecated",
        "the newer line prefers another package; the older one knows only its own",
    ),
)


class _Silence(logging.Filter):
    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def quiet_libraries() -> None:
    """Apply the tables; call it before Megatron-core is imported, once per process."""
    for message, _ in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger, start, _ in SILENCED_LOGS:
        logging.getLogger(logger).addFilter(_Silence(start))
