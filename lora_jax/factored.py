"""Factored: a weight held as a sum of tensor networks over named axes, base first, formed only if asked for."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.contract import Axes, Axis, Cost, contract, letters, reshape, size_of, work

Change = Callable[[jax.Array, Axes], tuple[jax.Array, Axes]]


class FactoredError(TypeError):
    """A Factored leaf was used as if it were an array, outside `lift`."""


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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "deltas"],
    meta_fields=["dims", "dtype", "paths", "adapted", "mixed", "is_product", "picked"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """What `attach` puts at a leaf: base + ΔW, as a sum of networks over the axes of the weight.

    It is a pytree, so it passes through `jax.jit` and its kin; and it is no array: only a function that `lift` has
    lifted computes with it.

    Attributes:
      base: The weight as it is, scaled perhaps; None for zero.
      deltas: The networks whose sum is ΔW.
      dims: For each dimension of the value, the axes it is made of, slowest first. Reshapes and transposes of the
        weight change this and leave the factors alone; an axis that no operand carries is a broadcast.
      dtype: The dtype that the value has, and in which products with it are made.
      paths: The path of the leaf, or of each leaf that the value is put together from, for messages.
      adapted: Whether some network is a variant's, and not a vector that the function itself adds.
      mixed: Whether an array was added to the base that may be an activation, such as tokens to their positions: what
        meets a weight then takes the part of the activation.
      is_product: Whether it is the element-wise product of two weights, whose sums cost little, but whose products with
        activations cost more than forming it would.
      picked: The axes that rows of a leaf without factors were picked along: whether they are weights or activations,
        the next use shows.
    """

    base: Network | None
    deltas: tuple[Network, ...]
    dims: tuple[Axes, ...]
    dtype: Any
    paths: tuple[str, ...]
    adapted: bool = False
    mixed: bool = False
    is_product: bool = False
    picked: Axes = ()

    @classmethod
    def of(cls, base: Any, path: str) -> Factored:
        """A leaf as it is, one axis for each dimension, named by its number."""
        dtype = jax.dtypes.canonicalize_dtype(base.dtype)
        axes = tuple(dataclasses.replace(axis, roots=((path, d),)) for d, axis in enumerate(weight_axes(base.shape)))
        return cls(Network((base,), (axes,)), (), tuple((axis,) for axis in axes), dtype, (path,))

    @property
    def terms(self) -> tuple[Network, ...]:
        """All networks that the value is the sum of, the base first."""
        return self.deltas if self.base is None else (self.base, *self.deltas)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return tuple(size_of(group) for group in self.dims)

    @property
    def ndim(self) -> int:
        """The number of dimensions of the value."""
        return len(self.dims)

    @property
    def size(self) -> int:
        """The number of entries of the value."""
        return math.prod(self.shape)

    @property
    def axes(self) -> Axes:
        """All axes of the value, in order."""
        return tuple(axis for group in self.dims for axis in group)

    @property
    def names(self) -> frozenset[str]:
        """The names of all axes of the value and of its operands."""
        carried = (axes for term in self.terms for axes in term.axes)
        return frozenset(axis.name for axes in (*carried, self.axes) for axis in axes)

    def fresh(self) -> Iterator[str]:
        """Names for axes that are not taken yet."""
        return fresh(self.names)

    @property
    def whole(self) -> frozenset[Axis]:
        """The axes that make a product as large as the weight: those of its own, not those it is broadcast over."""
        carried = {axis for term in self.terms for axes in term.axes for axis in axes}
        return frozenset(axis for axis in self.axes if axis in carried and axis.size > 1)

    @property
    def is_vector(self) -> bool:
        """Whether at most one axis is longer than 1 and not broadcast: nothing is saved by holding factors apart."""
        return len(self.whole) <= 1

    @property
    def is_broadcast(self) -> bool:
        """Whether the value is the same all along some axis."""
        return size_of(self.whole) != self.size

    @property
    def name(self) -> str:
        """The paths, for messages."""
        return " with ".join(map(repr, self.paths))

    @property
    def stand_in(self) -> Any:
        """An array, or the likes of one, with the shape and type of the value, for tracing: no arithmetic is done."""
        base = self.base.operands[0] if self.base and len(self.base.operands) == 1 else None
        same = base is not None and base.shape == self.shape and base.dtype == self.dtype
        return base if same else jax.ShapeDtypeStruct(self.shape, self.dtype)

    def add(self, network: Network) -> Factored:
        """The value plus a network.

        Raises:
          ValueError: An operand's shape is not that of its axes.
        """
        own = {axis: axis for axis in self.axes}
        network = network.map(lambda array, axes: (array, tuple(own.get(axis, axis) for axis in axes)))
        for array, axes in zip(network.operands, network.axes, strict=True):
            if tuple(array.shape) != tuple(axis.size for axis in axes):
                named = ", ".join(f"{axis.name}: {axis.size}" for axis in axes)
                raise ValueError(f"{self.name} {self.shape}: a factor of shape {array.shape} does not fit ({named})")
        return dataclasses.replace(self, deltas=(*self.deltas, network), adapted=True)

    def each(self, change: Callable[[Network], Network]) -> Factored:
        """The value with each network changed; its dims stay."""
        base = None if self.base is None else change(self.base)
        return dataclasses.replace(self, base=base, deltas=tuple(change(delta) for delta in self.deltas))

    def map(self, change: Change) -> Factored:
        """The value with each operand of each network changed; its dims stay."""
        return self.each(lambda network: network.map(change))

    def times(self, array: jax.Array, axes: Axes) -> Factored:
        """The value multiplied, element by element, by an array over some of its axes."""
        return self.each(lambda network: network.times(array, axes))

    def split(self, axis: Axis, major: int) -> Factored:
        """The value with one axis made two, the first of size `major`, in dims and in operands."""

        def refine(axes: Axes) -> Axes:
            return tuple(new for old in axes for new in (old.split(major) if old == axis else (old,)))

        def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
            axes = refine(axes)
            return reshape(array, tuple(a.size for a in axes)), axes

        return dataclasses.replace(self.map(change), dims=tuple(refine(group) for group in self.dims))

    def fused(self, dim: int) -> Factored | None:
        """The value with the axes of a dim made one, over which an operand that has some of them is broadcast.

        None where a factor would become as large as the weight, as if the dim is all there is.
        """
        group = self.dims[dim]
        if len(group) < 2:
            return self
        fused = Axis(next(self.fresh()), size_of(group), roots_of(group))

        def refine(axes: Axes) -> Axes:
            return (fused, *(axis for axis in axes if axis not in group)) if {*group} & {*axes} else axes

        def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
            new = refine(axes)
            if new is axes:
                return array, axes
            return reshape(contract([(array, axes)], (*group, *new[1:])), tuple(axis.size for axis in new)), new

        if any(self.whole <= {*axes, *group} for delta in self.deltas for axes in delta.axes if {*group} & {*axes}):
            return None
        return dataclasses.replace(self.map(change), dims=tuple(refine(group) for group in self.dims))

    def relabel(self, change: Callable[[Axis], Axis]) -> Factored:
        """The value with each axis changed, in dims and in operands."""

        def relabeled(axes: Axes) -> Axes:
            return tuple(map(change, axes))

        value = self.map(lambda array, axes: (array, relabeled(axes)))
        return dataclasses.replace(value, dims=tuple(map(relabeled, self.dims)))

    def renamed(self, names: Mapping[str, str]) -> Factored:
        """The value with other paths; those that its operands' axes come from, nothing asks for."""

        def change(axis: Axis) -> Axis:
            return Axis(axis.name, axis.size, tuple((names.get(path, path), d) for path, d in axis.roots))

        return dataclasses.replace(
            self,
            dims=tuple(tuple(map(change, group)) for group in self.dims),
            picked=tuple(map(change, self.picked)),
            paths=tuple(names.get(path, path) for path in self.paths),
        )

    def without_units(self) -> Factored:
        """The value without axes of size 1; its dims of size 1 then have no axis at all."""

        def keep(axes: Axes) -> Axes:
            return tuple(axis for axis in axes if axis.size > 1)

        def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
            return reshape(array, tuple(axis.size for axis in keep(axes))), keep(axes)

        return dataclasses.replace(self.map(change), dims=tuple(keep(group) for group in self.dims))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise FactoredError(
            f"{self.name} {self.shape} holds W and ΔW apart and is no array: pass the tree that `attach` made as an "
            "argument to a function lifted with `lift` (one that closes over it does not see it as an argument), or "
            "use `merge` for plain weights"
        )

    __jax_array__ = __array__ = __getitem__ = __iter__ = __len__ = __float__ = __bool__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __matmul__ = __rmatmul__ = __pow__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse
    __floordiv__ = __mod__ = __rpow__ = __abs__ = __int__ = _refuse
    astype = reshape = transpose = sum = mean = max = min = dot = ravel = squeeze = _refuse
    T = mT = at = property(_refuse)


def is_factored(leaf: Any) -> TypeGuard[Factored]:
    """Whether a leaf is Factored; made for `is_leaf=`."""
    return isinstance(leaf, Factored)


def roots_of(*groups: Iterable[Axis]) -> tuple[tuple[str, int], ...]:
    """Where an axis comes from that stands for all of these: of each leaf, from what the first group has of it."""
    roots: dict[tuple[str, int], None] = {}
    for group in groups:
        paths = {path for path, _ in roots}
        roots.update({root: None for axis in group for root in axis.roots if root[0] not in paths})
    return tuple(roots)


def after_lead(network: Network) -> frozenset[int]:
    """The frozen operands of a network, by number, where an activation comes before them all."""
    return frozenset(i + 1 for i in network.frozen)


def fresh(taken: frozenset[str]) -> Iterator[str]:
    """Names for axes that are none of those taken."""
    return (name for i in itertools.count() if (name := f"a{i}") not in taken)


def weight_axes(shape: Sequence[int]) -> Axes:
    """The axes of a leaf of this shape, each named by its number.

    >>> weight_axes((512, 64))
    (Axis(name='0', size=512, roots=()), Axis(name='1', size=64, roots=()))
    """
    return tuple(Axis(str(d), size) for d, size in enumerate(shape))


def materialize(value: Factored) -> jax.Array:
    """The whole weight W + ΔW, formed in the wider of the base's and the factors' dtypes and rounded once.

    Args:
      value: A Factored value of any shape.

    Returns:
      An array of `value.shape` and `value.dtype`.
    """
    dtypes = {jnp.dtype("float32"), value.dtype, *(x.dtype for delta in value.deltas for x in delta.operands)}
    wide = max(dtypes, key=lambda dtype: dtype.itemsize) if value.deltas else value.dtype
    return total(value, wide, lax.Precision.HIGHEST)


def total(value: Factored, dtype: Any = None, precision: Any = None) -> jax.Array:
    """The sum of the value's networks: an array of its own dtype, computed in `dtype`, or else in that too."""
    if not value.terms:
        return jnp.zeros(value.shape, value.dtype)
    wide = dtype or value.dtype

    def formed(term: Network) -> jax.Array:
        (first, axes), *rest = term.at(dtype)
        operands = [(first.astype(wide), axes), *rest]
        return contract(operands, value.axes, frozen=term.frozen, dtype=wide, precision=precision).astype(wide)

    return reshape(functools.reduce(jnp.add, map(formed, value.terms)).astype(value.dtype), value.shape)


def cost_of(value: Factored, rows: Axes = ()) -> Cost:
    """What `total` costs; operands over `rows`, which were looked up, are written as A[i]."""

    def names(delta: Network) -> tuple[str, ...]:
        looked_up = ("[i]" if {*rows} & {*axes} else "" for axes in delta.axes)
        return tuple(letter + index for letter, index in zip(letters(len(delta.axes)), looked_up, strict=True))

    pairs = [work(delta.axes, value.axes, names(delta), frozen=delta.frozen) for delta in value.deltas]
    return Cost(0, sum(flops for flops, _ in pairs), " + ".join(word for _, word in pairs))
