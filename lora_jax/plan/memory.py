"""What one device holds during a step, in parts that add up."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from lora_jax.plan.step import Step


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device; the total is what XLA's buffers take, all of them.

    Attributes:
      base: The frozen weights.
      factors: What trains.
      optimizer: Its state.
      batch: Tokens.
      temporaries: Activations, gradients, gathered weights: what a step makes and drops, by XLA's buffer assignment.
      other: The loss, and what the compiler adds to operands; factors and state are updated in place.
    """

    base: int
    factors: int
    optimizer: int
    batch: int
    temporaries: int
    other: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(dataclasses.astuple(self))


def memory(step: Step, compiled: Any) -> Memory:
    """The memory of a compiled step: operands by their shardings, everything else by XLA's `memory_analysis`."""
    trees = step.base, step.lora_params, step.state, step.tokens
    base, factors, optimizer, batch = (bytes_on_a_device(tree) for tree in trees)
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    other = held - base - factors - optimizer - batch
    return Memory(base, factors, optimizer, batch, found.temp_size_in_bytes, other)


def bytes_on_a_device(tree: Any) -> int:
    """What one device holds of the arrays of a tree, or of `jax.ShapeDtypeStruct` with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
