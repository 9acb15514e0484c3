"""Functions in NumPy, from their jaxprs: nothing is compiled, and no result is XLA's.

Most of a small program's time is its compilation. What NumPy does not have is left to JAX, one primitive at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lora_jax import compat


def in_numpy(fun: Callable[..., Any]) -> Callable[..., Any]:
    """As `jax.jit(fun)`, but traced alone, and evaluated in NumPy in the dtypes that the trace has."""

    def run(*args: Any) -> Any:
        jaxpr, shapes = jax.make_jaxpr(fun, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(jaxpr, *jax.tree.leaves(args)))

    return run


def evaluate(jaxpr: Any, *args: Any) -> list[Any]:
    """The results of a jaxpr, open or closed."""
    jaxpr, consts = compat.parts(jaxpr)
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        operands = [v.val if compat.is_literal(v) else env[v] for v in eqn.invars]
        for variable, value in zip(eqn.outvars, _results(eqn, operands), strict=True):
            env[variable] = np.asarray(value, variable.aval.dtype)
            assert env[variable].shape == variable.aval.shape, eqn
    return [v.val if compat.is_literal(v) else env[v] for v in jaxpr.outvars]


def _results(eqn: Any, operands: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in CONTROL:
        return CONTROL[name](params, *operands)
    for inner in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if inner in params:
            return evaluate(params[inner], *operands)
    arrays = [np.asarray(x) for x in operands]
    if name in ELEMENTWISE:
        return [ELEMENTWISE[name](*arrays)]
    out = NUMPY[name](*arrays, **params) if name in NUMPY else NotImplemented
    out = eqn.primitive.bind(*operands, **params) if out is NotImplemented else out
    return out if eqn.primitive.multiple_results else [out]


def _cond(params: Any, index: Any, *operands: Any) -> list[Any]:
    return evaluate(params["branches"][int(index)], *operands)


def _scan(params: Any, *operands: Any) -> list[Any]:
    a, b = compat.scan_counts(params)
    consts, carry, xs, rows = operands[:a], operands[a : a + b], operands[a + b :], []
    order = range(params["length"])
    for i in order[::-1] if params["reverse"] else order:
        out = evaluate(params["jaxpr"], *consts, *carry, *(np.asarray(x)[i] for x in xs))
        carry = out[:b]
        rows.append(out[b:])
    return [*carry, *(np.stack(ys) for ys in zip(*(rows[::-1] if params["reverse"] else rows), strict=True))]


def _while(params: Any, *operands: Any) -> Any:
    a, b = params["cond_nconsts"], params["body_nconsts"]
    tests, consts, carry = operands[:a], operands[a : a + b], operands[a + b :]
    while evaluate(params["cond_jaxpr"], *tests, *carry)[0]:
        carry = evaluate(params["body_jaxpr"], *consts, *carry)
    return carry


def _dot_general(x: Any, y: Any, *, dimension_numbers: Any, **_: Any) -> Any:
    if x.dtype.kind != "f":  # NumPy's einsum does not know bfloat16
        return NotImplemented
    (x_sum, y_sum), (x_batch, y_batch) = dimension_numbers
    met = dict(zip((*y_sum, *y_batch), (*x_sum, *x_batch), strict=True))
    x_names, y_names = [*range(x.ndim)], [met.get(d, x.ndim + d) for d in range(y.ndim)]
    free = [name for name in (*x_names, *y_names) if name not in (*x_sum, *x_batch)]
    return np.einsum(x, x_names, y, y_names, [*x_batch, *free])


def _broadcast_in_dim(x: Any, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> Any:
    return np.broadcast_to(np.expand_dims(x, [d for d in range(len(shape)) if d not in broadcast_dimensions]), shape)


def _starts(x: Any, starts: Any, sizes: Any) -> Any:
    """A slice whose start is moved to where all of it is inside."""
    inside = [int(np.clip(s, 0, n - size)) for s, n, size in zip(starts, x.shape, sizes, strict=True)]
    return tuple(slice(s, s + size) for s, size in zip(inside, sizes, strict=True))


def _dynamic_update_slice(x: Any, update: Any, *starts: Any) -> Any:
    x = np.array(x)
    x[_starts(x, starts, update.shape)] = update
    return x


def _pad(x: Any, value: Any, *, padding_config: Any) -> Any:
    low, high, inner = (np.array(column, int) for column in zip(*padding_config, strict=True)) if x.ndim else ([],) * 3
    spread = np.array(x.shape, int) + np.maximum(np.array(x.shape, int) - 1, 0) * inner
    out = np.full(spread + np.maximum(low, 0) + np.maximum(high, 0), value, x.dtype)
    out[tuple(slice(max(a, 0), max(a, 0) + n, i + 1) for a, n, i in zip(low, spread, inner, strict=True))] = x
    return out[tuple(slice(max(-a, 0), n - max(-b, 0)) for a, b, n in zip(low, high, out.shape, strict=True))]


def _conv(
    x: Any,
    kernel: Any,
    *,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: int,
    batch_group_count: int,
    **_: Any,
) -> Any:
    if batch_group_count > 1:
        return NotImplemented
    x, kernel = x.transpose(dimension_numbers.lhs_spec), kernel.transpose(dimension_numbers.rhs_spec)
    still = [(0, 0, 0)] * 2
    x = _pad(x, 0, padding_config=[*still, *((a, b, d - 1) for (a, b), d in zip(padding, lhs_dilation, strict=True))])
    kernel = _pad(kernel, 0, padding_config=[*still, *((0, 0, d - 1) for d in rhs_dilation)])
    space = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], space)
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in window_strides))]
    n, c, *places = windows.shape[: x.ndim]
    windows = windows.reshape(n, feature_group_count, c // feature_group_count, *places, *kernel.shape[2:])
    kernel = kernel.reshape(feature_group_count, -1, *kernel.shape[1:])
    names = [*range(3, 3 + len(space))], [*range(3 + len(space), 3 + 2 * len(space))]
    y = np.einsum(windows, [0, 1, 2, *names[0], *names[1]], kernel, [1, 20, 2, *names[1]], [0, 1, 20, *names[0]])
    y = y.reshape(n, -1, *places)
    return y.transpose(np.argsort(dimension_numbers.out_spec))


def _windows(x: Any, indices: Any, numbers: Any, sizes: Any, mode: Any) -> Any:
    """For each row of indices, where it is among them, and the slice of `x` it means; None for one that is outside."""
    for place in np.ndindex(indices.shape[:-1]):
        starts = np.zeros(x.ndim, int)
        starts[list(numbers[0])] = indices[place]
        for own, theirs in zip(*numbers[1], strict=True):
            starts[own] = place[theirs]
        inside = all(0 <= s <= n - size for s, n, size in zip(starts, x.shape, sizes, strict=True))
        dropped = mode == jax.lax.GatherScatterMode.FILL_OR_DROP and not inside
        yield place, None if dropped else _starts(x, starts, sizes)


def _gather(
    x: Any, indices: Any, *, dimension_numbers: Any, slice_sizes: Any, mode: Any, fill_value: Any, **_: Any
) -> Any:
    d = dimension_numbers
    numbers = d.start_index_map, (d.operand_batching_dims, d.start_indices_batching_dims)
    gone = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    kept = [n for dim, n in enumerate(slice_sizes) if dim not in gone]
    fill = np.nan if fill_value is None and x.dtype.kind == "f" else fill_value or 0
    out = np.full((*indices.shape[:-1], *kept), fill, x.dtype)
    for place, window in _windows(x, indices, numbers, slice_sizes, mode):
        if window is not None:
            out[place] = x[window].reshape(kept)
    batch = [dim for dim in range(out.ndim) if dim not in d.offset_dims]
    return np.moveaxis(out, range(out.ndim), [*batch, *d.offset_dims])


def _scatter_add(x: Any, indices: Any, updates: Any, *, dimension_numbers: Any, mode: Any, **_: Any) -> Any:
    d, x = dimension_numbers, np.array(x)
    numbers = d.scatter_dims_to_operand_dims, (d.operand_batching_dims, d.scatter_indices_batching_dims)
    gone = (*d.inserted_window_dims, *d.operand_batching_dims)
    batch = [dim for dim in range(updates.ndim) if dim not in d.update_window_dims]
    updates = updates.transpose(*batch, *d.update_window_dims)
    kept = iter(updates.shape[len(batch) :])
    sizes = [1 if dim in gone else next(kept) for dim in range(x.ndim)]
    for place, window in _windows(x, indices, numbers, sizes, mode):
        if window is not None:
            x[window] += updates[place].reshape(sizes)
    return x


CONTROL = {"cond": _cond, "scan": _scan, "while": _while}
ELEMENTWISE = {
    **{
        name: getattr(np, name)
        for name in ("sin", "cos", "tanh", "exp", "log", "log1p", "sqrt", "abs", "sign", "square")
    },
    **{"neg": np.negative, "max": np.maximum, "min": np.minimum, "pow": np.power, "not": np.logical_not},
    **{"add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "is_finite": np.isfinite},
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "and": np.logical_and, "or": np.logical_or, "stop_gradient": lambda x: x},
    **{"logistic": lambda x: (1 + np.tanh(x / 2)) / 2, "rsqrt": lambda x: 1 / np.sqrt(x), "copy": lambda x: x},
    **{"copy_p": lambda x: x, "select_n": lambda i, *xs: np.choose(i.astype(int), xs)},
}
NUMPY = {
    "div": lambda x, y: x / y if x.dtype.kind == "f" else NotImplemented,
    "integer_pow": lambda x, y: x**y,
    "convert_element_type": lambda x, **_: x,  # every result is given its dtype anyway
    "empty2": lambda dtype, **_: np.zeros((), dtype),
    "reduce_sum": lambda x, axes, **_: np.sum(x, axes),
    "reduce_max": lambda x, axes, **_: np.max(x, axes),
    "transpose": lambda x, permutation: np.transpose(x, permutation),
    "reshape": lambda x, new_sizes, dimensions, **_: np.reshape(x.transpose(dimensions or range(x.ndim)), new_sizes),
    "squeeze": lambda x, dimensions: np.squeeze(x, dimensions),
    "rev": lambda x, dimensions: np.flip(x, dimensions),
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "split": lambda x, sizes, axis: np.split(x, np.cumsum(sizes)[:-1], axis),
    "iota": lambda dtype, shape, dimension, **_: np.indices(shape)[dimension],
    "optimization_barrier": lambda *xs: list(xs),
    "slice": lambda x, start_indices, limit_indices, strides: x[
        tuple(map(slice, start_indices, limit_indices, strides or (1,) * x.ndim))
    ],
    "dynamic_slice": lambda x, *starts, slice_sizes: x[_starts(x, starts, slice_sizes)],
    "dynamic_update_slice": _dynamic_update_slice,
    "broadcast_in_dim": _broadcast_in_dim,
    "dot_general": _dot_general,
    "pad": _pad,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "scatter-add": _scatter_add,
}
