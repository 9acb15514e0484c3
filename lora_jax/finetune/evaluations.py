"""Evaluations: on held-out rows, before, between and after the steps; the best adapter is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lora_jax as lora

PREFIX = "eval_"


class Evaluations:
    """A hook of `lora_jax.training.fit` that evaluates, and keeps the best adapter in a file where it is asked to.

    Attributes:
      last: What the last evaluation found.
      best: What the best found, by its loss; `step` is after which.
    """

    def __init__(
        self,
        evaluate: Callable[[Any], dict[str, float]],
        steps: int,
        every: int | None,
        before: Mapping[str, float],
        best: Path | None = None,
    ):
        """A hook.

        Args:
          evaluate: From adapters to metrics, "loss" among them.
          steps: Of the run; it evaluates after the last.
          every: After how many steps else; None for no other.
          before: What there was before the first step.
          best: Where the best adapter is kept; None for none.
        """
        self.evaluate, self.steps, self.every, self.file = evaluate, steps, every, best
        self.last, self.best, self.step = dict(before), dict[str, float](), 0

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> dict[str, float] | None:
        """The hook."""
        if step != self.steps and not (self.every and step % self.every == 0):
            return None
        self.last = self.evaluate(state.lora_params)
        loss = self.last["loss"]
        if math.isfinite(loss) and loss < self.best.get("loss", math.inf):
            self.best, self.step = self.last, step
            if self.file is not None:
                lora.save(self.file, state.lora_params)
        return {PREFIX + name: x for name, x in self.last.items()}

    def get_state(self) -> dict[str, Any]:
        """For a checkpoint. A step that is repeated after it writes the file again, with the same bits."""
        return {"last": self.last, "best": self.best, "step": self.step}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As `get_state` gave it."""
        self.last, self.best, self.step = state["last"], state["best"], state["step"]
