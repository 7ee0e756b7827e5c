"""Every model shape runs forward and validation on fake "cuda" tensors.

They refuse to meet a CPU tensor and to be read by the host: what a GPU would refuse, or wait for.
"""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from megatron_ttt.config.load import CONFIG_DIR
from megatron_ttt.config.schema import Config, TTTMode
from megatron_ttt.data.rows import Batch, make_batch
from megatron_ttt.training.step import _token_losses
from tests.fake_device import fake_cuda, like_on_cuda, model_on_fake_cuda, shaped

OFF = TTTMode.off
MODELS = sorted(path.stem for path in Path(CONFIG_DIR, "model").glob("*.yaml"))
SETTINGS = {
    "documents": [],
    "one_document": ["data.reset_attention=false"],
    "off": ["ttt=off"],
    "bounded": ["ttt.normalize=key_energy", "ttt.clip.mode=relative", "ttt.clip.bound=0.1"],
    "embeddings": ["ttt.target=input_embeddings", "ttt.decay=0.9"],
}


def batch_of(config: Config) -> Batch:
    """Rows of two documents and some padding."""
    rows, length = config.train.micro_batch_size, config.train.seq_length
    text = torch.randint(2, 100, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    text[:, length // 2], text[:, -7:] = 0, 1
    return make_batch(text, range(rows), eod=0, pad=1)


def assert_losses_on_cuda(config: Config) -> None:
    """Forward in training, and validation with fast weights on and off."""
    batch = batch_of(config)
    with model_on_fake_cuda(config, batch) as (model, layouts):
        for training, mode in ((True, config.ttt.mode), (False, config.ttt.mode), (False, OFF)):
            losses = model.train(training)(
                input_ids=like_on_cuda(batch.tokens_BT),
                position_ids=layouts[mode].positions,
                attention_mask=None,
                labels=like_on_cuda(batch.labels_BT),
                packed_seq_params=layouts[mode],
            )
            results = _token_losses(like_on_cuda(batch.loss_mask_BT), losses)
            assert {result.device.type for result in results} == {"cuda"}
            assert losses.shape == batch.labels_BT.shape


@pytest.mark.parametrize("model", MODELS)
def test_every_model_on_cuda(model: str) -> None:
    assert_losses_on_cuda(shaped([f"+model={model}"]))


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_on_cuda(setting: str) -> None:
    assert_losses_on_cuda(shaped(["+model=qwen3_0_6b", *SETTINGS[setting]]))


def test_device_mistakes_are_found() -> None:
    with fake_cuda():
        tensor = torch.zeros(4, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            tensor + torch.ones(4)
        with pytest.raises(DataDependentOutputException):
            tensor.sum().item()
