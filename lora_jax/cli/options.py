"""What options of several commands have in common."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.formats import atomic


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number, `least` or more.

    >>> whole(1)("8")
    8
    """

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return parse


def need(modules: set[str], extra: str) -> None:
    """Raises where modules of an extra are missing.

    >>> need({"no_such_module"}, extra="train")
    Traceback (most recent call last):
    ModuleNotFoundError: no_such_module not installed: pip install 'lora-jax[train]'
    """
    missing = sorted(name for name in modules if importlib.util.find_spec(name) is None)
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} not installed: pip install 'lora-jax[{extra}]'")


MODEL = "the model's directory, or hf://ORG/NAME to download it"
ADAPTER = "an adapter: adapter.safetensors, a folder that train made, or PEFT's"


class Weighted(NamedTuple):
    """An adapter's path, and what its update is multiplied by."""

    path: Path
    weight: float


def weighted(text: str) -> Weighted:
    """The type of an option that is an adapter, with a weight behind it or without.

    >>> weighted("style=0.5").weight, weighted("lr=1e-3/adapter.safetensors").path.name
    (0.5, 'adapter.safetensors')
    """
    path, sign, number = text.rpartition("=")
    if not sign or Path(text).exists():
        return Weighted(Path(text), 1.0)
    try:
        weight = float(number)
    except ValueError:
        return Weighted(Path(text), 1.0)
    if not math.isfinite(weight) or not weight:
        raise argparse.ArgumentTypeError(f"{text!r}: the weight {number} is none: give a finite number other than 0")
    return Weighted(Path(path), weight)


def refuse_existing(path: Path) -> None:
    """Raises where an output is there already; an empty folder is none."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise FileExistsError(errno.EEXIST, f"{path}: it is there already: {atomic.REMEDIES[errno.EEXIST]}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"{path}: not written, {path.parent} is no folder: make it first")


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Writes numbers for programs, where a file is asked for."""
    if path is not None:
        atomic.write(path, (json.dumps(content, indent=1) + "\n").encode())


def megabytes(size: int) -> str:
    """Bytes for people.

    >>> megabytes(1_234_567), megabytes(2_023_940_464), megabytes(900)
    ('1.2 MB', '2.02 GB', '0.9 kB')
    """
    for unit, name, digits in ((1e9, "GB", 2), (1e6, "MB", 1)):
        if size >= unit:
            return f"{size / unit:.{digits}f} {name}"
    return f"{size / 1e3:.1f} kB"
