"""What variants check: their hyperparameters, where they have them, and that a leaf suits them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.sites import Site


def check(variant: Any) -> None:
    """Checks those of `rank`, `alpha`, `dropout` and `dtype` that a frozen dataclass has, and puts them in one form.

    That is Python's own numbers and a dtype's name, which compare, and which a file can hold.

    Raises:
      ValueError: A rank below 1, an alpha that is 0 or not finite, a dropout that is no probability below 1, a dtype
        that is unknown or not floating.
    """
    fields = {field.name: field.default for field in dataclasses.fields(variant)}
    if "rank" in fields:
        check_number(variant, "rank", lambda x: x >= 1, "the rank is a whole number, 1 or more", whole=True)
    if "alpha" in fields and variant.alpha is not None:
        check_number(variant, "alpha", bool, "alpha is a finite number other than 0, or None for rank")
    if "dropout" in fields:
        check_number(variant, "dropout", lambda x: 0 <= x < 1, "the dropout is a probability, 0 or more and below 1")
    # None stands for the leaf's own where it is the default, and else, to NumPy, for float64.
    if "dtype" in fields and not (variant.dtype is None and fields["dtype"] is None):
        try:
            dtype = None if variant.dtype is None else jnp.dtype(variant.dtype)
        except TypeError:
            dtype = None
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            name = type(variant).__name__
            raise ValueError(f"{name}(dtype={variant.dtype!r}): the dtype is a floating one, such as 'float32'")
        object.__setattr__(variant, "dtype", dtype.name)


def check_number(variant: Any, field: str, allowed: Callable[[Any], bool], means: str, *, whole: bool = False) -> None:
    """Checks a field of a frozen dataclass that holds a finite number, and makes it Python's own.

    Args:
      variant: The dataclass.
      field: The field's name.
      allowed: Which numbers there may be.
      means: What the field is, for the message.
      whole: Whether it is an int, and not a float.

    Raises:
      ValueError: It holds something else.
    """
    value = getattr(variant, field)
    try:
        number = None if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or not math.isfinite(number) or (whole and number % 1) or not allowed(number):
        raise ValueError(f"{type(variant).__name__}({field}={value!r}): {means}")
    object.__setattr__(variant, field, int(value) if whole else number)


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
