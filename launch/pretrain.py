"""Trains a model with fast weights.

python launch/pretrain.py +model=tiny
torchrun --nproc-per-node 8 launch/pretrain.py +model=qwen3_4b data.path=PREFIX parallel.cp=4
python launch/pretrain.py +experiment=qwen3_4b_32k run.dry_run=true
"""

import sys
from collections.abc import Collection

from megatron_ttt.config.load import run_with_config
from megatron_ttt.config.schema import Config
from megatron_ttt.training.environment import order_launches
from megatron_ttt.training.quiet import quiet_libraries


def pretrain(config: Config, given: Collection[str]) -> int:
    """Return the training run; its exit status."""
    # torch and megatron-core take seconds to import: a mistake is reported before that
    quiet_libraries()
    order_launches(config.parallel)  # read when torch first touches the GPU
    from megatron_ttt.training.loop import pretrain as run

    return run(config, given)


if __name__ == "__main__":  # checkpoint writers are spawned processes that import this file
    sys.exit(run_with_config(pretrain, sys.argv[1:]))
