"""A Hugging Face folder seen as Megatron's tensors: checked once, then read by rows."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megatron_ttt.checkpoints.megatron_folder import BLOCK_BYTES, row_blocks
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import ModelConfig, TTTConfig, TTTMode
from megatron_ttt.conversion.hf_config import model_from_hf
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.initial_target import initial_target
from megatron_ttt.conversion.mapping import Mapping, TargetGenerator, build_mapping
from megatron_ttt.conversion.rules import TensorMap
from megatron_ttt.conversion.ttt_config import target_generator, trained_layers, ttt_from_hf

_TIED = ("lm_head.weight", "model.embed_tokens.weight")
# Tensors that older files carry and that follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


class MegatronView:
    """Megatron's tensors, made of a Hugging Face folder.

    Attributes:
        folder: the source.
        model: architecture that its ``config.json`` describes.
        mapping: which rows of which tensor go where.
        drawn: keys of target-generator tensors that the source lacks and that are initialised.
    """

    def __init__(
        self,
        folder: HFFolder,
        *,
        target: TargetGenerator | None = None,
        seed: int,
        name: str = "imported",
    ) -> None:
        """Check every name and shape.

        Args:
            folder: the source.
            target: the target generator wanted, whatever the source has; ``None``: the source's.
            seed: for what the source lacks of it.
            name: for ``ModelConfig.name``.

        Raises:
            ConfigError: a tensor is missing, unknown, of another shape, not zero where Megatron has
                no place for it, or not the embedding where the two are tied.
        """
        self.folder = folder
        self.seed = seed
        where = str(folder.path)
        self.model: ModelConfig = model_from_hf(folder.config, name=name, where=where)
        self._target_chosen = target is not None
        if target is None:
            ttt = ttt_from_hf(
                folder.config, layers=self.model.layers, where=where, tensors=folder.tensors
            )
            target = target_generator(ttt, layers=self.model.layers)
        self._check_layers()
        self.mapping: Mapping = build_mapping(self.model, target)
        trained = set(trained_layers(folder.tensors))
        self.drawn = {
            tensor.megatron
            for tensor in self.mapping.tensors
            if ".ttt_" in tensor.megatron and int(tensor.megatron.split(".")[2]) not in trained
        }
        self._check()
        self._check_tied()
        self._report_left_out()

    def tensor(self, key: str) -> TensorMap:
        """One tensor's map."""
        return self._by_key[key]

    def dtype(self, tensor: TensorMap) -> torch.dtype:
        """Return the dtype it is stored in; initialised ones take the embedding's."""
        if tensor.megatron in self.drawn:
            return self.folder.tensors["model.embed_tokens.weight"].dtype
        return self.folder.tensors[tensor.sources[0]].dtype

    def rows(
        self, tensor: TensorMap, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Rows ``[start, stop)`` of a Megatron tensor, only the given columns of its second dim."""
        if tensor.megatron in self.drawn:
            whole = initial_target(tensor, self.model, seed=self.seed, dtype=self.dtype(tensor))
            part = whole[start:stop]
            return part if columns is None else part[:, columns[0] : columns[1]]
        parts = [
            self.folder.rows(run.tensor, run.start, run.start + run.count, columns=columns)
            for run in tensor.select_rows(start, stop)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def blocks(self, tensor: TensorMap, limit: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the whole tensor, block by block of at most ``limit`` bytes."""
        for start, stop in row_blocks(tensor.shape, self.dtype(tensor), limit):
            yield start, self.rows(tensor, start, stop)

    def _check_layers(self) -> None:
        """Refuse a number of layers that the files do not have, before anything is made of it."""
        stored = len(self.folder.tensors)
        if self.model.layers > stored:
            message = f"num_hidden_layers={self.model.layers}, but there are {stored} tensors"
            raise ConfigError([Fault("checkpoint", self.folder.path, message)])

    def _check(self) -> None:
        self._by_key = {tensor.megatron: tensor for tensor in self.mapping.tensors}
        path, stored = self.folder.path, self.folder.tensors
        expected = {**self.mapping.hf_shapes(), **self.mapping.zeros}
        for key in self.drawn:
            del expected[self._by_key[key].sources[0]]
        faults = []
        missing = [name for name in expected if name not in stored]
        if missing:
            faults.append(Fault("checkpoint", path, f"lacks {_some(missing)}"))
        unknown = [name for name in stored if name not in expected and not self._ignored(name)]
        if unknown:
            message = f"has tensors without a place in {self.model.family.name}: {_some(unknown)}"
            faults.append(Fault("checkpoint", path, message))
        for name, shape in expected.items():
            if name in stored and stored[name].shape != shape:
                message = (
                    f"{name} is {list(stored[name].shape)}, its config.json says {list(shape)}"
                )
                faults.append(Fault("checkpoint", path, message))
        for tensor in self.mapping.tensors:
            dtypes = {stored[name].dtype for name in tensor.sources if name in stored}
            if len(dtypes) > 1:
                message = f"{', '.join(tensor.sources)} differ in dtype"
                faults.append(Fault("checkpoint", path, message))
        if faults:
            raise ConfigError(faults)
        for name, shape in self.mapping.zeros.items():
            if self.folder.rows(name, 0, shape[0]).any():
                message = f"{name} is not zero: Megatron has no bias there"
                raise ConfigError([Fault("checkpoint", path, message)])

    def _check_tied(self) -> None:
        """Check that a stored output layer beside tied embeddings is the embedding."""
        head, embedding = (self.folder.tensors.get(name) for name in _TIED)
        if not self.model.tied_embeddings or head is None or embedding is None:
            return
        equal = head.shape == embedding.shape and all(
            torch.equal(*(self.folder.rows(name, start, stop) for name in _TIED))
            for start, stop in row_blocks(head.shape, head.dtype, BLOCK_BYTES)
        )
        if not equal:
            message = (
                f"tie_word_embeddings is true, but {_TIED[0]} differs from {_TIED[1]}: transformers"
                " 5 computes with it as if it were false, 4 drops it; set it to false, or remove"
                " the tensor"
            )
            raise ConfigError([Fault("checkpoint", self.folder.path, message)])

    def _report_left_out(self) -> None:
        """Warn about trained fast weights that the caller's choice leaves out."""
        taken = self.mapping.hf_shapes()
        left = [name for name in self.folder.tensors if ".mlp.ttt_" in name and name not in taken]
        if left and any(".ttt_" in name for name in taken):
            message = f"{self.folder.path}: trained fast weights are left out: {_some(left)}"
            warnings.warn(message, stacklevel=3)

    def _ignored(self, name: str) -> bool:
        tied = self.model.tied_embeddings and name == "lm_head.weight"
        switched_off = self._target_chosen and ".mlp.ttt_" in name
        return tied or switched_off or name.endswith(_DERIVED)


def described_ttt(
    folder: HFFolder,
    *,
    layers: list[int] | None,
    chunk_size: int | None = None,
    eta: float | None = None,
) -> tuple[TargetGenerator, TTTConfig]:
    """Return the fast weights that an import should give a model.

    Args:
        folder: the source.
        layers: those that get a target generator, empty for none; ``None``: the source's own, or
            every sixth of a plain model. The published list of a model of 36 layers ends in 36,
            which the published implementation ignores: one past the last is left out, warning.
        chunk_size, eta: instead of the source's.

    Raises:
        ConfigError: a layer that the model lacks, or fast weights that nothing describes.
    """
    where = str(folder.path)
    model = model_from_hf(folder.config, name="imported", where=where)
    found = ttt_from_hf(
        folder.config,
        layers=model.layers,
        where=where,
        tensors=folder.tensors,
        chunk_size=chunk_size,
        eta=eta,
    )
    ttt = found or TTTConfig()
    if found is None:
        ttt = replace(
            ttt,
            mode=TTTMode.off if folder.config.get("ttt_mode") is False else ttt.mode,
            chunk_size=chunk_size or ttt.chunk_size,
            eta=ttt.eta if eta is None else eta,
        )
    if layers is not None:
        if model.layers in layers and len(layers) > 1:
            message = f"ttt.layers: {model.layers} is left out: layers are 0 to"
            warnings.warn(f"{message} {model.layers - 1}", stacklevel=2)
            layers = [layer for layer in layers if layer != model.layers]
        absent = [layer for layer in layers if not 0 <= layer < model.layers]
        if absent:
            message = f"layers are 0 to {model.layers - 1}"
            raise ConfigError([Fault("ttt.layers", absent, message)])
        ttt = replace(ttt, layers=layers or None, mode=TTTMode.in_place if layers else TTTMode.off)
    target = target_generator(ttt, layers=model.layers)
    return target, replace(ttt, layers=list(target.layers) or None)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
