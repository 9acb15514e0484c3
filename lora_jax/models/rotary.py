"""Rotary positions (Su et al. 2021, arXiv:2104.09864), stretched or not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.fields import check_fields


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretched rotary positions: all frequencies divided by `factor` ("linear"), or slow ones, as Llama 3.1 does it.

    With the other fields, frequencies of fewer than `low_freq_factor` turns in the length trained on are divided, those
    of more than `high_freq_factor` turns are kept, and there is a smooth way between.
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        given = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        if any(value is None for value in given) != (given == (None, None, None)):
            raise ValueError(f"{self}: give all of the fields, or factor alone")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"{self}: make high_freq_factor more than low_freq_factor")

    @classmethod
    def from_huggingface(cls, scaling: Mapping[str, Any] | None) -> RopeScaling | None:
        """Read the entry `rope_scaling`; None where positions are not stretched."""
        kinds = [str(scaling[name]) for name in ("rope_type", "type") if name in scaling] if scaling else []
        kind = next(iter(kinds), "none")
        if scaling is None or kind == "default" or set(scaling) == {"rope_theta"}:
            return None
        names = [field.name for field in dataclasses.fields(cls)]
        needed = {"linear": names[:1], "llama3": names}.get(kind, [])
        if len({*kinds}) != 1 or not needed or any(name not in scaling for name in needed):
            raise ValueError(
                f"config.json: rope_scaling is {dict(scaling)}, this decoder has 'llama3' with {', '.join(names)}, "
                "'linear' with factor, or none: load a model with that"
            )
        return cls(**{name: scaling[name] for name in needed})


def frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians a position, for each pair of a head's entries: float32 [width / 2].

    >>> frequencies(4, 100.0).tolist()
    [1.0, 0.10000000149011612]
    """
    turn = theta ** -(np.arange(0, width, 2) / width)
    if scaling is None:
        pass
    elif scaling.original_max_position_embeddings is None:
        turn = turn / scaling.factor
    else:
        turns = scaling.original_max_position_embeddings * turn / (2 * math.pi)  # within the length trained on
        low, high = scaling.low_freq_factor or 0, scaling.high_freq_factor or 0
        kept = np.clip((turns - low) / (high - low), 0, 1)
        turn = turn * (kept + (1 - kept) / scaling.factor)
    return turn.astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn the first half of each head's entries with the second, [B, L, heads, width], by [B or 1, L, width / 2]."""
    cos, sin = (fun(angles)[:, :, None, :] for fun in (jnp.cos, jnp.sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
