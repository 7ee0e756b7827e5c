"""Reading a Hugging Face folder: safetensors by rows, one file or many.

Files are opened for each piece and closed after it, so that no more than the piece counts as
memory: a file kept open keeps every page that was ever read mapped.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ttt.checkpoints.json_files import damaged, read_json
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.conversion.config_values import shown

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# Files beside the weights that travel with a model, wherever transformers looks for them.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",  # with the versions that Mistral numbers
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_POINTER = b"version https://git-lfs"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and what it looks like."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class HFFolder:
    """A folder with ``config.json`` and safetensors.

    Attributes:
        path: the folder.
        config: content of ``config.json``.
        tensors: every tensor by name.
    """

    def __init__(self, path: Path) -> None:
        """Read the headers of all files; no weight is touched.

        Raises:
            ConfigError: something is missing or damaged; the message names the file and how.
        """
        self.path = path
        if not path.is_dir():
            raise ConfigError([Fault("checkpoint", path, "is not a folder")])
        self.config = read_json(path / CONFIG)
        self.tensors: dict[str, StoredTensor] = {}
        for file in self._files():
            for name, tensor in self._header(file):
                if name in self.tensors:
                    message = f"{name} is in {self.tensors[name].file} and in {file}: keep one"
                    raise ConfigError([Fault("checkpoint", path, message)])
                self.tensors[name] = tensor
        self._check_index()

    def rows(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        columns: tuple[int, int] | None = None,
    ) -> Tensor:
        """Rows ``[start, stop)`` of a tensor, of the given columns of its second dim only.

        Raises:
            ConfigError: the file changed or is damaged.
        """
        path = self.path / self.tensors[name].file
        try:
            with safe_open(path, framework="pt") as file:
                piece = file.get_slice(name)
                if columns is None:
                    part: Tensor = piece[start:stop]
                else:
                    part = piece[start:stop, columns[0] : columns[1]]
                return part.clone(memory_format=torch.contiguous_format)
        except (SafetensorError, OSError) as error:
            raise damaged_weights(path, error) from error

    def _files(self) -> list[str]:
        """Return the files of weights that ``transformers`` takes; two answers are refused."""
        if (self.path / ADAPTER).exists():
            message = f"holds an adapter ({ADAPTER}): merge it into its model first"
            raise ConfigError([Fault("checkpoint", self.path, message)])
        single, index = (self.path / WEIGHTS).is_file(), (self.path / INDEX).is_file()
        if not index:
            if single:
                return [WEIGHTS]
            message = f"has neither {WEIGHTS} nor {INDEX}; only safetensors are read"
            raise ConfigError([Fault("checkpoint", self.path, message)])
        files = self._indexed_files()
        if single and files != [WEIGHTS]:
            message = (
                f"has {WEIGHTS}, which transformers reads, and {INDEX}, which names other files:"
                " keep one of them"
            )
            raise ConfigError([Fault("checkpoint", self.path, message)])
        missing = [file for file in files if not (self.path / file).is_file()]
        if missing:
            message = f"{len(missing)} of {len(files)} files are missing: {', '.join(missing)}"
            raise ConfigError([Fault("checkpoint", self.path, message)])
        return files

    def _indexed_files(self) -> list[str]:
        index = self.path / INDEX
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ConfigError([Fault("checkpoint", index, "has no weight_map")])
        for name, file in weights.items():
            if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
                message = f"its weight_map gives {shown(file)} for {name}: a file of this folder"
                raise ConfigError([Fault("checkpoint", index, message)])
        return sorted(set(weights.values()))

    def _header(self, file: str) -> Iterator[tuple[str, StoredTensor]]:
        path = self.path / file
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    piece = opened.get_slice(name)
                    kind = piece.get_dtype()
                    if kind not in _DTYPES:
                        message = f"{name} is {kind}; {', '.join(_DTYPES)} convert"
                        raise ConfigError([Fault("checkpoint", path, message)])
                    yield name, StoredTensor(file, tuple(piece.get_shape()), _DTYPES[kind])
        except (SafetensorError, OSError) as error:
            raise damaged_weights(path, error) from error

    def _check_index(self) -> None:
        index = self.path / INDEX
        if not index.is_file():
            return
        weights = read_json(index)["weight_map"]
        lost = [name for name in weights if name not in self.tensors]
        if lost:
            message = f"{len(lost)} tensors of its index are in no file: {', '.join(lost[:5])}"
            raise ConfigError([Fault("checkpoint", self.path, message)])


def companions(path: Path) -> list[str]:
    """Tokenizer, template, generation and licence files of a folder, by their names in it."""
    found = [file for pattern in COMPANIONS for file in path.glob(pattern) if file.is_file()]
    return sorted({str(file.relative_to(path)) for file in found})


def damaged_weights(path: Path, error: Exception) -> ConfigError:
    """Return the same for a file of weights, which may be a pointer that was never fetched."""
    with suppress(OSError), path.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            message = "is a pointer of Git LFS, not the file itself: git lfs pull fetches it"
            return ConfigError([Fault("checkpoint", path, message)])
    return damaged(path, error)
