"""Text to token ids and back: bytes without any download, or a Hugging Face tokenizer.

Nothing here imports torch. ``transformers`` is imported only for a tokenizer that is named on a
hub or whose folder has no ``tokenizer.json``; otherwise the small ``tokenizers`` library suffices.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BYTES = "bytes"
HUGGINGFACE = "huggingface"


@dataclass(frozen=True)
class TokenizerIdentity:
    """What tells two tokenizers apart, and what a reader of token ids has to know.

    ``vocab_size`` is one more than the largest id the tokenizer can give; ``pad`` is None when it
    has no id for padding that differs from ``eod``; ``fingerprint`` is a SHA-256 of its rules.
    """

    kind: str
    name: str | None
    vocab_size: int
    eod: int
    pad: int | None
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TokenizerIdentity":
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


class Tokenizer(Protocol):
    """What preprocessing, training and generation need of a tokenizer."""

    @property
    def identity(self) -> TokenizerIdentity: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int: ...

    @property
    def pad(self) -> int | None: ...

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone: no marks added at either end, no marks recognised inside it."""
        ...

    def encode_array(self, text: str) -> NDArray[np.int64]:
        """The same ids as an array [tokens]; what preprocessing calls, once per document."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; end-of-document and padding ids give nothing."""
        ...


class _IdentityProperties:
    """``vocab_size``, ``eod`` and ``pad`` read from the identity, for both tokenizers."""

    def __init__(self, identity: TokenizerIdentity) -> None:
        self._identity = identity

    @property
    def identity(self) -> TokenizerIdentity:
        return self._identity

    @property
    def vocab_size(self) -> int:
        return self._identity.vocab_size

    @property
    def eod(self) -> int:
        return self._identity.eod

    @property
    def pad(self) -> int | None:
        return self._identity.pad


class ByteTokenizer(_IdentityProperties):
    """One token per UTF-8 byte: ids 0 to 255, end of document 256, padding 257; 258 in all."""

    def __init__(self) -> None:
        super().__init__(
            TokenizerIdentity(
                kind=BYTES, name=None, vocab_size=258, eod=256, pad=257, fingerprint="utf-8-bytes"
            )
        )

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_array(self, text: str) -> NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not valid UTF-8 (a character cut in two) become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer(_IdentityProperties):
    """A tokenizer of the Hugging Face libraries, from a folder or by its name on a hub.

    ``eod`` defaults to the tokenizer's end-of-sequence token. ``pad`` defaults to its padding
    token if that is another id than ``eod``: several published tokenizers pad with their
    end-of-sequence token, and then padding could not be told from a document's end.
    Special tokens spelled out *inside* a text are encoded as ordinary characters, so no text can
    forge a document boundary. Truncation and padding stored with the tokenizer mean nothing here.

    :raises ValueError: the name cannot be loaded, its merges are random, it has no end-of-sequence
        token and none is given, ``eod`` equals ``pad``, or either lies outside its ids.
    """

    def __init__(self, name: str, *, eod: int | None = None, pad: int | None = None) -> None:
        backend, eos_token, pad_token = _load_backend(name)
        _read_whole_texts(backend, name)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        vocab_size = max(vocabulary.values()) + 1
        if eod is None:
            if eos_token is None:
                raise ValueError(
                    f"tokenizer {name} names no end-of-sequence token: give its id (--eod-id)"
                )
            eod = vocabulary[eos_token]
        if pad is None and pad_token is not None and vocabulary[pad_token] != eod:
            pad = vocabulary[pad_token]
        if pad == eod:
            raise ValueError(f"tokenizer {name}: padding and end of document share the id {eod}")
        for role, token in (("end-of-document", eod), ("padding", pad)):
            if token is not None and not 0 <= token < vocab_size:
                raise ValueError(
                    f"tokenizer {name}: {role} id {token} is outside 0..{vocab_size - 1}"
                )
        rules = json.dumps(json.loads(backend.to_str()), sort_keys=True)
        super().__init__(
            TokenizerIdentity(
                kind=HUGGINGFACE,
                name=name,
                vocab_size=vocab_size,
                eod=eod,
                pad=pad,
                fingerprint=hashlib.sha256(rules.encode()).hexdigest(),
            )
        )
        self._backend = backend
        self._silent = {token for token in (eod, pad) if token is not None}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_array(self, text: str) -> NDArray[np.int64]:
        return np.asarray(self.encode(text), dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self._silent]
        text: str = self._backend.decode(kept, skip_special_tokens=False)
        return text


def load_tokenizer(
    kind: str, name: str | None = None, *, eod: int | None = None, pad: int | None = None
) -> Tokenizer:
    """The tokenizer of ``kind`` (``bytes`` or ``huggingface``), with other ids for its marks.

    :raises ValueError: unknown kind, a missing or unloadable name, or unusable ids.
    """
    if kind == BYTES:
        if eod is not None or pad is not None:
            raise ValueError(
                "the byte tokenizer's marks are fixed: end of document 256, padding 257"
            )
        return ByteTokenizer()
    if kind != HUGGINGFACE:
        raise ValueError(f"unknown tokenizer kind {kind!r}: valid are {BYTES}, {HUGGINGFACE}")
    if not name:
        raise ValueError(
            "a huggingface tokenizer needs the name of a folder or of a hub's repository"
        )
    return HuggingFaceTokenizer(name, eod=eod, pad=pad)


def _read_whole_texts(backend: Any, name: str) -> None:
    """Make ``backend`` encode a text whole and alone, whatever its file stores besides its rules.

    ``transformers`` writes the truncation and the padding of its last call into the file and sets
    them anew at every call; the small library would obey what it finds there.

    :raises ValueError: its merges are dropped at random: equal texts would get unequal tokens.
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


def _load_backend(name: str) -> tuple[Any, str | None, str | None]:
    """The Rust tokenizer behind ``name``, its end-of-sequence and its padding token's text."""
    folder = Path(name)
    if (folder / "tokenizer.json").is_file():
        return _load_folder(folder)
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"tokenizer {name}: no {folder / 'tokenizer.json'} on disk, and loading by name needs"
            " the transformers package (pip install 'megatron_ttt[hf]')"
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
    return backend, tokenizer.eos_token, tokenizer.pad_token


def _load_folder(folder: Path) -> tuple[Any, str | None, str | None]:
    """A folder's ``tokenizer.json`` and the two marks its ``tokenizer_config.json`` names."""
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
    marks = [config.get("eos_token"), config.get("pad_token")]
    eos_token, pad_token = (m["content"] if isinstance(m, dict) else m for m in marks)
    for token in (eos_token, pad_token):
        if token is not None and backend.token_to_id(token) is None:
            raise ValueError(
                f"tokenizer {folder} names the token {token!r}, which it does not have"
            )
    return backend, eos_token, pad_token
