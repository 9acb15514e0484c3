"""Merging: a checkpoint with adapters merged into it, tensor by tensor, each made when it is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from lora_jax import tree
from lora_jax.axes import Axes, Axis, size_of
from lora_jax.contract import wider
from lora_jax.factored import Factored, is_factored
from lora_jax.factors import Adapter, check_fits, together
from lora_jax.formats.huggingface import rounding
from lora_jax.formats.huggingface.checkpoint import Checkpoint
from lora_jax.formats.huggingface.filling import part_dimension, read_entry, stacked, twins, verified
from lora_jax.formats.huggingface.tensors import Lazy, Tensor, cast
from lora_jax.formats.layouts import arrange
from lora_jax.formats.names import Names, Place
from lora_jax.materialize import materialize
from lora_jax.sites import Site
from lora_jax.variants import LoKr, VeRA

BLOCK = 1 << 21  # entries that are formed at a time, of float32: a few of them fit in the caches of a processor
Dims = tuple[int, ...]
Report = Callable[[rounding.Loss], None]


def merge(
    checkpoint: Checkpoint,
    params: Any,
    lora_params: Mapping[str, Adapter],
    names: Names,
    *,
    dtype: DTypeLike | None = None,
    seed: int | None = None,
    report: Report | None = None,
) -> dict[str, Tensor | Lazy]:
    """What `lora_jax.merge` makes of the loaded model, as a checkpoint's tensors, each made when it is written.

    Each tensor is made of its part of the leaf and of the factors: of its layer of a stacked leaf, of its outputs in a
    fused one. W + ΔW is formed in float32, a block at a time, and rounded once. What no adapter changes is the
    checkpoint's own, bit for bit.

    Args:
      checkpoint: The base, for `write(..., tensors, source=checkpoint)`.
      params: The base's parameters, or their shapes.
      lora_params: What `split` returned second, or `load`.
      names: The model's list.
      dtype: Of the merged tensors; None for each one's own. (`write` casts the others.)
      seed: Rounds at random, to W + ΔW on average, by this seed and the tensor's name; None: to the nearest.
      report: Is told what rounding did to each tensor, once for each time that it is made; not in float32.

    Returns:
      Tensors by the names of `checkpoint.tensors`.

    Raises:
      CheckpointError: As `fill`.
      ValueError: A path or a shape does not fit. Writing raises it for weights that are not finite in the dtype.

    >>> import tempfile, lora_jax as lora
    >>> from lora_jax.formats import huggingface
    >>> params, names = {"up": {"kernel": jnp.ones((2, 3))}}, [("up", "up", "linear")]
    >>> _, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(rank=1)})
    >>> folder = tempfile.mkdtemp()
    >>> base = huggingface.open_checkpoint(huggingface.save(f"{folder}/base", params, names, config={}))
    >>> merged = huggingface.merge(base, params, jax.tree.map(jnp.ones_like, lora_params), names)
    >>> np.asarray(merged["up.weight"])[0]
    array([2., 2.], dtype=float32)
    """
    leaves, _ = tree.flatten(params)
    places = verified(params, checkpoint, names, dtype)
    adapters = {path: _on_host(adapter) for path, adapter in together(lora_params).items()}
    check_fits(lora_params, leaves)
    parts: dict[str, list[tuple[str, Place, Dims]]] = {}
    for path, place in places.items():
        for index, name in place.tensors.items():
            parts.setdefault(name, []).append((path, place, index))
    tensors: dict[str, Tensor | Lazy] = dict(checkpoint.tensors)
    for name, own in parts.items():
        if any(path in adapters for path, _, _ in own):
            stored = checkpoint.tensors[name]
            to = cast(stored.dtype, dtype)
            make = functools.partial(_made, stored, name, own, adapters, to, seed, report)
            tensors[name] = Lazy(stored.shape, to, make)
    tied = {name: other for name, other in twins(places).items() if name in tensors and other in parts}
    return tensors | {name: tensors[other] for name, other in tied.items() if isinstance(tensors[other], Lazy)}


def _made(
    stored: Tensor,
    name: str,
    parts: list[tuple[str, Place, Dims]],
    adapters: Mapping[str, Adapter],
    to: np.dtype[Any],
    seed: int | None,
    report: Report | None,
) -> np.ndarray:
    """A merged tensor."""
    whole = np.empty(stored.shape, to)
    draws = None if seed is None else rounding.stream(seed, name)
    losses = []
    for path, place, index in parts:
        window = (*(slice(None),) * part_dimension(place), slice(*place.part[:2])) if place.part else ()
        theirs = whole[window]
        base = read_entry(stored, place, jax.dtypes.canonicalize_dtype(stored.dtype))
        axes = [axis for axis in place.axes if axis not in place.stacked]
        if path not in adapters:
            theirs[...] = arrange(base, axes, place.groups).astype(to)
            continue
        adapter = _at(path, adapters[path], place, index)
        for rows, exact, before in _blocks(path, base, adapter, axes, place):
            if not np.isfinite(exact).all():
                raise ValueError(_not_finite(path, name, bool(np.isfinite(before).all())))
            narrow = np.dtype(to).itemsize < exact.itemsize
            with np.errstate(over="ignore"):  # it is an error below
                rounded = rounding.stochastic(draws, exact, to) if draws is not None and narrow else exact.astype(to)
            if narrow and not np.isfinite(rounded).all():
                raise ValueError(f"'{name}': merged weights exceed {to.name}: merge in float32 or bfloat16")
            if narrow and report:
                losses.append(rounding.loss_of(name, exact, before.astype(exact.dtype), rounded))
            theirs[rows] = rounded
    if losses and report:
        report(rounding.total(losses, name))
    return whole


def _blocks(
    path: str, base: np.ndarray, adapter: Adapter, axes: list[str], place: Place
) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """Rows of a tensor of theirs, or its part: where they are, W + ΔW, and W."""
    leaf = Factored.of(jax.device_put(base), path)
    value: Any = dataclasses.replace(leaf, dtype=wider(leaf.dtype, "float32"))
    value = adapter.variant.apply(value, {n: jnp.asarray(x) for n, x in adapter.factors.items()}, adapter.site)
    if not is_factored(value):  # the leaf's new value itself
        value = Factored.of(value, path)
    value = dataclasses.replace(value, paths=())
    groups = place.groups
    if not groups or not groups[0]:
        yield ..., arrange(np.asarray(_formed(value, 0, None, 0)), axes, groups), arrange(base, axes, groups)
        return
    # Their rows are of our dimension d, slowest first; a variant may have made two axes of it.
    d = axes.index(groups[0][0])
    axis, *minor = value.dims[d]
    entries, unit = size_of(minor), int(np.prod([place.sizes[axis] for axis in groups[0][1:]], dtype=np.int64))
    step = max(1, BLOCK * axis.size // max(1, base.size))
    for start in range(0, axis.size, step):
        size = min(step, axis.size - start)
        ours = slice(start * entries, (start + size) * entries)
        exact = np.asarray(_formed(value, start, axis, size))
        before = base[(*(slice(None),) * d, ours)]
        rows = slice(ours.start * unit, ours.stop * unit)
        yield rows, arrange(exact, axes, groups), arrange(before, axes, groups)


@functools.partial(jax.jit, static_argnames=("axis", "size"))
def _formed(value: Factored, start: Any, axis: Axis | None, size: int) -> jax.Array:
    """The entries of a value from one on along an axis, as many as size says; of no axis, all."""
    if axis is None:
        return materialize(value)
    short = dataclasses.replace(axis, size=size)

    def shortened(axes: Axes) -> Axes:
        return tuple(short if own == axis else own for own in axes)

    def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        if axis not in axes:
            return array, axes
        return lax.dynamic_slice_in_dim(array, start, size, axes.index(axis)), shortened(axes)

    return materialize(dataclasses.replace(value.map(change), dims=tuple(map(shortened, value.dims))))


def _at(path: str, adapter: Adapter, place: Place, index: Dims) -> Adapter:
    """What an adapter is for one of the modules that its leaf is stacked of."""
    dims, site, variant = stacked(place), adapter.site, adapter.variant
    if not dims:
        return adapter
    if isinstance(variant, VeRA | LoKr) and not {*dims} <= {*site.batch_axes}:
        raise ValueError(
            f"'{path}': {type(variant).__name__} of several modules at once is none of each: load, `merge`"
        )
    where = dict(zip(map(str, dims), index, strict=True))
    named = variant.axes(site)
    factors = {
        name: x[tuple(where.get(axis.name, slice(None)) for axis in named.get(name, ()))]
        for name, x in adapter.factors.items()
    }
    kept = [d for d in range(len(site.shape)) if d not in dims]
    groups: dict[str, Any] = {
        name: tuple(kept.index(d) for d in getattr(site, name) if d in kept)
        for name in ("batch_axes", "in_axes", "out_axes", "window_axes")
    }
    return dataclasses.replace(
        adapter, factors=factors, site=Site(tuple(site.shape[d] for d in kept), site.kind, **groups)
    )


def _on_host(adapter: Adapter) -> Adapter:
    return dataclasses.replace(adapter, factors={name: np.asarray(x) for name, x in adapter.factors.items()})


def _not_finite(path: str, name: str, base: bool) -> str:
    if not base:
        return f"'{name}' of the base is not finite: download or save the base anew"
    return (
        f"'{name}': merged weights are not finite, because the factors are not at '{path}' (or the sum overflows): "
        "take an adapter from before training diverged"
    )
