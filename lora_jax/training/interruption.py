"""SIGTERM and Ctrl-C as a question that a loop asks after each step, instead of an end in the middle of one."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(SystemExit):
    """Training was asked to stop and has saved its state; the program ends with 128 + the signal's number.

    Attributes:
      signal: Which.
      step: The steps that were taken.
      folder: Where the state is.
    """

    def __init__(self, number: int, step: int, folder: Path):
        super().__init__(128 + number)
        self.signal, self.step, self.folder = signal.Signals(number), step, folder

    def __str__(self) -> str:
        again = "call fit again" if hasattr(sys, "ps1") else f"the same command:\n  {shlex.join(sys.orig_argv)}"
        return f"stopped by {self.signal.name} after step {self.step}, saved in {self.folder}; to go on, {again}"


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[int], int | None]]:
    """While it is open, SIGTERM and SIGINT are noted; a second one does what it did before. So does one that came
    after the loop had asked for the last time, once this is closed. One that is ignored stays so, as a shell has SIGINT
    for what runs in the background.

    Several processes stop after the same step: JAX's runtime agrees on one, of which each is asked at every step.

    Yields:
      A function from the number of steps taken to the signal that came, or None. Outside of the main thread, where
      Python does not let signals be caught, none ever comes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None
        return
    came: list[int] = []
    several = jax.process_count() > 1
    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        came.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        if several:  # what JAX's runtime listens to, and tells the others
            signal.raise_signal(signal.SIGTERM)

    def asked(step: int) -> int | None:
        if several and multihost_utils.reached_preemption_sync_point(step):
            return came[0] if came else int(signal.SIGTERM)
        return None if several or not came else came[0]

    for number in numbers:
        before[number] = signal.signal(number, note) or signal.SIG_DFL  # None: a handler that Python cannot set again
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:  # too late for the loop to ask
        signal.raise_signal(came[0])
