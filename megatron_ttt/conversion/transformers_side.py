"""A Hugging Face folder as ``transformers`` itself loads and runs it, within bounded memory.

``AutoModelForCausalLM.from_pretrained`` loads the model and its whole decoder runs: which file is
read, what is tied and which key counts is theirs to decide, since this side is what our own reading
is checked against. The weights stay mapped from their files; a layer becomes fp32 when it is
reached and is given back when it is done.

Plain classes whose ``config.json`` has ``ttt_*`` keys are what the published reference
implementation reads: their fast layers get its MLP (``reference_rule.py``).

Shape letters: B rows, T tokens, H hidden.
"""

import ctypes
import json
import logging
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.conversion.failures import VerificationFailed
from megatron_ttt.conversion.hf_folder import HFFolder
from megatron_ttt.conversion.reference_rule import ReferenceKeys, ReferenceMLP, reference_keys
from megatron_ttt.conversion.ttt_config import TTT_SUFFIX, has_rule

_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


class TransformersSide:
    """What a folder computes, in fp32.

    Attributes:
        reference: the published keys, where the reference implementation would read the folder.
        embeddings: ``[B, T, H]``.
        layers: ``[B, T, H]`` behind each layer.
    """

    @torch.no_grad()
    def __init__(self, folder: HFFolder, tokens: Tensor, *, chunk_size: int) -> None:
        """Load, and run the decoder.

        Args:
            folder: with fast weights, the classes of its ``model_type`` must be registered.
            tokens: ``[B, T]``.
            chunk_size: instead of its own.

        Raises:
            ConfigError: ``transformers`` cannot load it.
            VerificationFailed: ``transformers`` misses tensors and would make them up.
        """
        self.folder = folder
        raw = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))
        self.reference: ReferenceKeys | None = None
        if has_rule(raw) and not raw["model_type"].endswith(TTT_SUFFIX):
            self.reference = reference_keys(raw)
        self.model = self._load()
        body = self.model.get_decoder()
        self.embeddings: Tensor = body.get_input_embeddings()(tokens).float()
        self.layers: list[Tensor] = []
        if hasattr(body.config, "ttt_chunk"):
            body.config.ttt_chunk = chunk_size
        if self.reference is not None:
            for index in self.reference.layers:
                body.layers[index].mlp = self._reference_mlp(index, body.layers[index], chunk_size)
        for layer in body.layers:
            layer.register_forward_pre_hook(_enter)
            layer.register_forward_hook(self._leave)
        body.norm.float()
        self.normed: Tensor = body(inputs_embeds=self.embeddings, use_cache=False)[0]

    def output_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the output layer that ``transformers`` uses, tied or not; fp32."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight[start:stop].float()

    def _load(self) -> Any:
        from huggingface_hub.errors import StrictDataclassError

        dtypes = {tensor.dtype for tensor in self.folder.tensors.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # values stay as stored
        with _silent():
            try:
                model, found = transformers.AutoModelForCausalLM.from_pretrained(
                    self.folder.path, dtype=dtype, local_files_only=True, output_loading_info=True
                )
            except (StrictDataclassError, *_FAILURES) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                message = f"transformers cannot load it: {reason}"
                raise ConfigError([Fault("verify", self.folder.path, message)]) from error
        lost = sorted(found["missing_keys"])
        if lost:
            raise VerificationFailed(f"transformers finds no {', '.join(lost[:4])}")
        return model.eval()

    def _leave(self, layer: Any, args: Any, output: Any) -> None:
        self.layers.append(output[0] if isinstance(output, tuple) else output)
        for parameter in layer.parameters():
            parameter.data = parameter.data.new_empty(0)
        for stored in layer.stored:
            _release(stored)
        layer.stored = []

    def _reference_mlp(self, index: int, layer: Any, chunk_size: int) -> ReferenceMLP:
        assert self.reference is not None
        kernel, projection = (
            self._whole(f"model.layers.{index}.mlp.ttt_{part}.weight") for part in ("conv", "proj")
        )
        assert kernel is not None
        return ReferenceMLP(
            layer.mlp,
            kernel_D15=kernel,
            projection_DD=projection if self.reference.projects else None,
            eta=self.reference.eta,
            chunk_size=chunk_size,
            source_BTD=self.embeddings if self.reference.reads_embeddings else None,
        )

    def _whole(self, name: str) -> Tensor | None:
        stored = self.folder.tensors.get(name)
        return None if stored is None else self.folder.rows(name, 0, stored.shape[0]).float()


def _enter(layer: Any, args: Any) -> None:
    layer.stored = [parameter.data for parameter in layer.parameters()]
    for parameter in layer.parameters():
        parameter.data = parameter.data.float()


def _release(tensor: Tensor) -> None:
    """Give back the pages of a tensor that is never read again.

    A mapped file counts as resident page by page, as it is read, for as long as any tensor of it
    lives; only whole pages inside the tensor are touched here.
    """
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    last = (tensor.data_ptr() + tensor.nbytes) // page * page
    if last > first:
        advice = ctypes.CDLL(None).madvise
        advice(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the report about tensors that a model of one layer leaves out."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
