"""Folder: an adapter's two files, written whole or not at all, and read with all the checks that need no model."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from lora_jax.formats import atomic
from lora_jax.formats.description import shown
from lora_jax.formats.peft.fields import seal, understood

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
SHARED = ("base_model.vera_A", "base_model.vera_B")  # which belong to no module
DTYPES = ("F32", "F16", "BF16")
LARGEST = 2**24  # bytes of a configuration
SEAL = "lora_jax"  # in the metadata of the tensors' file, where PEFT does not look


def read(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A folder's configuration and tensors, whole and checked, or an error.

    Args:
      directory: Holds adapter_config.json and adapter_model.safetensors. A link to elsewhere is followed into the
        `blobs` of Hugging Face's cache alone, where the folder is one of its snapshots.

    Returns:
      The configuration, with every field that its type has; and the tensors, finite, by their modules' names in the
      model, such as `model.layers.0.self_attn.q_proj.lora_A.weight`, but for the `SHARED`.

    Raises:
      FileNotFoundError: The folder or one of its files is not there.
      OSError: A file cannot be read, or is a link to elsewhere, or no file.
      ValueError: The configuration is not understood (see `fields`), or was changed after `save`; the tensors' file is
        not whole; a tensor has another dtype, a name without PEFT's prefix, or values that are not finite.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"'{directory}': no such folder; give the one of {CONFIG}, downloaded if it is on the hub"
        )
    files = {name: _file(directory, name) for name in (CONFIG, WEIGHTS)}
    try:
        config = understood(_json(files[CONFIG]))
    except ValueError as error:
        raise ValueError(f"'{directory / CONFIG}': {error}") from error
    try:
        tensors, metadata = _tensors(files[WEIGHTS])
        if metadata.get(SEAL, seal(config)) != seal(config):
            raise ValueError(
                f"it was saved by this library with another {CONFIG}, which changes what the adapter does: put that "
                "back, or save the adapter again"
            )
        return config, {_module_name(name): x for name, x in tensors.items()}
    except ValueError as error:
        raise ValueError(f"'{directory / WEIGHTS}': {error}") from error


def write(directory: Path, config: bytes, weights: bytes) -> None:
    """Writes both files.

    A folder that is not there appears with both. Where there is an adapter, its config, without which it is none, goes
    first and comes last, unless it stays the same: so never does one adapter's config stand by another's weights. Other
    files in the folder are left alone.

    Raises:
      OSError: They cannot be written.
    """
    if not directory.exists():
        with atomic.directory(directory) as new:
            (new / WEIGHTS).write_bytes(weights)
            (new / CONFIG).write_bytes(config)
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


def sealed(content: bytes, config: Mapping[str, Any]) -> bytes:
    """A safetensors file's bytes with the `seal` of a configuration in its metadata, in an order that stays.

    >>> from safetensors.numpy import save
    >>> content = sealed(
    ...     save({"x": np.ones(3)}, {"format": "pt"}), {"peft_type": "VERA", "r": 4, "target_modules": "q"}
    ... )
    >>> json.loads(content[8 : 8 + content[0] + 256 * content[1]])["__metadata__"].keys()
    dict_keys(['format', 'lora_jax'])
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"][SEAL] = seal(config)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _file(directory: Path, name: str) -> Path:
    """A file of a folder, which is nowhere else."""
    path, folder = directory / name, directory.resolve()
    place = path.resolve()
    if not path.exists():
        if name == WEIGHTS and (directory / PICKLE).exists():
            raise FileNotFoundError(
                errno.ENOENT,
                f"'{directory}' has {PICKLE} alone, a pickle, which may run any code and is never opened: load it in "
                "PEFT, where you trust it, and save_pretrained there, which writes safetensors",
            )
        inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
        hint = (
            f"give one of its folders, {', '.join(inside[:5])}" if inside else "copy it from where the others are from"
        )
        raise FileNotFoundError(errno.ENOENT, f"'{path}' is missing: {hint}")
    if folder not in place.parents and place.parent != folder.parent.parent / "blobs":
        raise OSError(errno.EPERM, f"'{path}' is a link out of its folder, which is not followed: copy the file there")
    if not place.is_file():
        raise OSError(errno.EINVAL, f"'{path}' is no file")
    return place


def _json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    def refused(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    if path.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST // 2**20} MiB, and no configuration")
    try:
        return json.loads(path.read_bytes().decode(), object_pairs_hook=unique, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({shown(error)}): copy it again") from error


def _tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file by name, and its metadata."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names, metadata = sorted(file.keys()), file.metadata() or {}
            for name in names:
                if (dtype := file.get_slice(name).get_dtype()) not in DTYPES:
                    raise ValueError(f"{name[:200]!r} is {dtype}, and adapters are {', '.join(DTYPES)}: convert it")
            tensors = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"no whole safetensors file ({shown(error)}): copy it again") from error
    if not tensors:
        raise ValueError("it holds no tensors")
    for name, x in tensors.items():
        if not np.isfinite(x).all():
            raise ValueError(f"{name[:200]!r} has values that are not finite: save the adapter of a step before")
    return tensors, metadata


def _module_name(name: str) -> str:
    if name in SHARED:
        return name
    if not name.startswith(PREFIX) or name.removeprefix(PREFIX) in SHARED:
        raise ValueError(
            f"{name[:200]!r} does not begin with '{PREFIX}', as PEFT's tensors do, and would be ignored there: save "
            "the folder with PEFT's save_pretrained, or rename its tensors"
        )
    return name.removeprefix(PREFIX)
