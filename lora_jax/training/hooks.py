"""What happens between steps: each hook is told the steps taken, the state and the metrics, and may add to these."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def every(steps: int, hook: Callable[[int, Any, Mapping[str, Any]], Any]) -> Callable[..., Any]:
    """The hook, called after each so many steps alone.

    >>> hook = every(2, lambda step, state, metrics: {"called": step})
    >>> hook(3, None, {}), hook(4, None, {})
    (None, {'called': 4})
    """
    if steps < 1:
        raise ValueError(f"every({steps}, ...): a hook is called after one step or more")

    def called(step: int, state: Any, metrics: Mapping[str, Any]) -> Any:
        return hook(step, state, metrics) if step % steps == 0 else None

    for name in ("get_state", "set_state"):  # one that resumes still does
        if hasattr(hook, name):
            setattr(called, name, getattr(hook, name))
    return called


def log(write: Callable[[str], Any] = print) -> Callable[..., None]:
    """A line of all metrics. It waits for the step: call it `every` so many.

    >>> log()(50, None, {"grad_norm": 1.5, "loss": 0.04123})
    step 50: loss 0.04123, grad_norm 1.5
    """

    def line(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
        names = sorted(metrics, key=lambda name: name != "loss")  # it comes first
        write(f"step {step}: " + ", ".join(f"{name} {float(metrics[name]):.4g}" for name in names))

    return line


def evaluation(fun: Callable[[Any], Mapping[str, Any]], prefix: str = "eval_") -> Callable[..., dict[str, Any]]:
    """What `fun(lora_params)` finds, as metrics for the hooks that follow and for what is kept as best.

    >>> evaluation(lambda lora_params: {"loss": 0.5})(1, type("State", (), {"lora_params": {}}), {})
    {'eval_loss': 0.5}
    """
    return lambda step, state, metrics: {prefix + name: x for name, x in fun(state.lora_params).items()}


class EarlyStopping:
    """Says stop once a metric has not been better than its best for so many evaluations; resumes where it was.

    >>> stopping = EarlyStopping(patience=2)
    >>> [stopping(step, None, {"eval_loss": loss}) for step, loss in enumerate([1.0, 0.9, 0.95, 0.9])]
    [None, None, None, {'stop': True}]
    """

    def __init__(self, metric: str = "eval_loss", *, mode: str = "min", patience: int = 3, min_delta: float = 0.0):
        """A hook.

        Args:
          metric: Which one; steps whose metrics lack it do not count. One that is not finite is not better.
          mode: Whether the "min" or the "max" is best.
          patience: How many in a row may be no better before it stops.
          min_delta: By how much one has to be better to count as better.
        """
        if mode not in ("min", "max"):
            raise ValueError(f"EarlyStopping(mode={mode!r}): mode is 'min' or 'max'")
        if patience < 1:
            raise ValueError(f"EarlyStopping(patience={patience}): it waits for one evaluation at least")
        self.metric, self.sign, self.patience, self.min_delta = metric, 1 if mode == "min" else -1, patience, min_delta
        self.best, self.waited = math.inf, 0

    def __call__(self, step: int, state: Any, metrics: Mapping[str, Any]) -> dict[str, bool] | None:
        """The hook."""
        if self.metric not in metrics:
            return None
        value = self.sign * float(metrics[self.metric])
        better = math.isfinite(value) and value < self.best - self.min_delta
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        return {"stop": True} if self.waited >= self.patience else None

    def get_state(self) -> dict[str, Any]:
        """The best so far and the evaluations since, for a checkpoint."""
        return {"best": self.best if math.isfinite(self.best) else None, "waited": self.waited}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As `get_state` gave it."""
        self.best, self.waited = math.inf if state["best"] is None else state["best"], state["waited"]
