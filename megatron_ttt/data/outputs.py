"""Where a preprocessing job writes: may it, and does it spare what is there?"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_ttt.data.indexed import bin_path, idx_path, sidecar_path
from megatron_ttt.data.inputs import InputFile

# What a job leaves in its folder; anything else there is somebody's own.
# A leading dot is that of a file that was being replaced when its process was killed.
_OURS = re.compile(r"\.?(shard-\d{6}|merged|manifest)(\.\w+)*(\.new)?|publishing|lock")


def check_output(output: str, folder: Path, files: Sequence[InputFile], *, overwrite: bool) -> None:
    """Refuse to replace a dataset unasked, or an input ever; a half published job may go on.

    Files are compared as what they are, not by name: links and ``..`` give one file many names.

    Args:
        output: prefix of the dataset.
        folder: where the job works.

    Raises:
        ValueError: one line that names what is in the way.
    """
    if os.path.basename(output) in ("", ".", ".."):
        folder_named = output or "'' (empty)"
        raise ValueError(f"output={folder_named} names a folder: give a prefix, as dir/corpus")
    for above in Path(output).absolute().parents:
        if above.exists() and not above.is_dir():
            raise ValueError(f"output={output}: {above} is a file, not a folder")
    _check_working_folder(folder, files)
    inputs = {_file_key(file.path): file.path for file in files}
    for path in (bin_path(output), idx_path(output), sidecar_path(output)):
        if not path.exists():
            continue
        if (replaced := inputs.get(_file_key(path))) is not None:
            raise ValueError(f"output={output} would replace the input {replaced}")
        if path.is_dir():
            raise ValueError(f"{path} is a folder: choose another output")
        if not overwrite and not (folder / "publishing").exists():
            raise ValueError(f"{path} exists: choose another output, or give overwrite=true")


def _check_working_folder(folder: Path, files: Sequence[InputFile]) -> None:
    """Refuse a folder with anything but a job's files: what lies in it is deleted at the end."""
    for file in files:
        path = Path(file.path)
        for lies in (path.parent.resolve(), path.resolve().parent):
            if folder.resolve() in (lies, *lies.parents):
                raise ValueError(f"{folder} is needed, but the input {path} lies in it")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: it is needed as a folder, move it")
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() or not _OURS.fullmatch(path.name):
            raise ValueError(f"{path} is not part of a job: move it, {folder} is needed")


def _file_key(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
