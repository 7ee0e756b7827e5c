"""A corpus every machine has: the source of the running Python's standard library.

Tens of megabytes of real text (about 30 MB with the library's own tests, which are kept because
they are half of it), with the long range that code has: names defined far above their use.
One document per file, byte tokens, in an order shuffled by a fixed seed, so that the last per cent,
which becomes the validation split, is not the end of the alphabet.
"""

import hashlib
import os
import platform
import random
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_ttt.data.checks import IndexedDatasetError, check_indexed_dataset
from megatron_ttt.data.indexed import IndexedWriter, Sidecar, sidecar_path, token_dtype
from megatron_ttt.data.tokenizers import ByteTokenizer
from megatron_ttt.files import show_folder

SHUFFLE_SEED = 20240406
_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


def library_files(root: Path) -> list[Path]:
    """Return the library's ``.py`` files below ``root`` by path, installed packages left out."""
    files = (path for path in root.rglob("*.py") if path.is_file())
    return sorted(p for p in files if not _FOREIGN_FOLDERS & set(p.relative_to(root).parts))


def python_stdlib_corpus(
    cache_dir: str | Path,
    *,
    is_builder: bool = True,
    barrier: Callable[[], None] = lambda: None,
    root: Path | None = None,
) -> str:
    """Prefix of the corpus, built in ``cache_dir`` on first use.

    Its folder is named by the Python version and a hash of the files' names and sizes, and appears
    by one rename: a folder that exists is complete. Every process calls this; the one with
    ``is_builder`` builds, ``barrier`` makes the others wait for it.

    Args:
        root: another library's folder, for tests; None: the running interpreter's.

    Raises:
        ValueError: the library has no usable source file (a zipped or stripped Python).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = library_files(root)
    listed = "\n".join(f"{path.relative_to(root)} {path.stat().st_size}" for path in files)
    digest = hashlib.sha256(listed.encode()).hexdigest()[:12]
    folder = Path(cache_dir) / "python_stdlib" / f"{platform.python_version()}-{digest}"
    try:
        if is_builder and not _is_complete(folder):
            _build(root, files, folder)
    finally:
        # reached after a failure too: the others then find nothing and say so, rather than wait
        barrier()
    if not _is_complete(folder):
        raise ValueError(
            f"data.source=python_stdlib: the corpus {folder} was not built"
            " (data.cache_dir has to be on a disk that every node sees)"
        )
    return str(folder / "corpus")


def _is_complete(folder: Path) -> bool:
    """Also False for a folder whose files were damaged since: it is then built again."""
    try:
        return check_indexed_dataset(folder / "corpus").sidecar is not None
    except IndexedDatasetError:
        return False


def _build(root: Path, files: list[Path], folder: Path) -> None:
    tokenizer = ByteTokenizer()
    order = list(files)
    random.Random(SHUFFLE_SEED).shuffle(order)
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    longest, longest_source, text_bytes = 0, "", 0
    skipped = {"undecodable": 0, "empty": 0}
    with IndexedWriter(beside / "corpus", token_dtype(tokenizer.vocab_size)) as writer:
        for path in order:
            try:
                text = path.read_bytes().decode("utf-8")
            except (
                UnicodeDecodeError
            ):  # a few tests of the tokeniser are other encodings on purpose
                skipped["undecodable"] += 1
                continue
            if not text.strip():
                skipped["empty"] += 1
                continue
            ids = tokenizer.encode_array(text)
            writer.add(np.append(ids, tokenizer.eod))
            text_bytes += len(ids)
            if len(ids) + 1 > longest:
                longest, longest_source = len(ids) + 1, str(path)
    documents = len(writer.lengths)
    if documents == 0:
        shutil.rmtree(beside)
        raise ValueError(
            f"data.source=python_stdlib: no source file of Python's library below {root}"
        )
    Sidecar(
        tokenizer=tokenizer.identity,
        dtype=str(writer.dtype),
        documents=documents,
        tokens=sum(writer.lengths),
        pad_tokens=0,
        text_bytes=text_bytes,
        max_token_id=tokenizer.eod,
        align=0,
        longest_document_tokens=longest,
        longest_source=longest_source,
        skipped={reason: count for reason, count in skipped.items() if count},
    ).write(sidecar_path(beside / "corpus"))
    shutil.rmtree(folder, ignore_errors=True)  # only a damaged one can be there
    try:
        show_folder(beside, folder)
    except OSError:
        # another run built the same corpus meanwhile; the caller checks what is there
        shutil.rmtree(beside)
