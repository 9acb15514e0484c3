"""Folder: an adapter's two files, which appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from lora_jax.formats import atomic
from lora_jax.formats.peft.read import CONFIG, WEIGHTS


def write(directory: Path, config: bytes, weights: bytes) -> None:
    """Writes both files.

    A folder that is not there appears with both. Where there is an adapter, its config, without which it is none, goes
    first and comes last, unless it stays the same: so never does one adapter's config stand by another's weights. Other
    files in the folder are left alone.

    Raises:
      OSError: They cannot be written.
    """
    if not directory.exists():
        temporary = directory.parent / f".{directory.name[:32]}.{secrets.token_hex(4)}"
        temporary.mkdir()
        try:
            atomic.write(temporary / WEIGHTS, weights)
            atomic.write(temporary / CONFIG, config)
            os.rename(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        atomic.keep(directory.parent)
        return
    old = directory / CONFIG
    if old.exists() and old.read_bytes() == config:
        atomic.write(directory / WEIGHTS, weights)
        return
    # What may fail, for want of space or rights, fails before anything is taken away.
    spare = atomic.write(directory / f".{WEIGHTS}.{secrets.token_hex(4)}", weights)
    try:
        old.unlink(missing_ok=True)
        os.replace(spare, directory / WEIGHTS)
    except BaseException:
        spare.unlink(missing_ok=True)
        raise
    atomic.write(old, config)
