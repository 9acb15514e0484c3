"""Atomic writing: a file or a directory appears whole or not at all, also where the process is killed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

REMEDIES = {
    errno.EEXIST: "choose another name, or remove it first",
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
    path, temporary = Path(path), _beside(path)
    with _explained(path):
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
    return path


@contextlib.contextmanager
def directory(path: str | os.PathLike[str], size: int = 0) -> Iterator[Path]:
    """A directory to fill, beside the one of that name, which it becomes in the end.

    Args:
      path: The directory; one that is there must be empty.
      size: How many bytes it will hold: where the disk has less, that is said at once.

    Raises:
      OSError: It cannot be written, as in `write`, or holds something. Where anything is raised, nothing is left.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with directory(f"{folder}/new") as new:
    ...         _ = (new / "file").write_bytes(b"whole")
    ...     Path(folder, "new", "file").read_bytes()
    b'whole'
    """
    path, temporary = Path(path), _beside(path)
    with _explained(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(errno.EEXIST, "it is there, and holds something")
        temporary.mkdir()
        try:
            _check_space(temporary, size)
            yield temporary
            for file in temporary.iterdir():
                keep(file)
            keep(temporary)
            if path.exists():
                path.rmdir()
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        keep(path.parent)


def _check_space(folder: Path, size: int) -> None:
    """Raises where a folder's disk has less than this free, if it says how much it has."""
    free = shutil.disk_usage(folder).free
    if size > free:
        cause = f"it takes {size / 1e6:,.3f} MB, and {free / 1e6:,.3f} MB are free"
        raise OSError(errno.ENOSPC, cause)


def _beside(path: str | os.PathLike[str]) -> Path:
    """A name that nothing else has, in the same folder."""
    path = Path(path)
    return path.parent / f".{path.name[:32]}.{secrets.token_hex(4)}"


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        remedy = REMEDIES.get(error.errno or 0, "what was there is as it was")
        raise OSError(error.errno, f"{path}: not written ({cause}): {remedy}") from error


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
