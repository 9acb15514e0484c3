"""Figure: a run's losses by its steps, in training and on held-out rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def draw(log: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Draws a log, if matplotlib is installed.

    Returns:
      Whether it is.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [line["step"] for line in log if "loss" in line]
    losses = np.array([line["loss"] for line in log if "loss" in line])
    tests = [(line["step"], line["eval_loss"]) for line in log if "eval_loss" in line]
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    window = 1 + min(20, len(losses) // 10)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8, marker="." if len(steps) < 3 else None)
    mean = f"training, mean of {window} steps" if window > 1 else "training"
    axes.plot(steps[window // 2 :][: len(smooth)], smooth, color="C0", label=mean)
    if tests:
        axes.plot(*zip(*tests, strict=True), color="C1", marker="o", label="held out")
    axes.set(xlabel="step", ylabel="cross-entropy (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
    return True
