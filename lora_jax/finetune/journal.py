"""Journal: the log of a run, a line of JSON for each step, and what is told of it while it trains."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

# Told how it goes: the steps taken, and what the log has of the last of them.
Watch = Callable[[int, Sequence[Mapping[str, Any]]], None]
PATIENCE = 1.0  # seconds, after which metrics are fetched in any case


class Diverged(FloatingPointError):
    """A loss or a gradient is not finite."""


class Journal:
    """A hook of `lora_jax.training.fit`, after those whose metrics are to be in the log.

    Metrics are fetched from the devices for many steps at once. The log is on the disk when a checkpoint is, which
    knows how long it was; going on from the checkpoint, what is after that is cut off, so that each step has one line.
    """

    def __init__(
        self,
        file: Path | None,
        watch: Watch,
        rates: Sequence[float],
        tokens: Callable[[int], int],
        *,
        every: int,
        first: Mapping[str, Any] | None = None,
    ):
        """A log.

        Args:
          file: Where it is; None for none, as in processes that do not write.
          watch: Told of each batch of steps that was fetched.
          rates: The learning rate of each step.
          tokens: How many tokens the batch of a step has, which is counted from 1.
          every: After how many steps at most metrics are fetched.
          first: A line for step 0.
        """
        self.file, self.watch, self.rates, self.tokens, self.every = file, watch, rates, tokens, every
        self.pending: list[tuple[int, Mapping[str, Any]]] = []
        self.first, self.kept, self.seen, self.opened = first, 0, 0, False
        self.since = time.perf_counter()

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        """The hook."""
        self.pending.append((step, {name: x for name, x in metrics.items() if name != "stop"}))
        if step % self.every == 0 or len(metrics) > 2 or time.perf_counter() - self.since > PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Fetches and writes what is pending.

        Raises:
          Diverged: A loss or a gradient is not finite.
        """
        if not self.pending:
            return
        fetched = jax.device_get([metrics for _, metrics in self.pending])
        now = time.perf_counter()
        counts = [self.tokens(step) for step, _ in self.pending]
        speed = sum(counts) / max(now - self.since, 1e-9)
        lines = []
        for (step, _), metrics, count in zip(self.pending, fetched, counts, strict=True):
            self.seen += count
            about = {"step": step, **{name: float(x) for name, x in metrics.items()}}
            about |= {"learning_rate": self.rates[step - 1], "tokens": self.seen, "tokens_per_second": round(speed, 1)}
            lines.append(about)
        self.pending, self.since = [], now
        bad = next((line for line in lines if not all(map(math.isfinite, (line["loss"], line["grad_norm"])))), None)
        self._write(lines if bad is None else lines[: lines.index(bad)])
        if bad is not None:
            raise Diverged(
                f"step {bad['step']}: the loss is {bad['loss']} and the norm of the gradient {bad['grad_norm']}: "
                "training has diverged, and nothing is exported"
            )
        self.watch(lines[-1]["step"], lines)

    def get_state(self) -> dict[str, int]:
        """How long the log is, with all steps so far, and how many tokens they had."""
        self.flush()
        self._write([])
        if self.file is None:
            return {"bytes": 0, "tokens": self.seen}
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())
        return {"bytes": self.file.stat().st_size, "tokens": self.seen}

    def set_state(self, state: Mapping[str, int]) -> None:
        """As `get_state` gave it."""
        self.kept, self.seen = state["bytes"], state["tokens"]

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if self.file is None:
            return
        if not self.opened:
            self.file.touch()
            os.truncate(self.file, min(self.kept, self.file.stat().st_size))
            if not self.kept and self.first is not None:
                lines = [{"step": 0, **self.first}, *lines]
            self.opened = True
        with open(self.file, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
