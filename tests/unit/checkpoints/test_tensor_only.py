"""Code in a checkpoint is refused, wherever it hides, and does not run."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from megatron_ttt.checkpoints.tensor_only import UntrustedContent, tensor_only


class Creates:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def save(folder: Path, state: dict[str, Any]) -> None:
    dcp.save(state, storage_writer=FileSystemWriter(folder), no_dist=True)


def load(folder: Path, state: dict[str, Any]) -> None:
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)


def test_an_honest_checkpoint_is_read(tmp_path: Path) -> None:
    saved = torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)
    save(tmp_path, {"weight": saved, "facts": {"step": 3, "rates": [0.1, None]}})
    state: dict[str, Any] = {
        "weight": torch.zeros_like(saved),
        "facts": {"step": 0, "rates": [0.0, 0.0]},
    }
    with tensor_only():
        load(tmp_path, state)
    assert torch.equal(state["weight"], saved)
    assert state["facts"] == {"step": 3, "rates": [0.1, None]}


def test_code_in_the_index_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "saved", {"weight": torch.ones(2)})
    index = tmp_path / "saved" / ".metadata"
    content = pickle.loads(index.read_bytes())
    content.planner_data = Creates(tmp_path / "harm")
    index.write_bytes(pickle.dumps(content))
    with tensor_only(), pytest.raises(UntrustedContent, match=r"mkdir"):
        FileSystemReader(tmp_path / "saved").read_metadata()
    assert not (tmp_path / "harm").exists()


def test_code_in_an_object_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "saved", {"rng": Creates(tmp_path / "harm")})
    with tensor_only(), pytest.raises(dcp.CheckpointException, match="Weights only"):
        load(tmp_path / "saved", {"rng": None})
    assert not (tmp_path / "harm").exists()


def test_weights_only_whatever_the_caller_says(tmp_path: Path) -> None:
    content = io.BytesIO()
    torch.save(Creates(tmp_path / "harm"), content)
    with tensor_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(content.getvalue()), weights_only=False)
    assert not (tmp_path / "harm").exists()
    torch.load(io.BytesIO(content.getvalue()), weights_only=False)
    assert (tmp_path / "harm").exists()  # the trap is live: outside the context it snaps
