"""Imported once by the server from which ``lives.py`` forks."""

from megatron_ttt.training.quiet import quiet_libraries

quiet_libraries()

import megatron_ttt.training.loop  # noqa: E402, F401
