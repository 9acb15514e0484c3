"""Shardings of factors, derived from those of the weights that they adapt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import tree
from lora_jax.axes import Axes, weight_axes
from lora_jax.factors import Adapter, LoraParams, is_adapter
from lora_jax.variants.base import SHARED


def specs(lora_params: Mapping[str, Adapter], base: Any) -> LoraParams:
    """How each factor is split over a mesh: along an axis of its leaf as the leaf is, along a rank not at all.

    So A follows the in axes, B the out axes, and both the batch axes: stacked layers, experts.

    Args:
      lora_params: What trains, of arrays or of `jax.ShapeDtypeStruct`.
      base: A tree like `params` of `PartitionSpec`, of `NamedSharding`, or of arrays that have one.

    Returns:
      Like `lora_params`, with a `PartitionSpec` for each factor. Factors that leaves share are whole everywhere.

    Raises:
      ValueError: `base` has no leaf at a path, or a spec of more dimensions than the leaf has.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((64, 32))}, {"w": lora.LoRA(rank=4)})
    >>> specs(lora_params, {"w": PartitionSpec("fsdp", "tp")})["w"].factors
    {'A': P('fsdp', None), 'B': P(None, 'tp')}
    """
    leaves, _ = tree.flatten(base, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec))

    def derived(path: str, adapter: Adapter) -> Adapter:
        if adapter.site.kind == SHARED:
            return dataclasses.replace(adapter, factors=dict.fromkeys(adapter.factors, PartitionSpec()))
        if path not in leaves:
            raise ValueError(f"base has no spec or array at {path!r}{tree.close_to(path, leaves)}")
        spec = spec_of(leaves[path])
        if len(spec) > len(adapter.site.shape):
            raise ValueError(f"{path!r} has shape {adapter.site.shape}, and its {spec} is of more dimensions")
        axes = adapter.variant.axes(adapter.site)
        factors = {name: _along(axes.get(name, ()), adapter.site.shape, spec) for name in adapter.factors}
        return dataclasses.replace(adapter, factors=factors, keys=None)

    return {path: derived(path, adapter) for path, adapter in lora_params.items()}


def shardings(lora_params: Mapping[str, Adapter], base: Any, mesh: Mesh | None = None) -> LoraParams:
    """As `specs`, with a `NamedSharding` for each factor: for `jax.device_put`, `in_shardings` and `out_shardings`.

    Args:
      lora_params: As in `specs`.
      base: As in `specs`.
      mesh: Whose axes the specs name; None for that of the base's arrays or shardings.

    Raises:
      ValueError: As `specs`; and where there is no mesh, or more than one.
    """
    if mesh is None:
        meshes = {x.mesh for leaf in jax.tree.leaves(base) if isinstance(x := sharding_of(leaf), NamedSharding)}
        if len(meshes) != 1:
            raise ValueError(f"base lies on {len(meshes)} meshes, and factors on one: give mesh=")
        (mesh,) = meshes
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(lora_params, base), is_leaf=is_spec)


def state_shardings(state: Any, shardings: LoraParams) -> Any:
    """The sharding of each array of a training state: of moments that of their factor, and whole for all others.

    Args:
      state: Any tree with trees like `lora_params` in it, such as `jax.eval_shape(tx.init, lora_params)`.
      shardings: What `shardings` made of `lora_params`.
    """
    (mesh, *_) = (leaf.mesh for leaf in jax.tree.leaves(shardings))

    def of(path: tuple[Any, ...], node: Any) -> Any:
        if not is_adapter(node):
            return NamedSharding(mesh, PartitionSpec())
        own = shardings[path[-1].key].factors
        held = {name: own[name] if tree.is_array(x) else x for name, x in node.factors.items()}
        return dataclasses.replace(node, factors=held)

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=is_adapter)


def sharding_of(leaf: Any) -> Any:
    """An array's sharding, or the sharding itself."""
    return getattr(leaf, "sharding", leaf)


def is_spec(leaf: Any) -> bool:
    """Whether a leaf is a `PartitionSpec`."""
    return isinstance(leaf, PartitionSpec)


def spec_of(leaf: Any) -> PartitionSpec:
    """The spec of a leaf of `base`; an array or a sharding without one is whole on its device."""
    if isinstance(leaf, PartitionSpec):
        return leaf
    return getattr(sharding_of(leaf), "spec", PartitionSpec())


def _along(axes: Axes, shape: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    entries = dict(zip((axis.name for axis in weight_axes(shape)), spec, strict=False))
    return PartitionSpec(*(entries.get(axis.name) for axis in axes))
