"""Atomic writing: a file appears whole or not at all, also where the process is killed or the machine stops."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

REMEDIES = {
    errno.ENOENT: "make its folder first",
    errno.ENOTDIR: "choose another folder",
    errno.EISDIR: "give the name of a file in it",
    errno.EACCES: "choose another folder, or change this one's permissions",
    errno.EPERM: "choose another folder, or change this one's permissions",
    errno.EROFS: "choose another folder",
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EFBIG: "choose another disk, or raise the limit that `ulimit -f` shows",
    errno.ENAMETOOLONG: "take a shorter one",
}


def write(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes a file at once: beside it first, down to the disk, then under its name.

    Args:
      path: The file; one that is there is replaced, and stays as it is where anything fails.
      content: What it will hold.

    Returns:
      The path.

    Raises:
      OSError: It cannot be written. The subclass and `errno` are the operating system's, and the message names the
        path, the cause and the remedy. No other file is left behind.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/file", b"whole").read_bytes()
    b'whole'
    """
    path = Path(path)
    temporary = path.parent / f".{path.name[:32]}.{secrets.token_hex(4)}"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        keep(path.parent)
    except OSError as error:
        cause = error.strerror or str(error)
        remedy = REMEDIES.get(error.errno or 0, "what was there is as it was")
        raise OSError(error.errno, f"{path}: not written ({cause}): {remedy}") from error
    return path


def keep(path: Path) -> None:
    """Has the disk keep a file, or a folder's entries, where the operating system can be asked to."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # as Windows says of any folder
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(handle)
