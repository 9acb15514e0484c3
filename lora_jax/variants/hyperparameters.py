"""What variants check: their hyperparameters, where they have them, and that a leaf suits them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.sites import Site


def check(variant: Any) -> None:
    """Checks those of `rank`, `alpha`, `dtype` and `dropout` that a frozen dataclass has, and puts them in one form.

    Raises:
      ValueError: A rank below 1, an alpha that is 0 or not finite, an unknown dtype, a dropout that is no probability
        below 1.
    """
    name = type(variant).__name__
    rank, alpha = getattr(variant, "rank", 1), getattr(variant, "alpha", None)
    if int(rank) != rank or rank < 1:
        raise ValueError(f"{name}(rank={rank}): the rank is a whole number, 1 or more")
    if alpha is not None and not (math.isfinite(alpha) and alpha):
        raise ValueError(f"{name}(alpha={alpha}): alpha is a finite number other than 0, or None for rank")
    if not 0 <= variant.dropout < 1:
        raise ValueError(f"{name}(dropout={variant.dropout}): the dropout is a probability, 0 or more and below 1")
    if hasattr(variant, "rank"):
        object.__setattr__(variant, "rank", int(rank))
    if alpha is not None:
        object.__setattr__(variant, "alpha", float(alpha))
    if getattr(variant, "dtype", None) is not None:
        object.__setattr__(variant, "dtype", jnp.dtype(variant.dtype).name)


def check_has_values(variant: Any, weight: Any) -> None:
    """Checks that a leaf is an array, for a variant that begins from its values.

    Raises:
      ValueError: It is a `jax.ShapeDtypeStruct`.
    """
    if isinstance(weight, jax.ShapeDtypeStruct):
        name = type(variant).__name__
        raise ValueError(f"{name} begins from the leaf's values, and this one has none: split inside jax.eval_shape")


def check_fits(rank: int, site: Site) -> None:
    """Checks that a leaf has room for a rank.

    Raises:
      ValueError: The rank is above the smaller of the in and out sizes.
    """
    _, inner, outer = site.sizes()
    if rank > site.max_rank:
        raise ValueError(
            f"rank {rank} is above {site.max_rank}, the smaller of the in and out sizes {inner}, {outer}: lower the "
            "rank, leave the path out, or train the leaf itself with Full()"
        )
