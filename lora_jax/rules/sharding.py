"""Weights across devices: inside shard_map, values are marked as varying over mesh axes."""

from __future__ import annotations

from typing import Any

import jax

from lora_jax import compat
from lora_jax.contract import Axes
from lora_jax.factored import Factored
from lora_jax.interpreter import Interpreter, rule


@rule("pvary")
def pvary(_: Interpreter, eqn: Any, weight: Factored) -> Factored:
    """A replicated weight that meets varying data is marked so, operand by operand, where it is not yet."""

    def mark(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        new = tuple(name for name in eqn.params["axes"] if name not in compat.varying(array))
        return (eqn.primitive.bind(array, **{**eqn.params, "axes": new}) if new else array), axes

    return weight.map(mark)
