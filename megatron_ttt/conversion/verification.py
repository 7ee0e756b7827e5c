"""Both models on the same tokens, layer by layer: the first layer that differs has a name.

Each side has one layer in memory at a time, so that memory is bounded by a few layers and what is
read of the vocabulary, whatever the model's size. The sides share nothing: the folder as
``transformers`` loads and runs it on one (``transformers_side.py``), Megatron's layers with the
distributed checkpoint's tensors on the other, each on its own hidden states, all in fp32.

Shape letters: B rows, T tokens, H hidden, W vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_ttt.checkpoints.megatron_folder import BLOCK_BYTES, MegatronFolder, row_blocks
from megatron_ttt.config.reading import reading_config
from megatron_ttt.config.schema import (
    Boundaries,
    ModelConfig,
    PassConfig,
    Precision,
    TTTConfig,
    TTTMode,
)
from megatron_ttt.config.to_megatron import transformer_config
from megatron_ttt.conversion.failures import VerificationFailed
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.loading import checkpoint_key
from megatron_ttt.conversion.plain_rows import plain_rows
from megatron_ttt.conversion.transformers_side import TransformersSide
from megatron_ttt.conversion.ttt_config import target_generator
from megatron_ttt.model.build import build_model
from megatron_ttt.model.initialize import global_parameters

TOLERANCE = 1e-5  # fp32 rounding of two orders of summation, relative to max(1, max|value|)
ROWS, LENGTH, CHUNK = 2, 48, 16
_EMBEDDING = "embedding.word_embeddings.weight"
_UNUSED = 8  # vocabulary of the one-layer models, whose embeddings are never read


@dataclass(frozen=True)
class Comparison:
    """One stage of the models.

    Attributes:
        stage: ``embedding``, ``layer N`` or ``logits``.
        error: largest difference, relative to max(1, largest value).
    """

    stage: str
    error: float

    @property
    def agrees(self) -> bool:
        """Whether rounding explains it; NaN never agrees."""
        return self.error <= TOLERANCE


@torch.no_grad()
def compare_models(
    hf: HFFolder,
    megatron: MegatronFolder,
    model: ModelConfig,
    ttt: TTTConfig,
    groups: ProcessGroupCollection,
) -> Iterator[Comparison]:
    """Run both models on the same random tokens.

    Chunks are shortened to :data:`CHUNK` tokens on both sides, so that what fast weights write is
    read within the :data:`LENGTH` tokens.

    Args:
        hf: one side; with fast weights, the classes of its ``model_type`` must be registered.
        megatron: the other side.
        model, ttt: the Megatron side's configuration.
        groups: of a single process.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (ROWS, LENGTH), generator=generator)
    ours = _rows_of(tokens, lambda token: megatron.rows(_EMBEDDING, token, token + 1))
    other = TransformersSide(hf, tokens, chunk_size=CHUNK)
    if len(other.layers) != model.layers:
        message = f"transformers has {len(other.layers)} layers, Megatron {model.layers}"
        raise VerificationFailed(message)
    yield Comparison("embedding", _error(ours, other.embeddings))
    megatron_layers = _MegatronLayers(megatron, model, ttt, groups, ours)
    for layer in range(model.layers):
        ours = megatron_layers.run(layer, ours)
        yield Comparison(f"layer {layer}", _error(ours, other.layers[layer]))
    yield Comparison("logits", _logits_error(other, megatron, model, ours))


def verify(comparisons: Iterator[Comparison], report: Callable[[Comparison], None]) -> None:
    """Go through all stages.

    Raises:
        VerificationFailed: at the first stage that differs.
    """
    for comparison in comparisons:
        report(comparison)
        if not comparison.agrees:
            raise VerificationFailed(
                f"{comparison.stage} is the first that differs: {comparison.error:.1e} of its"
                f" largest value, {TOLERANCE:.0e} is allowed"
            )


class _MegatronLayers:
    """Megatron's layers, one at a time; ``[B, T, H]`` in and out."""

    def __init__(
        self,
        folder: MegatronFolder,
        model: ModelConfig,
        ttt: TTTConfig,
        groups: ProcessGroupCollection,
        embeddings: Tensor,
    ) -> None:
        self.folder, self.model, self.ttt, self.groups = folder, model, ttt, groups
        self.fast = frozenset(target_generator(ttt, layers=model.layers).layers)
        self.embeddings = embeddings.transpose(0, 1).contiguous()
        self.built: dict[bool, Any] = {}

    def run(self, layer: int, hidden: Tensor) -> Tensor:
        fast = layer in self.fast
        if fast not in self.built:
            self.built[fast] = self._build(fast)
        one = self.built[fast]
        for name, parameter in global_parameters(one):
            if name.startswith("decoder.layers.0."):
                key = checkpoint_key(name).replace(".0.", f".{layer}.", 1)
                _fill(parameter, self.folder.tensors[key].dtype, partial(self.folder.rows, key))
        layout = plain_rows(
            batch=ROWS,
            length=LENGTH,
            chunk_size=CHUNK if fast else None,
            decay=self.ttt.decay,
        )
        incoming = hidden.transpose(0, 1).contiguous()

        def enter(module: Any, args: Any, kwargs: Any) -> Any:
            layout.embeddings = self.embeddings
            return (), {**kwargs, "hidden_states": incoming}

        with _through(one.decoder.layers[0], enter) as outputs:
            one(
                input_ids=torch.zeros(ROWS, LENGTH, dtype=torch.int64),
                position_ids=layout.positions,
                attention_mask=None,
                packed_seq_params=layout,
            )
        return outputs[0].transpose(0, 1)

    def _build(self, fast: bool) -> Any:
        mode = TTTMode.in_place if fast else TTTMode.off
        config = reading_config(
            replace(self.model, layers=1, vocab_size=_UNUSED),
            replace(self.ttt, mode=mode, layers=[0] if fast else None, chunk_size=CHUNK),
            data=Boundaries(reset_attention=False),
            train=PassConfig(seq_length=LENGTH, micro_batch_size=ROWS, precision=Precision.fp32),
        )
        transformer = transformer_config(config, device_is_cuda=False)
        return build_model(config, transformer, self.groups).eval()


@contextmanager
def _through(layer: Any, enter: Callable[..., Any]) -> Iterator[list[Tensor]]:
    """Replace a layer's input and keep its output while its model runs."""
    outputs: list[Tensor] = []

    def leave(module: Any, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.register_forward_hook(leave),
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _fill(parameter: Tensor, dtype: torch.dtype, rows: Callable[[int, int], Tensor]) -> None:
    """Copy a tensor block by block."""
    for start, stop in row_blocks(parameter.shape, dtype, BLOCK_BYTES):
        parameter[start:stop] = rows(start, stop)


def _rows_of(tokens: Tensor, row: Callable[[int], Tensor]) -> Tensor:
    """``[B, T, H]`` fp32, each distinct row read once, in ascending order."""
    distinct, places = tokens.unique(return_inverse=True)
    table = torch.cat([row(int(token)).float() for token in distinct])
    return table[places]


def _logits_error(
    other: TransformersSide,
    megatron: MegatronFolder,
    model: ModelConfig,
    ours: Tensor,
) -> float:
    """Compare final norm and output layer of both sides, some rows of the vocabulary at a time."""
    name = _EMBEDDING if model.tied_embeddings else "output_layer.weight"
    size = [model.hidden_size]
    norm = megatron.rows("decoder.final_layernorm.weight", 0, *size).float()
    ours = F.rms_norm(ours, size, norm, model.norm_epsilon)
    gap, largest = 0.0, 1.0
    stored = megatron.tensors[name]
    for start, stop in row_blocks((model.vocab_size, *size), stored.dtype, BLOCK_BYTES):
        a = ours @ megatron.rows(name, start, stop).float().T
        b = other.normed @ other.output_rows(start, stop).T
        block = (a - b).abs().max().item()
        gap = block if block != block else max(gap, block)
        largest = max(largest, b.abs().max().item())
    return gap / largest


def _error(ours: Tensor, theirs: Tensor) -> float:
    largest = max(1.0, theirs.abs().max().item())
    return (ours - theirs).abs().max().item() / largest
