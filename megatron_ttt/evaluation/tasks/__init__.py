"""The tasks of ``tools/evaluate.py``: each module of this folder defines one, as ``TASK``.

The command line is read before torch is imported, so these modules import torch, Megatron and
matplotlib inside the functions that use them.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from megatron_ttt.evaluation.task import Task

TASKS: dict[str, Task[Any]] = {
    module.name: import_module(f"{__name__}.{module.name}").TASK
    for module in iter_modules(__path__)
    if not module.name.startswith("_")
}
