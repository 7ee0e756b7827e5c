"""A Hugging Face folder seen as Megatron's tensors: checked once, then read by rows."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import ModelConfig, TTTConfig, TTTMode
from megatron_ttt.conversion.hf_config import model_from_hf
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.initial_target import initial_target
from megatron_ttt.conversion.mapping import Mapping, TargetGenerator, build_mapping
from megatron_ttt.conversion.megatron_folder import row_blocks
from megatron_ttt.conversion.rules import TensorMap
from megatron_ttt.conversion.ttt_config import target_generator, ttt_from_hf

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
            ConfigError: a tensor is missing, unknown, of another shape, or not zero where Megatron
                has no place for it.
        """
        self.folder = folder
        self.seed = seed
        where = str(folder.path)
        self.model: ModelConfig = model_from_hf(folder.config, name=name, where=where)
        self.ttt: TTTConfig | None = ttt_from_hf(
            folder.config, layers=self.model.layers, where=where
        )
        self._target_chosen = target is not None
        if target is None:
            target = target_generator(self.ttt, layers=self.model.layers)
        self.mapping: Mapping = build_mapping(self.model, target)
        self.drawn = {
            tensor.megatron
            for tensor in self.mapping.tensors
            if ".ttt_" in tensor.megatron and tensor.sources[0] not in folder.tensors
        }
        self._check()

    def tensor(self, key: str) -> TensorMap:
        """One tensor's map."""
        return self._by_key[key]

    def dtype(self, tensor: TensorMap) -> torch.dtype:
        """The dtype it is stored in; initialised ones take the embedding's."""
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
        """The whole tensor, block by block of at most ``limit`` bytes."""
        for start, stop in row_blocks(tensor.shape, self.dtype(tensor), limit):
            yield start, self.rows(tensor, start, stop)

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

    def _ignored(self, name: str) -> bool:
        tied = self.model.tied_embeddings and name == "lm_head.weight"
        switched_off = self._target_chosen and ".mlp.ttt_" in name
        return tied or switched_off or name.endswith(_DERIVED)


def described_ttt(
    folder: HFFolder, *, layers: list[int] | None
) -> tuple[TargetGenerator, TTTConfig]:
    """The fast weights that an import should give a model.

    Args:
        folder: the source.
        layers: those that get a target generator, empty for none; ``None``: the source's own, or
            every sixth of a plain model.

    Raises:
        ConfigError: a layer that the model lacks.
    """
    where = str(folder.path)
    model = model_from_hf(folder.config, name="imported", where=where)
    ttt = ttt_from_hf(folder.config, layers=model.layers, where=where) or TTTConfig()
    if layers is not None:
        absent = [layer for layer in layers if not 0 <= layer < model.layers]
        if absent:
            message = f"layers are 0 to {model.layers - 1}"
            raise ConfigError([Fault("ttt layers", absent, message)])
        ttt = replace(ttt, layers=layers or None)
        if not layers:
            ttt = replace(ttt, mode=TTTMode.off)
    target = target_generator(ttt, layers=model.layers)
    return target, replace(ttt, layers=list(target.layers) or None)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
