"""Reading Megatron's distributed checkpoints without running what is in them.

The format keeps tensors in files of their own, but its index (``.metadata``) is a pickle, and a
few small objects (random states, parameter groups) are pickles inside the tensor files; the
libraries read both with the plain unpickler, which runs any code a file asks for. Inside
:func:`tensor_only` the index may name the classes of :data:`INDEX_CLASSES` and nothing else, and
``torch.load`` reads with ``weights_only=True`` whoever calls it.
"""

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.distributed.checkpoint import filesystem

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
INDEX_CLASSES = frozenset(
    {
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        (_PLANNER, "BytesIOWriteData"),
        (_PLANNER, "SavePlan"),
        (_PLANNER, "TensorWriteData"),
        (_PLANNER, "WriteItem"),
        (_PLANNER, "WriteItemType"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    }
)


class UntrustedContent(pickle.UnpicklingError):
    """A checkpoint's index asks for something that no index needs; the message names it."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in INDEX_CLASSES:
            raise UntrustedContent(
                f"the checkpoint's index asks for {module}.{name}, which no index needs: "
                "it was made by another program or altered, and is not read"
            )
        return super().find_class(module, name)


def _load_index(file: Any) -> Any:
    return _IndexUnpickler(file).load()


def _loads_index(data: bytes) -> Any:
    return _load_index(io.BytesIO(data))


@contextmanager
def tensor_only() -> Iterator[None]:
    """Whatever reads a checkpoint inside this context gets tensors and plain values, or an error.

    Raises:
        UntrustedContent: from the reader, for an index that names other classes.
        pickle.UnpicklingError: from the reader, for objects that ``weights_only`` refuses.
    """
    plain_load = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        return plain_load(*args, **{**kwargs, "weights_only": True})

    index_pickle = SimpleNamespace(load=_load_index, loads=_loads_index, dump=pickle.dump)
    with (
        mock.patch.object(torch, "load", load),
        mock.patch.object(filesystem, "pickle", index_pickle),
    ):
        yield
