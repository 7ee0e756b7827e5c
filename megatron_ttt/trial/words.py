"""The words of the trial's arguments. No torch: mistakes in them are told at once."""

from enum import Enum


class Size(Enum):
    """``full``: shapes that matter. ``toy``: the same programs in seconds, on any machine."""

    full = "full"
    toy = "toy"


class Device(Enum):
    cuda = "cuda"
    cpu = "cpu"


class StageName(Enum):
    """In the order in which they run: what is cheap and tells most comes first."""

    versions = "versions"
    tests = "tests"
    gradients = "gradients"
    layer = "layer"
    attention = "attention"
    steps = "steps"
    decoding = "decoding"
    scan = "scan"
    profile = "profile"
