"""Convolutions: each factor mixes channels before the window, is part of a smaller kernel, or mixes channels after it.

    conv(x, ΔW) = after · conv(before · x, within)

Of LoRA's factors A is the smaller kernel, with rank output channels, and B comes after; where the kernel is transposed,
as in a decoder that shares it, B comes before. In names of axes any split of a network's factors into the three is
right as long as those with a spatial axis are within, so the cheapest is taken that forms no kernel. Groups are no
more than axes that x and kernel share and the result keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.axes import Axes, Axis, size_of
from lora_jax.contract import contract, reshape
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter, rule
from lora_jax.joint import base_of, dense
from lora_jax.order import Cost, Order, letters, work

Operands = Sequence[tuple[jax.Array, Axes]]

BEFORE, WITHIN, AFTER = range(3)


@rule("conv_general_dilated")
def conv_general_dilated(interpreter: Interpreter, eqn: Any, x: Any, kernel: Any) -> Any:
    """A convolution in any layout, with any window, strides, padding, dilations and groups."""
    if is_factored(x) or kernel.is_product or (grouped := _grouped(kernel, eqn)) is None:
        return NotImplemented
    weight, groups = grouped
    out_dim, in_dim, *window_dims = eqn.params["dimension_numbers"].rhs_spec
    # Depthwise, where a group has one output channel, the groups themselves are the outputs.
    outer = weight.dims[out_dim][len(groups) :] or groups[-1:]
    weight = weight.without_units()
    conv = _named(eqn, x, weight, tuple(axis for axis in groups if axis.size > 1))
    plans = [_plan(conv.estimated, term.axes, weight.whole, interpreter.plan.order) for term in weight.terms]
    if weight.base is not None and not plans[0].stages:  # a base scaled along the window is one kernel, multiplied out
        weight = dataclasses.replace(weight, base=dense(base_of(weight), weight.dims))
        plans[0] = _plan(conv.estimated, weight.terms[0].axes, weight.whole, interpreter.plan.order)
    if not all(plan.stages for plan in plans):
        return NotImplemented
    window = _flat(kernel.dims[d] for d in window_dims)
    interpreter.record(kernel, eqn, "conv", kernel.dims[in_dim] + window, outer, _cost(weight, plans), window)
    options = {"whole": weight.whole, "order": interpreter.plan.order, "precision": eqn.params["precision"]}
    parts = [
        eqn.primitive.bind(x, _array(term.at(weight.dtype), weight.dims), **eqn.params)
        if len(term.operands) == 1 and {*weight.axes}.issubset(*term.axes)
        else _part(
            eqn, conv, term.dropout(x) if term.dropout else x, _by_stage(term.at(weight.dtype), plan.stages), options
        )
        for term, plan in zip(weight.terms, plans, strict=True)
    ]
    out = eqn.outvars[0].aval
    return functools.reduce(jnp.add, parts) if parts else jnp.zeros(out.shape, out.dtype)


def _grouped(kernel: Factored, eqn: Any) -> tuple[Factored, Axes] | None:
    """The kernel with its output channels split by group, and the axes of the groups; None where no axis so splits."""
    out_dim, *_ = eqn.params["dimension_numbers"].rhs_spec
    left, groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"], list[Axis]()
    for axis in kernel.dims[out_dim]:
        if left == 1:
            break
        if max(left, axis.size) % min(left, axis.size):
            return None
        if axis.size > left:
            kernel, (axis, _) = kernel.split(axis, left), axis.split(left)
        groups.append(axis)
        left //= axis.size
    return kernel, tuple(groups)


class _Conv(NamedTuple):
    """The dimensions of x, of y and of the window as the axes they are made of; of x and y batch and channels first."""

    x: tuple[Axes, ...]
    y: tuple[Axes, ...]
    window: tuple[Axes, ...]

    @property
    def batch(self) -> Axes:
        """The batch axis, which x and y share."""
        return self.y[0]

    @property
    def channels(self) -> Axes:
        """The axes of x that are the kernel's too, those of the groups first."""
        return tuple(axis for axis in self.x[0] + self.x[1] if axis not in self.batch)

    @property
    def free(self) -> Axes:
        """The batch and spatial axes of x and y, which no factor has."""
        return _flat((self.batch, *self.x[2:], *self.y[2:]))

    @property
    def estimated(self) -> _Conv:
        """The same with a size that is not known yet (of an exported function) taken as that of a large batch."""

        def known(axes: Axes) -> Axes:
            return tuple(axis if isinstance(axis.size, int) else Axis(axis.name, 4096) for axis in axes)

        return _Conv(*(tuple(map(known, dims)) for dims in self))


def _named(eqn: Any, x: jax.Array, kernel: Factored, groups: Axes) -> _Conv:
    """Channels take the names of the kernel's axes; batch and spatial dimensions have names of their own."""
    numbers, y = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    out_dim, in_dim, *window = numbers.rhs_spec
    batch, inner = (Axis("batch", y.shape[numbers.out_spec[0]]),), kernel.dims[in_dim]
    rows = (groups + batch, inner) if eqn.params["batch_group_count"] > 1 else (batch, groups + inner)
    xs = ((Axis(f"x{i}", x.shape[d]),) for i, d in enumerate(numbers.lhs_spec[2:]))
    ys = ((Axis(f"y{i}", y.shape[d]),) for i, d in enumerate(numbers.out_spec[2:]))
    return _Conv((*rows, *xs), (batch, kernel.dims[out_dim], *ys), tuple(kernel.dims[d] for d in window))


class _Channels(NamedTuple):
    """The channels of the smaller convolution.

    Attributes:
      folded: Those that the activation has and the kernel has not: they join the batch dimension.
      groups: Those that both have and the result keeps.
      summed: Those that both have and the result does not keep.
      new: Those that the kernel has and the activation has not.
    """

    folded: Axes
    groups: Axes
    summed: Axes
    new: Axes


def _channels(conv: _Conv, before: Sequence[Axes], within: Sequence[Axes], after: Sequence[Axes]) -> _Channels:
    mixed, kernel = dict.fromkeys(conv.channels + _flat(before)), dict.fromkeys(_flat(within))
    later = {*_flat(conv.y), *_flat(after)}
    return _Channels(
        folded=tuple(axis for axis in mixed if axis not in kernel and axis in later),
        groups=tuple(axis for axis in mixed if axis in kernel and axis in later),
        summed=tuple(axis for axis in mixed if axis in kernel and axis not in later),
        new=tuple(axis for axis in kernel if axis not in mixed and axis in later),
    )


def _part(eqn: Any, conv: _Conv, x: jax.Array, stages: Sequence[Operands], options: dict[str, Any]) -> jax.Array:
    """One network's part of the result: a product, a convolution with a smaller kernel, another product."""
    before, within, after = stages
    folded, groups, summed, new = _channels(conv, *([axes for _, axes in stage] for stage in stages))
    lhs, rhs, out = eqn.params["dimension_numbers"]
    small = _placed((groups + new, summed, *conv.window), rhs)
    mixed = _placed((conv.batch + folded, groups + summed, *conv.x[2:]), lhs)
    made = _placed((conv.batch + folded, groups + new, *conv.y[2:]), out)
    wide = {"preferred_element_type": eqn.params["preferred_element_type"]}  # for the last product alone
    params = {**eqn.params, "feature_group_count": size_of(groups), "batch_group_count": 1, "out_sharding": None}
    params |= {"preferred_element_type": None} if after else wide

    h = _mixed(x, _placed(conv.x, lhs), before, mixed, conv.free, options)
    y = eqn.primitive.bind(h, _array(within or [(jnp.ones((), x.dtype), ())], small), **params)
    y = _mixed(y, made, after, _placed(conv.y, out), conv.free, {**options, **wide})
    return y.astype(eqn.outvars[0].aval.dtype)


def _mixed(
    x: jax.Array, dims: Sequence[Axes], factors: Operands, new: Sequence[Axes], free: Axes, options: dict[str, Any]
) -> jax.Array:
    """An activation, whose dimensions are made of axes, times factors, as an array of new dimensions."""
    axes, out = _flat(dims), _flat(new)
    run = tuple(axis for axis in axes if axis in free)
    if factors and _adjoin(run, axes) and _adjoin(run, out):
        # XLA's CPU back end is slow at skinny products of more than two dimensions.
        axes, out = _joined(run, axes), _joined(run, out)
    y = contract([(reshape(x, tuple(axis.size for axis in axes)), axes), *factors], out, **options)
    return reshape(y, tuple(map(size_of, new)))


def _adjoin(run: Axes, axes: Axes) -> bool:
    return run == axes[axes.index(run[0]) :][: len(run)]


def _joined(run: Axes, axes: Axes) -> Axes:
    return tuple(Axis("x", size_of(run)) if axis == run[0] else axis for axis in axes if axis not in run[1:])


class _Plan(NamedTuple):
    """What becomes of a network: what it costs, the stage of each operand, and both in words."""

    flops: int = 0
    stages: tuple[int, ...] = ()
    word: str = ""


def _cost(weight: Factored, plans: Sequence[_Plan]) -> Cost:
    count = 0 if weight.base is None else 1
    base, low_rank = (sum(plan.flops for plan in part) for part in (plans[:count], plans[count:]))
    return Cost(base, low_rank, " + ".join(plan.word for plan in plans[count:]))


@functools.lru_cache(maxsize=1024)
def _plan(conv: _Conv, operands: tuple[Axes, ...], whole: frozenset[Axis], order: Callable[..., Order]) -> _Plan:
    """The cheapest plan that does not form a kernel; one without stages if all do."""
    window = {*_flat(conv.window)}
    choices = [(WITHIN,) if window & {*axes} else (BEFORE, WITHIN, AFTER) for axes in operands]
    plans = (_costed(conv, operands, stages, whole, order) for stages in itertools.product(*choices))
    return min(filter(None, plans), default=_Plan())


def _costed(
    conv: _Conv, operands: tuple[Axes, ...], stages: tuple[int, ...], whole: frozenset[Axis], order: Any
) -> _Plan | None:
    before, within, after = _by_stage(operands, stages)
    is_kernel = len(within) == 1 and whole.issubset(within[0])
    if within and whole.issubset(_flat([*within, *conv.window])) and not is_kernel:
        return None
    folded, groups, summed, new = _channels(conv, before, within, after)
    rows, x, y = conv.batch + folded, _flat(conv.x[2:]), _flat(conv.y[2:])
    small = (*groups, *new, *summed, *_flat(conv.window))
    a, b, c = ("".join(words) for words in _by_stage(letters(len(operands)), stages))
    mixing, mixed = work([_flat(conv.x), *before], (*rows, *groups, *summed, *x), "x" + a, whole, order=order)
    making, kernel = work(within, small, b) if within else (0, "1")
    # Strides leave out some of x, and dilations of x some of y.
    sliding = 2 * size_of((*rows, *small)) * min(size_of(x), size_of(y))
    ending, word = work([(*rows, *groups, *new, *y), *after], _flat(conv.y), "y" + c, whole, order=order)
    return _Plan(mixing + making + sliding + ending, stages, word.replace("y", f"({mixed} * {kernel})"))


def _by_stage(operands: Sequence[Any], stages: Sequence[int]) -> list[list[Any]]:
    return [[x for x, s in zip(operands, stages, strict=True) if s == stage] for stage in (BEFORE, WITHIN, AFTER)]


def _array(operands: Operands, dims: Sequence[Axes]) -> jax.Array:
    """The product of factors as an array of dimensions that are made of axes."""
    return reshape(contract(operands, _flat(dims)), tuple(map(size_of, dims)))


def _placed(dims: Sequence[Axes], spec: Sequence[int]) -> tuple[Axes, ...]:
    """Dimensions from the order batch, channels, spatial to where an array has them."""
    return tuple(dims[spec.index(d)] for d in range(len(spec)))


def _flat(groups: Iterable[Axes]) -> Axes:
    return tuple(axis for group in groups for axis in group)
