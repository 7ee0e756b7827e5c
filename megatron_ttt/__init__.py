"""In-Place Test-Time Training at Megatron scale."""

__version__ = "0.1.0"
