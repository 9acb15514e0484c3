"""Header: what an adapter file says of itself in front of its tensors."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.factors import LoraParams
from lora_jax.formats.description import restore, shown

# What the metadata of each format holds: (always, sometimes). Format 2 has the version that wrote it, and the base.
FORMATS = {1: ({"format", "adapters"}, set()), 2: ({"format", "adapters", "lora_jax"}, {"base"})}
FORMAT = max(FORMATS)


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
      adapters: The adapters, with the name of its tensor as each factor.
      base: The fingerprint of the base that they were made for; None where it is not said.
      version: Of the library that wrote it; "" where it is not said.
    """

    adapters: LoraParams
    base: dict[str, str] | None
    version: str


def read(path: Path) -> Header:
    """The header of an adapter file; no tensor is read.

    Raises:
      OSError: There is no such file, or it cannot be read.
      ValueError: It is no adapter file, or damaged; the message does not name it.

    >>> import tempfile, jax.numpy as jnp, lora_jax as lora
    >>> adapter = lora.Adapter({"weight": jnp.zeros(3)}, lora.Full(), lora.Site((3,), "other"))
    >>> read(lora.save(f"{tempfile.mkdtemp()}/adapter.safetensors", {"bias": adapter})).adapters["bias"].factors
    {'weight': 'bias:weight'}
    """
    described = _json(_metadata(path), "metadata")
    version = described.get("format") if isinstance(described, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"its metadata is damaged (format {shown(version)}): copy or save it again")
    if version > FORMAT:
        raise ValueError(f"format {version}, and this version reads formats up to {FORMAT}: update lora_jax")
    always, sometimes = FORMATS[version]
    if odd := sorted((always - described.keys()) | (described.keys() - always - sometimes)):
        cause = f"{'no' if odd[0] in always else 'an unknown'} entry {odd[0]!r}"
        raise ValueError(f"its metadata is damaged ({cause}): copy or save it again")
    base, wrote = described.get("base", {}), described.get("lora_jax", "")
    if not isinstance(wrote, str) or not isinstance(base, dict) or not all(isinstance(x, str) for x in base.values()):
        raise ValueError("its metadata is damaged (a version or a fingerprint that is none): copy or save it again")
    return Header(restore(described["adapters"]), base or None, wrote)


def _metadata(path: Path) -> str:
    """What a file's metadata says of the adapters, if it is a safetensors file that has such."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, f"{path}: no such adapter file")
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR,
            f"{path}: a folder, and no adapter file: give the file in it, or, if checkpoints are, let "
            "lora_jax.formats.orbax.load read them",
        )
    if not path.is_file():
        raise OSError(errno.EINVAL, f"{path}: a pipe or a device, and no adapter file")
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= os.fstat(file.fileno()).st_size - 8:
            raise ValueError("no whole safetensors file (its header does not end in it): copy or save it again")
        header = _json(file.read(size), "header")
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        if not isinstance(metadata, dict) or not isinstance(metadata.get("lora_jax"), str):
            raise ValueError("a safetensors file, but not one that lora_jax.save wrote: its metadata is missing")
    return metadata["lora_jax"]


def _json(text: str | bytes, what: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {what} is damaged ({shown(error)}): copy or save it again") from error
