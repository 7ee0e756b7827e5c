"""``python -m megatron_ttt.trial.child STAGE SIZE DEVICE FOLDER``: one stage of the trial."""

import sys

from megatron_ttt.training.quiet import quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    from megatron_ttt.trial.program import child

    sys.exit(child(*sys.argv[1:]))
