"""The names of initializations, as `LoRA(init=...)` takes them."""

from __future__ import annotations

import re
from collections.abc import Callable

from lora_jax.initial.olora import OLoRA
from lora_jax.initial.orthogonal import Orthogonal
from lora_jax.initial.pissa import PiSSA
from lora_jax.initial.start import Initialization

NAMED: dict[str, Callable[[], Initialization]] = {"orthogonal": Orthogonal, "olora": OLoRA, "pissa": PiSSA}

# Functions of the library that make rules with initializations of these names out of data.
FROM_DATA = ("corda", "eva", "loftq", "lora_ga")


def named(name: str) -> Initialization | None:
    """The initialization of that name that looks at the weight; None where there is none.

    Raises:
      ValueError: It is the name of one that needs more than the weight.

    >>> named("pissa_niter_4"), named("normal")
    (PiSSA(iterations=4), None)
    """
    if name in FROM_DATA:
        raise ValueError(f"init={name!r} is not to be had by name: give `split` the rules that lora_jax.{name} returns")
    if match := re.fullmatch(r"pissa_niter_(\d+)", name):
        return PiSSA(iterations=int(match[1]))
    return NAMED[name]() if name in NAMED else None
