"""Files that are either whole or absent."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from clfed.errors import MissingData, RunFolderError

_BINARY = getattr(os, "O_BINARY", 0)  # other systems have one kind of file


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file.

    Raises:
        MissingData: There is no file at that path.
    """
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MissingData(
            f"expected a file at {path}, found none",
            remedy="Give the path of a file that clfed has saved.",
        ) from error


def write_file(path: str | os.PathLike[str], data: bytes, *, mode: int = 0o666) -> None:
    """Write all bytes or none: a crash leaves the former file as it was.

    Args:
        path: The file.
        data: Its content.
        mode: Permissions from the first byte on, less the umask; ``0o600`` for secrets.

    Raises:
        RunFolderError: The file cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        raise RunFolderError(f"expected to write {target}, got {error}") from error


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open a folder, and flush renames themselves
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
