"""A checkpoint that somebody named, as it lies on disk: :func:`open_checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ttt.checkpoints.megatron_folder import FORMAT, MegatronFolder
from megatron_ttt.checkpoints.run_files import CHECKPOINTS, checkpoint_folder
from megatron_ttt.config.faults import ConfigError, Fault
from megatron_ttt.config.schema import HF_SCHEME, ModelConfig, TTTConfig, TTTMode
from megatron_ttt.conversion.hf_config import model_from_hf
from megatron_ttt.conversion.hf_folder import CONFIG, HFFolder
from megatron_ttt.conversion.manifest import described_model, origin
from megatron_ttt.conversion.ttt_config import ttt_from_hf
from megatron_ttt.data.tokenizers import ModelTokenizer, TokenizerIdentity


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk and what they say of themselves. Nothing is loaded.

    Attributes:
        path: the folder with the weights.
        name: for headings and default output folders.
        run: the folder of the run that wrote it, if one did.
        opened: the folder, in its format.
        model, ttt: what it says it is; ``ttt.mode=off`` without fast weights.
        trained: the configuration of the run that wrote it, as plain containers; empty where
            nothing is known.
    """

    path: Path
    name: str
    run: Path | None
    opened: MegatronFolder | HFFolder
    model: ModelConfig
    ttt: TTTConfig
    trained: dict[str, Any]

    @property
    def is_megatron(self) -> bool:
        """Whether Megatron's distributed format, else Hugging Face's."""
        return isinstance(self.opened, MegatronFolder)

    def tokenizer(self) -> ModelTokenizer:
        """Return what it says about its tokenizer: its run's, or the one it was imported with."""
        if isinstance(self.opened, HFFolder):
            has_one = (self.path / "tokenizer.json").is_file()
            return ModelTokenizer(str(self.path) if has_one else None)
        return recorded_tokenizer(self.opened)


def open_checkpoint(named: str | Path) -> Checkpoint:
    """Open what a user names: a run (its newest checkpoint), a checkpoint, an exported model.

    Args:
        named: a folder; ``hf:`` in front says that it is Hugging Face's.

    Raises:
        ConfigError: there is no such folder, it is damaged, or does not say what it holds.
    """
    path, is_hugging_face = find_folder(named)
    if is_hugging_face:
        return _hugging_face(path)
    folder = MegatronFolder(path)
    model, ttt = described_model(folder)
    parent = path.resolve().parent
    run = parent.parent if parent.name == CHECKPOINTS else None
    name = path.name if run is None else run.name
    return Checkpoint(path, name, run, folder, model, ttt, folder.facts.get("config", {}))


def find_folder(named: str | Path) -> tuple[Path, bool]:
    """Return the folder that a user means, and whether it is Hugging Face's.

    Raises:
        ConfigError: it is neither that nor a Megatron checkpoint.
    """
    text = str(named)
    path = checkpoint_folder(Path(text.removeprefix(HF_SCHEME)))
    return path, text.startswith(HF_SCHEME) or holds_hugging_face(path)


def recorded_tokenizer(folder: MegatronFolder) -> ModelTokenizer:
    """Return the tokenizer of the run that wrote a checkpoint, or the one it was imported with."""
    recorded = folder.facts.get("data", {}).get("tokenizer")
    trained = None if recorded is None else TokenizerIdentity.from_dict(recorded)
    named = folder.facts.get("config", {}).get("data", {}).get("tokenizer", {})
    if named.get("kind") == "bytes":
        return ModelTokenizer("bytes", trained)
    found = origin(folder)
    name = named.get("name") if found is None else str(found)
    if name is None and trained is not None:
        name = trained.name if trained.name is not None else trained.kind
    return ModelTokenizer(name, trained)


def holds_hugging_face(path: Path) -> bool:
    """Whether a folder is a Hugging Face model rather than a Megatron checkpoint.

    Raises:
        ConfigError: it is neither.
    """
    if (path / FORMAT).is_file():
        return False
    if (path / CONFIG).is_file():
        return True
    message = f"neither {FORMAT} (Megatron's) nor {CONFIG} (Hugging Face's) is there"
    if not path.is_dir():
        message = "is not a folder"
    raise ConfigError([Fault("checkpoint", path, message)])


def _hugging_face(path: Path) -> Checkpoint:
    opened = HFFolder(path)
    model = model_from_hf(opened.config, name=path.name, where=str(path))
    ttt = ttt_from_hf(opened.config, layers=model.layers, where=str(path), tensors=opened.tensors)
    off = TTTConfig(mode=TTTMode.off)
    return Checkpoint(path, path.name, None, opened, model, off if ttt is None else ttt, {})
