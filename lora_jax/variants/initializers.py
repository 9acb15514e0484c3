"""How A begins where it is drawn: named distributions by the number of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.initial.names import FROM_DATA, NAMED

Initializer = Callable[..., jax.Array]

INITIALIZERS: dict[str, Callable[[int], Initializer]] = {
    # Variance 1/fan_in: x·A has the variance of x, whatever the layer's width.
    "normal": lambda fan_in: jax.nn.initializers.normal(fan_in**-0.5),
    # U(±1/√fan_in), which Hugging Face PEFT and the paper's own code draw (as kaiming_uniform with a = √5).
    "uniform": lambda fan_in: _symmetric(fan_in**-0.5),
}


def _symmetric(bound: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def initializer(name: str, fan_in: int) -> Initializer:
    """A function `(key, shape, dtype) -> array` by its name.

    Raises:
      ValueError: There is none of that name.

    >>> initializer("uniform", 16)(jax.random.key(0), (16, 2), "float32").max() <= 0.25
    Array(True, dtype=bool)
    """
    if name not in INITIALIZERS:
        known = ", ".join([*INITIALIZERS, *NAMED, "pissa_niter_4 (or another number)"])
        raise ValueError(
            f"init={name!r} is none of {known}, nor a function (key, shape, dtype) or an Initialization; "
            f"{', '.join(FROM_DATA)} are functions that make rules"
        )
    return INITIALIZERS[name](fan_in)


def drawn(init: Any, key: jax.Array, shape: tuple[int, ...], dtype: str, fan_in: int) -> jax.Array:
    """A factor of a variant whose factors are drawn, and do not begin as a part of the weight as LoRA's may.

    Raises:
      ValueError: `init` is neither a name in `INITIALIZERS` nor a function, or that returns another shape.
    """
    if not (callable(init) or init in INITIALIZERS):
        raise ValueError(
            f"init={init!r} is neither {' nor '.join(map(repr, INITIALIZERS))} nor a function (key, shape, dtype), and "
            "others are of LoRA and its kin alone"
        )
    array = jnp.asarray((init if callable(init) else initializer(init, fan_in))(key, shape, dtype), dtype)
    if array.shape != shape:
        raise ValueError(f"init returned an array of shape {array.shape} for a factor of shape {shape}")
    return array
