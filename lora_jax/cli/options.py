"""What options of several commands have in common."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable


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
