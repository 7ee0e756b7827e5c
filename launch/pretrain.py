"""Trains a model with fast weights.

python launch/pretrain.py +model=tiny
torchrun --nproc-per-node 8 launch/pretrain.py +model=qwen3_4b data.path=PREFIX parallel.cp=4
python launch/pretrain.py +model=hf:Qwen3-4B-Base data.path=PREFIX
python launch/pretrain.py +experiment=qwen3_4b_32k run.dry_run=true
"""

import sys
from collections.abc import Collection, Sequence

from megatron_ttt.config.command import tell
from megatron_ttt.config.faults import ConfigError
from megatron_ttt.config.load import run_with_config
from megatron_ttt.config.overrides import names_checkpoint
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


def look(config: Config, given: Collection[str]) -> Sequence[str]:
    """Return what the run would say of the checkpoint that it starts from."""
    if config.checkpoint.load is None:
        return []
    from megatron_ttt.conversion.loading import start_notices  # imports torch

    return start_notices(config, given)


def main(argv: Sequence[str]) -> int:
    """Return the exit status; a checkpoint that is named as the model is looked at first."""
    said: Sequence[str] = ()
    if any(names_checkpoint(word) for word in argv):
        from megatron_ttt.conversion.model_words import spelled_out  # imports torch

        try:
            said, argv = spelled_out(argv)
        except ConfigError as error:
            return tell(error)
    return run_with_config(pretrain, argv, said=said, look=look)


if __name__ == "__main__":  # checkpoint writers are spawned processes that import this file
    sys.exit(main(sys.argv[1:]))
