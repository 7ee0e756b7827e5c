#!/usr/bin/env python3
"""Evaluate a checkpoint with its fast weights on and off, from the same weights.

python tools/evaluate.py task=perplexity checkpoint=outputs/demo
torchrun --nproc-per-node 8 tools/evaluate.py task=ruler checkpoint=outputs/qwen3_4b \\
    parallel.cp=8 ruler.lengths=[32768,65536]
python tools/evaluate.py task=health checkpoint=outputs/demo
python tools/evaluate.py --multirun task=perplexity checkpoint=outputs/demo ttt.eta=0.5,1,2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ttt.config.load import run_program
from megatron_ttt.evaluation.schema import EVALUATION, EvaluationConfig
from megatron_ttt.training.quiet import quiet_libraries


def evaluate(config: EvaluationConfig) -> int:
    """Return the evaluation; its exit status."""
    # torch and megatron-core take seconds to import: a mistake is reported before that
    quiet_libraries()
    from megatron_ttt.evaluation.program import evaluate as run

    return run(config)


if __name__ == "__main__":
    sys.exit(run_program(EVALUATION, evaluate, sys.argv[1:]))
