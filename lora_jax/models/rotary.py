"""Rotary positions (Su et al. 2021, arXiv:2104.09864), stretched as in Llama 3.1 or not."""

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
    """Llama 3.1's stretched rotary positions: slow frequencies divided by `factor`, and a smooth way between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_huggingface(cls, scaling: Mapping[str, Any] | None) -> RopeScaling | None:
        """Read the entry `rope_scaling`; None where positions are not stretched."""
        kind = None if scaling is None else scaling.get("rope_type", scaling.get("type"))
        if scaling is None or kind == "default" or set(scaling) == {"rope_theta"}:
            return None
        names = [field.name for field in dataclasses.fields(cls)]
        if kind != "llama3" or any(name not in scaling for name in names):
            raise ValueError(
                f"config.json: rope_scaling is {dict(scaling)}, this decoder has 'llama3' with {', '.join(names)}, or "
                "none: load a model with that"
            )
        return cls(**{name: scaling[name] for name in names})


def frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians a position, for each pair of a head's entries: float32 [width / 2].

    >>> frequencies(4, 100.0).tolist()
    [1.0, 0.10000000149011612]
    """
    turn = theta ** -(np.arange(0, width, 2) / width)
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * turn / (2 * math.pi)  # within the length trained on
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        turn = turn * (kept + (1 - kept) / scaling.factor)
    return turn.astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn the first half of each head's entries with the second, [B, L, heads, width], by angles [L, width / 2]."""
    cos, sin = (fun(angles)[:, None, :] for fun in (jnp.cos, jnp.sin))
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
