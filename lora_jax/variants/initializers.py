"""How A begins where it is drawn: named distributions by the number of inputs."""

from __future__ import annotations

from collections.abc import Callable

import jax

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
