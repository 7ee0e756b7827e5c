"""A Hugging Face tokenizer as it lies in a folder or on a hub, and what it adds to a text itself.

``transformers`` is imported only for a tokenizer that is named on a hub or whose folder has no
``tokenizer.json``; otherwise the small ``tokenizers`` library suffices.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ttt.config.schema import Bos


@dataclass(frozen=True)
class TokenizerFiles:
    """A Rust tokenizer, the text of its marks, and what its configuration says about adding one."""

    backend: Any
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    adds_bos: bool | None = None

    def fingerprint(self) -> str:
        """SHA-256 of the rules."""
        rules = json.dumps(json.loads(self.backend.to_str()), sort_keys=True)
        return hashlib.sha256(rules.encode()).hexdigest()


def load_files(name: str) -> TokenizerFiles:
    """Return a tokenizer that encodes whole texts, from a folder or by its name on a hub.

    Raises:
        ValueError: it cannot be loaded, or its merges are random.
    """
    folder = Path(name)
    is_folder = (folder / "tokenizer.json").is_file()
    files = _load_folder(folder) if is_folder else _load_from_hub(name)
    _read_whole_texts(files.backend, name)
    return files


def _load_from_hub(name: str) -> TokenizerFiles:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"tokenizer {name}: no {Path(name) / 'tokenizer.json'} on disk, and loading by name"
            " needs the transformers package (pip install 'megatron_ttt[hf]')"
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"tokenizer {name} cannot be loaded: {reason[0] if reason else type(error).__name__}"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"tokenizer {name} has no fast (Rust) form, which preprocessing needs")
    return TokenizerFiles(backend, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)


def _load_folder(folder: Path) -> TokenizerFiles:
    """Return a folder's ``tokenizer.json`` and the marks its ``tokenizer_config.json`` names."""
    import tokenizers

    path = folder / "tokenizer.json"
    try:
        json.loads(path.read_text(encoding="utf-8"))
        config_path = folder / "tokenizer_config.json"
        config = (
            json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {folder} cannot be read: {error}") from error
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # what the library raises has no narrower type
        raise ValueError(f"{path} holds no tokenizer: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} is not a JSON object")
    marks = [config.get(f"{role}_token") for role in ("bos", "eos", "pad")]
    bos_token, eos_token, pad_token = (m["content"] if isinstance(m, dict) else m for m in marks)
    for token in (eos_token, pad_token):
        if token is not None and backend.token_to_id(token) is None:
            raise ValueError(
                f"tokenizer {folder} names the token {token!r}, which it does not have"
            )
    adds_bos = config.get("add_bos_token")
    adds_bos = adds_bos if isinstance(adds_bos, bool) else None
    return TokenizerFiles(backend, bos_token, eos_token, pad_token, adds_bos)


def _read_whole_texts(backend: Any, name: str) -> None:
    """Make ``backend`` encode a text whole and alone, whatever its file stores besides its rules.

    ``transformers`` writes the truncation and the padding of its last call into the file and sets
    them anew at every call; the small library would obey what it finds there.

    Raises:
        ValueError: its merges are dropped at random: equal texts would get unequal tokens.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    dropout = getattr(backend.model, "dropout", None)
    if dropout:
        raise ValueError(
            f"tokenizer {name} drops merges at random (model.dropout={dropout:.3g} in"
            " tokenizer.json): set it to null"
        )


def start_ids(files: TokenizerFiles, name: str, bos: Bos) -> tuple[int, ...]:
    """Ids that stand before a text.

    Raises:
        ValueError: there is no mark to add, or ``bos`` leaves it to files that disagree.
    """
    if bos is Bos.none:
        return ()
    own = _own_start(files.backend)
    token = files.bos_token
    named = None if token is None else files.backend.token_to_id(token)
    if bos is Bos.add:
        if token is None or named is None:
            raise ValueError(f"tokenizer {name} names no beginning-of-sequence token (bos=add)")
        return own if named in own else (named,)
    if files.adds_bos is not None and named is not None and files.adds_bos != (named in own):
        says = "nothing" if not own else f"the ids {list(own)}"
        raise ValueError(
            f"tokenizer {name}: add_bos_token={str(files.adds_bos).lower()} in"
            f" tokenizer_config.json, but tokenizer.json puts {says} before a text: say which"
            " (bos=add or bos=none)"
        )
    return own


def _own_start(backend: Any) -> tuple[int, ...]:
    """Return what the tokenizer's post-processor puts before a text, found by encoding one."""
    words = ["a", *backend.get_vocab(with_added_tokens=False)]
    text = next((w for w in words if backend.encode(w, add_special_tokens=False).ids), "")
    plain = backend.encode(text, add_special_tokens=False).ids
    marked = backend.encode(text, add_special_tokens=True)
    added = marked.special_tokens_mask
    before = added.index(0) if plain else len(added)
    return tuple(marked.ids[:before])
