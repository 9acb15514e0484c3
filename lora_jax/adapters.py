"""Adapters: `split` a tree into frozen and trainable, `attach` the two side by side, `merge` and `unmerge` them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import tree
from lora_jax.choice import Rules, choose
from lora_jax.explicit import sharded_alike
from lora_jax.factored import Factored, is_factored
from lora_jax.factors import Adapter, LoraParams, key_of, pools, together
from lora_jax.materialize import materialize
from lora_jax.network import Dropout
from lora_jax.placement import on_mesh
from lora_jax.sharding import check_mesh, starter
from lora_jax.sites import Site
from lora_jax.variants.base import FROZEN, SHARED


def split(
    key: jax.Array, params: Any, rules: Rules, *, sites: Mapping[str, Site] | None = None
) -> tuple[Any, LoraParams]:
    """A tree of parameters as what stays frozen and what trains.

    Args:
      key: A PRNG key. What a leaf starts from depends on it and on the leaf's own path alone.
      params: Any pytree of arrays; leaves that are no arrays stay as they are.
      rules: Which leaf gets which variant: a mapping from regular expression, which must match a whole path, to
        variant (the first that matches wins; None freezes), or a callable `(path, site) -> variant or None`. A variant
        may carry its axes, `LoRA(rank=8).at(in_axes=0, out_axes=(1, 2))`.
      sites: What `sites` found. Without it a matrix counts as (in, out), and a leaf of any other shape needs its axes
        in the rule.

    Returns:
      `(frozen, lora_params)`: a tree like `params`, and a dict from path to `Adapter`. A leaf stays frozen as it is,
      unless its variant starts from a part of it: then base and factors add up to it (see `LoRA`'s `init`). Where a
      leaf lies on a mesh, its factors are made there, as `shardings` says.

    Raises:
      ValueError: A rule matches no leaf; a leaf is not of floating dtype, is not read by the function, or has no axes;
        the variant does not suit it; two leaves have one path; or nothing at all is adapted.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
    >>> frozen, lora_params = lora.split(jax.random.key(0), params, {".*/kernel": lora.LoRA(rank=4)})
    >>> {name: a.shape for name, a in lora_params["dense/kernel"].factors.items()}
    {'A': (64, 4), 'B': (4, 32)}
    """
    leaves, treedef = tree.flatten(params, is_leaf=is_factored)
    _refuse_attached(leaves)
    arrays = {path: leaf for path, leaf in leaves.items() if tree.is_array(leaf)}
    frozen, lora_params, start = dict(leaves), LoraParams(), starter()
    for path, (variant, site) in choose(rules, arrays, sites).items():
        try:
            frozen[path], factors = start(key_of(key, path), arrays[path], variant, site)
        except ValueError as error:
            raise ValueError(f"{path!r} {site.shape} as {variant.begun()}: {error}") from error
        if {*factors} != {*variant.names(site)}:
            raise ValueError(
                f"{path!r} {site.shape} as {variant.begun()}: it begins with the factors {[*factors]} and has labels "
                f"for {[*variant.names(site)]}: `labels` names each, or `names` those that this leaf has"
            )
        lora_params[path] = Adapter(factors, variant.begun(), site)
    meshes = [sharding.mesh for path in lora_params if (sharding := on_mesh(arrays[path]))]
    pool = pools(key, leaves, lora_params)
    lora_params |= jax.device_put(pool, NamedSharding(meshes[0], PartitionSpec())) if meshes else pool
    if not lora_params:
        raise ValueError("the rules adapt no leaf, so nothing would train: give one of the paths a variant")
    return tree.unflatten(treedef, frozen), lora_params


def attach(frozen: Any, lora_params: Mapping[str, Adapter]) -> Any:
    """The frozen tree with each adapted leaf made a `Factored` that holds base and ΔW apart, for a lifted function.

    No arithmetic is done, but for what a variant needs that is smaller than the leaf, such as DoRA's norms. The result
    is a pytree like any other: it may be an argument of a jitted function.

    Args:
      frozen: What `split` returned first, or any tree with leaves of the same shapes at the same paths.
      lora_params: What `split` returned second, or some of it.

    Returns:
      A tree like `frozen`.

    Raises:
      ValueError: A path is not in `frozen`, a shape does not fit, or a leaf is attached already.
    """
    leaves, treedef = tree.flatten(frozen, is_leaf=is_factored)
    return tree.unflatten(treedef, {**leaves, **_applied(leaves, lora_params)})


def dropout(key: jax.Array, lora_params: Mapping[str, Adapter]) -> LoraParams:
    """The same adapters, that drop a share of their input when they are next attached: for the loss, while training.

    With a variant's `dropout` at p, each entry of an activation that meets ΔW is zero with probability p and divided by
    1 - p otherwise; what meets the base stays whole, and the expectation of the result is what it is without dropout.
    Each leaf, and each layer or expert of a stacked leaf, draws a mask of its own; a leaf that is used several times in
    one step, as by a loop that does not stack it, may draw the same mask for inputs of the same shape. Of an
    embedding, whose input is an index, nothing is dropped; nor without a key, nor in `merge`.

    Args:
      key: A PRNG key, another one for each step.
      lora_params: What trains, as `split` returned it.

    Returns:
      The adapters with keys, for `attach`; they share the factors.

    Source: the `lora_dropout` of Hu et al. 2021, https://arxiv.org/abs/2106.09685.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> rules = {"w": lora.LoRA(rank=2, dropout=0.5)}
    >>> frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, rules)
    >>> def loss(lora_params, key, x):
    ...     params = lora.attach(frozen, lora.dropout(key, lora_params))
    ...     return jnp.sum(lora.lift(lambda params, x: x @ params["w"])(params, x))
    >>> grads = jax.grad(loss)(lora_params, jax.random.key(1), jnp.ones((3, 8)))
    """

    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):  # as jax.random.PRNGKey makes them
        key = jax.random.wrap_key_data(key)

    def with_keys(path: str, adapter: Adapter) -> Adapter:
        if not adapter.variant.dropout or adapter.site.kind == SHARED:
            return adapter
        batch, _, _ = adapter.site.sizes()
        own = key_of(key, path)
        return dataclasses.replace(adapter, keys=jax.random.split(own, batch) if batch else own)

    return {path: with_keys(path, adapter) for path, adapter in lora_params.items()}


def merge(params: Any, lora_params: Mapping[str, Adapter]) -> Any:
    """Plain weights W + ΔW in the base's dtypes: deployable, and as fast as the base. Pure.

    ΔW is formed in the wider of the base's and the factors' dtypes and the sum is rounded once. In bfloat16 that loses
    updates of less than about 1/256 of a weight: merge into a float32 copy where that matters.

    Args:
      params: As `frozen` in `attach`.
      lora_params: As in `attach`.

    Returns:
      A tree like `params`, sharing the leaves that are not adapted.

    Raises:
      ValueError: As `attach`; and for a result that is not finite, unless values are traced (inside `jax.jit`), where
        none can be looked at.
    """
    leaves, treedef = tree.flatten(params, is_leaf=is_factored)
    return tree.unflatten(treedef, {**leaves, **_formed(leaves, lora_params)})


def unmerge(params: Any, lora_params: Mapping[str, Adapter]) -> Any:
    """The inverse of `merge`, within the rounding of the base's dtype.

    Args:
      params: What `merge` returned.
      lora_params: What it was given.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: As `merge`; and for a leaf whose variant cannot be undone: under `Full`, whose own value `merge`
        replaced, or `DoRA`, whose norms it lost.
    """
    for path, adapter in lora_params.items():
        if not adapter.variant.invertible:
            name = type(adapter.variant).__name__
            raise ValueError(
                f"{path!r}: merging {name} loses the leaf's own value, so it cannot be undone: keep the frozen "
                "tree, or leave the path out of lora_params (the leaf then keeps its trained value)"
            )
    leaves, treedef = tree.flatten(params, is_leaf=is_factored)
    return tree.unflatten(treedef, {**leaves, **_formed(leaves, lora_params, undo=True)})


def _applied(leaves: Mapping[str, Any], lora_params: Mapping[str, Adapter], undo: bool = False) -> dict[str, Any]:
    """What each adapter makes of its leaf, or, to undo it, of what merging made of the leaf."""
    _refuse_attached(leaves)
    lora_params = together(lora_params)
    missing = [path for path in lora_params if path not in leaves]
    if missing:
        raise ValueError(
            f"lora_params has {len(missing)} of its {len(lora_params)} paths for leaves that the tree does not have, "
            f"{missing[0]!r} first: they were made for another model{tree.close_to(missing[0], leaves)}"
        )
    applied = {}
    for path, adapter in lora_params.items():
        leaf = leaves[path]
        if not tree.is_array(leaf) or tuple(leaf.shape) != adapter.site.shape:
            found = leaf.shape if tree.is_array(leaf) else type(leaf).__name__
            raise ValueError(
                f"{path!r}: the adapter was made for a leaf of shape {adapter.site.shape}, but the tree has {found} "
                "there: split again for this model"
            )
        check_mesh(path, leaf, adapter)
        applied[path] = applied_to(leaf, path, adapter, undo)
        if adapter.keys is not None:
            batch, _, _ = adapter.site.axes()
            drop = Dropout(adapter.keys, batch, adapter.variant.dropout)
            deltas = tuple(dataclasses.replace(delta, dropout=drop) for delta in applied[path].deltas)
            applied[path] = dataclasses.replace(applied[path], deltas=deltas)
    return applied


def applied_to(leaf: Any, path: str, adapter: Adapter, undo: bool = False) -> Any:
    """What a variant makes of a leaf and factors, any of which may be abstract; frozen factors have no gradient."""
    variant, labels = adapter.variant, adapter.variant.labels()

    def apply(leaf: Any, factors: Mapping[str, Any]) -> Any:
        held = {n: lax.stop_gradient(x) if labels.get(n) == FROZEN else x for n, x in factors.items()}
        make: Any = variant.undo if undo else variant.apply
        return sharded_alike(lambda *args: make(*args, adapter.site), Factored.of(leaf, path), held)

    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in (leaf, *adapter.factors.values()))
    return jax.eval_shape(apply, leaf, adapter.factors) if abstract else apply(leaf, adapter.factors)


def _refuse_attached(leaves: Mapping[str, Any]) -> None:
    for path, leaf in leaves.items():
        if is_factored(leaf):
            raise ValueError(f"{path!r} is attached already: use the frozen tree, or merge first")


def _formed(leaves: Mapping[str, Any], lora_params: Mapping[str, Adapter], undo: bool = False) -> dict[str, Any]:
    """What `_applied` gives, as arrays that lie where the leaves do; one after the other, for `starter`'s reason."""
    formed = {}
    for path, x in _applied(leaves, lora_params, undo).items():
        # A factor that takes the leaf's place is copied, so that merged weights outlive a donated lora_params.
        place = None if isinstance(x, jax.core.Tracer) else on_mesh(leaves[path])
        array = materialize(x, place) if is_factored(x) else jnp.array(x, copy=True, device=place)
        if not isinstance(array, jax.core.Tracer) and not bool(jnp.isfinite(array).all()):
            bad = int(array.size - jnp.isfinite(array).sum())
            cause = "the factors are" if bool(jnp.isfinite(leaves[path]).all()) else "the base is"
            raise ValueError(
                f"{path!r}: {bad} of {array.size} merged weights are not finite, because {cause} not (or the sum "
                "overflows); nothing was changed: go back to a checkpoint from before training diverged"
            )
        formed[path] = array
    return formed
