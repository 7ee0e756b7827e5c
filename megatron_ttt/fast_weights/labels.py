"""Names under which a profile shows the parts of a step that are ours."""

from contextlib import AbstractContextManager, nullcontext
from enum import Enum

import torch


class Label(Enum):
    """A part of a step."""

    PRODUCTS = "fast-weight products"
    SCAN = "fast-weight scan"
    ATTENTION = "attention"


def labelled(label: Label) -> AbstractContextManager[object]:
    """Return a context whose operations a profile shows under ``label``; else it does nothing."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(label.value)
    return nullcontext()
