"""Factored: a weight held as a sum of tensor networks over named axes, base first, formed only if asked for."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeGuard

import jax

from lora_jax.axes import Axes, Axis, fresh, roots_of, size_of, weight_axes
from lora_jax.contract import contract, reshape
from lora_jax.network import Change, Network


class FactoredError(TypeError):
    """A Factored leaf was used as if it were an array, outside `lift`."""


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
