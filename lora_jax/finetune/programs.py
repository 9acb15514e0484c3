"""Programs: the training step, compiled ahead for each shape of batch, and what it takes of a device's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Memory(NamedTuple):
    """Bytes on one device during a step, by XLA's own analysis of the compiled program.

    Attributes:
      base: The frozen weights.
      trained: What trains, and its optimizer's state.
      step: Activations, gradients, the batch: what a step needs besides.
    """

    base: int
    trained: int
    step: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


class Programs:
    """A step of `lora_jax.training.make_step`, each of whose programs is compiled once, and can be asked for before."""

    def __init__(self, step: Any):
        self.step, self.compiled = step, dict[Any, Any]()

    def __call__(self, state: Any, frozen: Any, batch: Mapping[str, Any]) -> Any:
        """A step."""
        return self.program(state, frozen, batch)(state, frozen, batch)

    def program(self, state: Any, frozen: Any, batch: Mapping[str, Any]) -> Any:
        """The program of a batch's shapes; arguments may be `jax.ShapeDtypeStruct`."""
        key = tuple((name, x.shape, str(x.dtype)) for name, x in sorted(batch.items()))
        if key not in self.compiled:
            self.compiled[key] = self.step.lower(state, frozen, batch).compile()
        return self.compiled[key]

    def memory(self, state: Any, frozen: Any, batch: Mapping[str, Any]) -> Memory:
        """What a device holds in a step."""
        found = self.program(state, frozen, batch).memory_analysis()
        base, trained = nbytes(frozen), nbytes(state)
        # Of what is frozen a program is given only what it reads; a leaf that trains whole lies there all the same.
        beside = found.output_size_in_bytes - found.alias_size_in_bytes
        return Memory(base, trained, found.temp_size_in_bytes + max(beside, 0) + nbytes(batch))


def nbytes(tree: Any) -> int:
    """What one device holds of the arrays of a tree, or of `jax.ShapeDtypeStruct`."""

    def size(x: Any) -> int:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return 8
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return int(np.prod(shape)) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
