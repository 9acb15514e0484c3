"""What options of several commands have in common."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MODEL = "a model's directory, or hf://ORG/NAME to download one"
ADAPTER = "an adapter: what train wrote, a file of lora_jax.save, or PEFT's folder"


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


def positive(most: float | None = None) -> Callable[[str], float]:
    """The type of an option that is a number above 0, `most` or less.

    >>> positive(1)("0.9")
    0.9
    """
    words = "a number above 0" + ("" if most is None else f" and up to {most:g}")

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf") or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return number

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


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json FILE`."""
    parser.add_argument("--json", metavar="FILE", type=Path, help="what is shown, for programs, into a new file")


def check_new(file: Path | None, out: Path | None = None) -> None:
    """Raises where a file that is to be written is there, or cannot be, or is what `--out` names; None is none.

    >>> check_new(Path("no/such/folder/found.json"))
    Traceback (most recent call last):
    FileNotFoundError: 'no/such/folder' is no directory: make it first, or give a name in another
    """
    if file is None:
        return
    if out is not None and file.absolute() == out.absolute():
        raise ValueError(f"--json {file}: --out is written there: give a file another name")
    _check_free(file)


def refuse_existing(path: Path) -> None:
    """Raises where an output is there already, or cannot be; an empty folder is none."""
    if not path.is_dir() or any(path.iterdir()):
        _check_free(path)


def _check_free(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"'{path}' is there already, and nothing is overwritten: move it, or give another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"'{path.parent}' is no directory: make it first, or give a name in another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"'{path.parent}' may not be written to: change its permissions, or take another folder")


def write_json(file: Path | None, content: Any) -> None:
    """Writes what is shown, for programs, whole or not at all; None is nowhere."""
    if file is not None:
        from lora_jax.formats import atomic

        atomic.write(file, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


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
