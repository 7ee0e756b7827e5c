"""Text to token ids and back: bytes without any download, or a Hugging Face tokenizer.

Every tokenizer is loaded here, whoever reads with it. Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_ttt.config.schema import Bos
from megatron_ttt.data.tokenizer_files import load_files, start_ids

BYTES = "bytes"
HUGGINGFACE = "huggingface"


@dataclass(frozen=True)
class TokenizerIdentity:
    """What tells two tokenizers apart, and what a reader of token ids has to know.

    ``vocab_size`` is one more than the largest id the tokenizer can give; ``pad`` is None when it
    has no id for padding that differs from ``eod``; ``fingerprint`` is a SHA-256 of its rules;
    ``start`` are the ids that stand before every document.
    """

    kind: str
    name: str | None
    vocab_size: int
    eod: int
    pad: int | None
    fingerprint: str
    start: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "start": list(self.start)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TokenizerIdentity":
        """Return a record without ``start`` was written when no document got one."""
        whole = {"start": (), **fields}
        known = {name: whole[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "start": tuple(known["start"])})


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

    @property
    def start(self) -> tuple[int, ...]:
        """Ids that stand before a document or prompt."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone: no marks added at either end."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """``start``, then the ids of ``text``: what a model reads from its first position on."""
        ...

    def spelled(self, text: str) -> list[str]:
        """Return the marks that ``text`` spells out, without repetition."""
        ...

    def encode_array(self, text: str) -> NDArray[np.int64]:
        """Return the ids of ``encode`` as an array [tokens]; called once a document."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``; the marks at a document's ends and padding give nothing."""
        ...


class Spelled(Enum):
    """What a special token is that a text spells out, as ``<|end|>``."""

    characters = "characters"  # ordinary ones: no text can forge a document's end
    tokens = "tokens"  # itself, as in a prompt that a chat template was filled into


class _IdentityProperties:
    """``vocab_size``, the marks and what follows from them, for both tokenizers."""

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

    @property
    def start(self) -> tuple[int, ...]:
        return self._identity.start


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

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def spelled(self, text: str) -> list[str]:
        del text
        return []

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
    ``start`` may be given as ids. Whatever the tokenizer adds behind a text is not added here: a
    document ends with ``eod``, and a prompt is to be continued.
    Special tokens spelled out *inside* a text are encoded as ordinary characters, so no text can
    forge a document boundary, unless ``spelled`` says otherwise; a start that such a text spells is
    not doubled. Truncation and padding stored with the tokenizer mean nothing here.

    Raises:
        ValueError: the name cannot be loaded, its merges are random, it has no end-of-sequence
            token and none is given, ``eod`` equals ``pad``, a mark lies outside its ids, or its
            files disagree about what stands before a text and ``start`` is ``Bos.model``.
    """

    def __init__(
        self,
        name: str,
        *,
        eod: int | None = None,
        pad: int | None = None,
        start: Bos | Sequence[int] = Bos.model,
        spelled: Spelled = Spelled.characters,
    ) -> None:
        files = load_files(name)
        backend, eos_token, pad_token = files.backend, files.eos_token, files.pad_token
        self._recognises = spelled is Spelled.tokens
        vocabulary = backend.get_vocab(with_added_tokens=True)
        vocab_size = max(vocabulary.values()) + 1
        if eod is None:
            if eos_token is None:
                raise ValueError(
                    f"tokenizer {name} names no end-of-sequence token: give its id (eod_id)"
                )
            eod = vocabulary[eos_token]
        if pad is None and pad_token is not None and vocabulary[pad_token] != eod:
            pad = vocabulary[pad_token]
        if pad == eod:
            raise ValueError(f"tokenizer {name}: padding and end of document share the id {eod}")
        before = start_ids(files, name, start) if isinstance(start, Bos) else tuple(start)
        starts = (("document start", token) for token in before)
        for role, token in (("end-of-document", eod), ("padding", pad), *starts):
            if token is not None and not 0 <= token < vocab_size:
                raise ValueError(
                    f"tokenizer {name}: {role} id {token} is outside 0..{vocab_size - 1}"
                )
        super().__init__(
            TokenizerIdentity(
                kind=HUGGINGFACE,
                name=name,
                vocab_size=vocab_size,
                eod=eod,
                pad=pad,
                fingerprint=files.fingerprint(),
                start=before,
            )
        )
        backend.encode_special_tokens = not self._recognises
        self._backend = backend
        self._silent = {token for token in (eod, pad, *before) if token is not None}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        ids, start = self.encode(text), list(self.start)
        return ids if self._recognises and ids[: len(start)] == start else start + ids

    def spelled(self, text: str) -> list[str]:
        added = self._backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special and token.content in text]

    def encode_array(self, text: str) -> NDArray[np.int64]:
        return np.asarray(self.encode(text), dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self._silent]
        text: str = self._backend.decode(kept, skip_special_tokens=False)
        return text


def load_tokenizer(
    kind: str,
    name: str | None = None,
    *,
    eod: int | None = None,
    pad: int | None = None,
    start: Bos | Sequence[int] = Bos.model,
    spelled: Spelled = Spelled.characters,
) -> Tokenizer:
    """Open the tokenizer of ``kind`` (``bytes`` or ``huggingface``), with other ids for marks.

    Args:
        start: what stands before a document or prompt.
        spelled: what a special token is that a text spells out.

    Raises:
        ValueError: unknown kind, a missing or unloadable name, or unusable ids.
    """
    if kind == BYTES:
        if eod is not None or pad is not None:
            raise ValueError(
                "the byte tokenizer's marks are fixed: end of document 256, padding 257"
            )
        if start is Bos.add or (not isinstance(start, Bos) and len(start)):
            raise ValueError("the byte tokenizer has no mark for a document's beginning (bos=add)")
        return ByteTokenizer()
    if kind != HUGGINGFACE:
        raise ValueError(f"unknown tokenizer kind {kind!r}: valid are {BYTES}, {HUGGINGFACE}")
    if not name:
        raise ValueError(
            "a huggingface tokenizer needs the name of a folder or of a hub's repository"
        )
    return HuggingFaceTokenizer(name, eod=eod, pad=pad, start=start, spelled=spelled)


def document_ids(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    """Return the start and the ids of ``text`` [tokens], without the end of document."""
    start = np.asarray(tokenizer.start, dtype=np.int64)
    return np.concatenate([start, tokenizer.encode_array(text)])


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer that belongs to a checkpoint, as far as it says.

    ``name`` is ``bytes``, a folder or a name on a hub; ``trained`` is that of the documents which
    the model was trained on. Either is None where it is unknown.
    """

    name: str | None
    trained: TokenizerIdentity | None = None

    def open(
        self,
        name: str | None,
        *,
        bos: Bos | None = None,
        spelled: Spelled = Spelled.characters,
    ) -> Tokenizer | None:
        """Load it; None where no name is known.

        Its marks are those of the training documents, where these were made with the same rules.

        Args:
            name: another one than the checkpoint's.
            bos: what stands before a text; None: what stood before those documents, or what the
                tokenizer adds by itself where they are unknown.

        Raises:
            ValueError: see :func:`load_tokenizer`.
        """
        name = name if name is not None else self.name
        if name is None:
            return None
        if name == BYTES:
            return load_tokenizer(BYTES, start=bos or Bos.model)
        trained = self.trained
        if trained is None or trained.fingerprint != load_files(name).fingerprint():
            return load_tokenizer(HUGGINGFACE, name, start=bos or Bos.model, spelled=spelled)
        start = trained.start if bos is None else bos
        return load_tokenizer(
            HUGGINGFACE, name, eod=trained.eod, pad=trained.pad, start=start, spelled=spelled
        )
