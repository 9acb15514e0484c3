"""Rounding: float32 weights in a narrower dtype, to the nearest or at random without bias, and what ΔW loses by it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


class Loss(NamedTuple):
    """What rounding does to the update of a tensor, ΔW: of what is added to the rounded base, how much is not ΔW.

    Attributes:
      name: The tensor.
      update: ‖ΔW‖², in the Frobenius norm.
      error: ‖(rounded(W + ΔW) - rounded(W)) - ΔW‖².
      moved: How many entries ΔW moves.
      stuck: How many of them are as the rounded base's all the same.
    """

    name: str
    update: float
    error: float
    moved: int
    stuck: int

    @property
    def share(self) -> float:
        """The norm of the error over that of ΔW.

        >>> Loss("w", update=4.0, error=1.0, moved=10, stuck=3).share
        0.5
        """
        return math.sqrt(self.error / self.update) if self.update else 0.0


def total(losses: Iterable[Loss], name: str = "") -> Loss:
    """All of these as one."""
    columns = [*zip(*(loss[1:] for loss in losses), strict=True)] or [()] * 4
    return Loss(name, *map(sum, columns))


def loss_of(name: str, exact: np.ndarray, base: np.ndarray, rounded: np.ndarray) -> Loss:
    """The loss of some entries.

    Args:
      name: Of the tensor.
      exact: W + ΔW, float32 or wider.
      base: W, in the same dtype.
      rounded: What `exact` became.
    """
    delta = exact - base
    added = rounded.astype(exact.dtype) - base.astype(rounded.dtype).astype(exact.dtype)
    moved = delta != 0
    return Loss(
        name,
        _square(delta),
        _square(added - delta),
        int(np.count_nonzero(moved)),
        int(np.count_nonzero(moved & (added == 0))),
    )


def stream(seed: int, name: str) -> np.random.Generator:
    """Random numbers for one tensor, which depend on the seed and its name alone."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")])


def stochastic(draws: np.random.Generator, x: np.ndarray, dtype: Any) -> np.ndarray:
    """Each entry as one of its two neighbors in a narrower dtype, the nearer the likelier: it is x on average.

    What the dtype has is itself.

    Args:
      draws: Random numbers, one for each entry in C order.
      x: float32 or wider.
      dtype: bfloat16 or float16.

    Source: Croci et al. 2022, https://arxiv.org/abs/2108.05216.

    >>> import jax.numpy as jnp
    >>> x = np.full(40_000, 1 + 1 / 512, np.float32)
    >>> rounded = stochastic(np.random.default_rng(0), x, jnp.bfloat16).astype(np.float32)
    >>> np.unique(rounded).tolist(), abs(rounded.mean() - x[0]) < 1e-4
    ([1.0, 1.0078125], np.True_)
    """
    draw = draws.random(x.shape, np.float32)
    nearest = x.astype(dtype)
    wide = nearest.astype(x.dtype)
    rest = x - wide
    other = np.nextafter(nearest, np.where(rest > 0, np.inf, -np.inf).astype(dtype))
    with np.errstate(invalid="ignore"):  # where x is what it is rounded to, or is none of the dtype's finite numbers
        chance = rest / (other.astype(x.dtype) - wide)
    return np.where(draw < chance, other, nearest)


def _square(x: np.ndarray) -> float:
    flat = x.reshape(-1)
    return float(np.dot(flat, flat))
