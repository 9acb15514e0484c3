"""Network: a product of arrays over named axes, unevaluated, and what of its input is dropped."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import Axes

Change = Callable[[jax.Array, Axes], tuple[jax.Array, Axes]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["axes", "rate"])
@dataclasses.dataclass(frozen=True, eq=False)
class Dropout:
    """What of a network's input is dropped.

    Attributes:
      keys: PRNG keys, one for each entry along the weight's batch axes; a slice of the weight takes its own.
      axes: The axes of `keys`.
      rate: The probability that an input is dropped; the others are divided by what is left.
    """

    keys: jax.Array
    axes: Axes
    rate: float

    def apart(self, axes: Axes) -> Axes:
        """The axes of the keys along which inputs over these axes do not vary, so that each has its own mask."""
        return tuple(axis for axis in self.axes if axis not in axes)

    def __call__(self, x: jax.Array, apart: Axes = ()) -> jax.Array:
        """The input with a share of it dropped, once for each entry along some axes of the keys, which come first."""
        keys = self.keys[tuple(slice(None) if axis in apart else 0 for axis in self.axes)]
        mask = functools.partial(jax.random.bernoulli, p=1 - self.rate, shape=x.shape)
        kept = jax.vmap(mask)(keys.ravel()).reshape(*keys.shape, *x.shape) if apart else mask(keys)
        return jnp.where(kept, x / jnp.asarray(1 - self.rate, x.dtype), jnp.zeros((), x.dtype))

    def on(self, x: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        """An activation over these axes with a share of it dropped; those axes come first that it did not have."""
        apart = self.apart(axes)
        return self(x, apart), (*apart, *axes)

    def among_others(self) -> Dropout:
        """The same for a weight that is chosen among others, or multiplied by one, before it meets an activation."""
        return self


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["operands", "dropout"], meta_fields=["axes", "scale", "frozen"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A product of arrays over named axes, unevaluated: the einsum over every axis that the weight does not have.

    Attributes:
      operands: The arrays.
      axes: For each operand, the axes of its dimensions. Axes with the same name are the same axis.
      scale: A number that multiplies the whole; it is folded into the smallest operand.
      dropout: What of an activation is dropped before it is multiplied by the network.
      frozen: The operands, by number, that have no gradient, so that orders are cheapest that do not need theirs.
    """

    operands: tuple[jax.Array, ...]
    axes: tuple[Axes, ...]
    scale: float = 1.0
    dropout: Dropout | None = None
    frozen: frozenset[int] = frozenset()

    def map(self, change: Change) -> Network:
        """The network with each operand and its axes changed, and with the keys of its dropout."""
        pairs = [change(operand, axes) for operand, axes in zip(self.operands, self.axes, strict=True)]
        drop = self.dropout
        if drop:
            keys, axes = change(drop.keys, drop.axes)
            drop = dataclasses.replace(drop, keys=keys, axes=axes)
        operands, axes = tuple(a for a, _ in pairs), tuple(axes for _, axes in pairs)
        return dataclasses.replace(self, operands=operands, axes=axes, dropout=drop)

    def cast(self, dtype: Any) -> Network:
        """The network with each operand in another dtype."""
        operands = tuple(lax.convert_element_type(array, dtype) for array in self.operands)
        return dataclasses.replace(self, operands=operands)

    def times(self, array: jax.Array, axes: Axes) -> Network:
        """The network multiplied, element by element, by an array over some of the axes."""
        if len(axes) < 2 and axes in self.axes:  # a scale that is scaled again is one
            i = self.axes.index(axes)
            operands = (*self.operands[:i], self.operands[i] * array, *self.operands[i + 1 :])
            return dataclasses.replace(self, operands=operands, frozen=self.frozen - {i})
        return dataclasses.replace(self, operands=(*self.operands, array), axes=(*self.axes, axes))

    def among_others(self) -> Network:
        """The network of a weight that is chosen among others, or multiplied by one."""
        return dataclasses.replace(self, dropout=self.dropout.among_others()) if self.dropout else self

    def drop(self, x: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        """An activation as the network gets it, with its axes: those come first that it did not have."""
        return self.dropout.on(x, axes) if self.dropout else (x, axes)

    def at(self, dtype: Any = None) -> list[tuple[jax.Array, Axes]]:
        """The operands with their axes, the scale folded in, in a dtype if one is given."""
        operands = list(self.operands)
        if self.scale != 1.0:
            small = min(range(len(operands)), key=lambda i: operands[i].size)
            operands[small] = operands[small] * self.scale
        return [(array.astype(dtype or array.dtype), axes) for array, axes in zip(operands, self.axes, strict=True)]


def after_lead(network: Network) -> frozenset[int]:
    """The frozen operands of a network, by number, where an activation comes before them all."""
    return frozenset(i + 1 for i in network.frozen)
