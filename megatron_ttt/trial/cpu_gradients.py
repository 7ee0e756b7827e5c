"""``python -m megatron_ttt.trial.cpu_gradients FILE WORDS``: gradients of one batch, to a file."""

import sys

import torch

from megatron_ttt.trial.models import loss_and_gradients

if __name__ == "__main__":
    torch.save(loss_and_gradients(sys.argv[2:], "fp32"), sys.argv[1])
