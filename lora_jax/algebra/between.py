"""`extracted`: `extract` leaf by leaf, of two trees that need not fit in memory, and what of ΔW it holds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.adapters import merge
from lora_jax.algebra.extract import extract
from lora_jax.factors import Adapter, LoraParams
from lora_jax.sites import Site
from lora_jax.variants.full import Full
from lora_jax.variants.lora import LoRA


def extracted(
    base: Any, tuned: Any, sites: Mapping[str, Site], rank: int, targets: str | None = None
) -> tuple[LoraParams, dict[str, tuple[float, float]]]:
    """What `extract` finds for a rank, with one leaf of both trees in memory at a time, and a layer in float32.

    Args:
      base: A pytree of anything that has a shape and that `np.asarray` takes, such as `huggingface.deferred` returns.
      tuned: One of the same paths and shapes.
      sites: The site of each leaf.
      rank: The most that a leaf gets.
      targets: A regex of the paths that are looked at, in full; None for all.

    Returns:
      The adapters, and by path (‖ΔW‖², ‖ΔW - what the adapter has of it‖²).

    Raises:
      ValueError: The trees differ in paths or shapes, or not at all; no path matches; or values are not finite.

    >>> import lora_jax as lora
    >>> base, tuned = {"w": np.zeros((8, 4), np.float32)}, {"w": np.diag(np.arange(8.0))[:, :4].astype(np.float32)}
    >>> found, held = extracted(base, tuned, {"w": lora.Site((8, 4), "linear", (), (0,), (1,))}, rank=2)
    >>> [round(x, 3) for x in held["w"]]
    [14.0, 1.0]
    """
    before, after = tree.flatten(base)[0], tree.flatten(tuned)[0]
    for path in dict.fromkeys((*before, *after)):
        shapes = [tuple(of[path].shape) if path in of else None for of in (before, after)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"'{path}' is {shapes[0]} in the base and {shapes[1]} in the other: give one model's")
    try:
        chosen = [path for path in before if targets is None or re.fullmatch(targets, path)]
    except re.error as error:
        raise ValueError(f"{targets!r} is no regular expression: {error}") from error
    if not chosen:
        raise ValueError(f"{targets!r} matches no path in full{tree.close_to(str(targets), before)}")
    found, held = LoraParams(), {}
    for path in chosen:
        old, new = np.asarray(before[path]), np.asarray(after[path])
        if not np.array_equal(old, new):
            found[path], held[path] = _leaf(path, old, new, sites[path], rank)
    if not found:
        raise ValueError("the two models have the same weights there: there is nothing to extract")
    return found, held


def _leaf(path: str, old: np.ndarray, new: np.ndarray, site: Site, rank: int) -> tuple[Adapter, tuple[float, float]]:
    """A leaf's adapter, of those of its layers, and what is in it."""
    variant = LoRA(min(rank, site.max_rank)) if site.adaptable else Full()
    if not site.adaptable:
        adapter, norms = _whole(path, old, new, site, variant)
        return adapter, norms
    batch = site.batch_axes
    kept = [d for d in range(len(site.shape)) if d not in batch]
    inner, outer, window = ([kept.index(d) for d in own] for own in (site.in_axes, site.out_axes, site.window_axes))
    each = Site(tuple(site.shape[d] for d in kept), site.kind, (), (*inner,), (*outer,), window_axes=(*window,))
    adapters, norms = [], []
    sizes = site.sizes()[0]
    for index in itertools.product(*map(range, sizes)):
        at = tuple(index[batch.index(d)] if d in batch else slice(None) for d in range(old.ndim))
        adapter, own = _whole(path, old[at], new[at], each, variant)
        adapters.append(jax.tree.map(np.asarray, adapter.factors))
        norms.append(own)
    factors = {
        name: jnp.asarray(np.stack([x[name] for x in adapters]).reshape(*sizes, *adapters[0][name].shape))
        for name in adapters[0]
    }
    delta, rest = (sum(column) for column in zip(*norms, strict=True))
    return Adapter(factors, variant, site), (delta, rest)


def _whole(path: str, old: Any, new: Any, site: Site, variant: Any) -> tuple[Adapter, tuple[float, float]]:
    """The adapter of one matrix, or of a leaf without sides."""
    wide = np.promote_types(np.float32, old.dtype if old.dtype.itemsize > 4 else np.float32)
    adapter = extract({path: old}, {path: new}, {re.escape(path): variant}, sites={path: site})[path]
    before, after = old.astype(wide), new.astype(wide)
    reached = np.asarray(merge({path: before}, {path: adapter})[path])
    return adapter, (float(np.sum(np.square(after - before))), float(np.sum(np.square(after - reached))))
