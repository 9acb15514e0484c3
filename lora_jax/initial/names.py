"""The names of initializations, as `LoRA(init=...)` takes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

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


def changes_base(init: Any) -> bool:
    """Whether factors that began in a way of this name are a part of the base, which then has it less.

    >>> changes_base("pissa"), changes_base("eva"), changes_base("normal"), changes_base(None)
    (True, False, False, False)
    """
    if init in FROM_DATA:
        return init != "eva"
    return isinstance(init, str) and named(init) is not None
