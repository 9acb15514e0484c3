"""Quiet: no stacks on stderr of a checkpoint that could not be written, as on a full disk, which is told in a line."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

CLOSED = "Event loop is closed"  # of what tensorstore had yet to write when the first of it failed


@contextlib.contextmanager
def quiet(debug: bool = False) -> Iterator[None]:
    """While it is open, orbax does not log, by absl, what it raises too, and tensorstore's threads print nothing.

    Args:
      debug: Whether they do all the same.

    >>> with quiet():
    ...     logging.getLogger("absl").isEnabledFor(logging.ERROR)
    False
    """
    if debug:
        yield
        return
    orbax, hook = logging.getLogger("absl"), sys.excepthook
    level = orbax.level
    orbax.setLevel(logging.CRITICAL)
    sys.excepthook = lambda kind, error, trace: None if str(error) == CLOSED else hook(kind, error, trace)
    try:
        yield
    finally:
        sys.excepthook = hook
        orbax.setLevel(level)
