"""Shardings of factors and of their optimizer state, derived from those of the weights that they adapt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lora_jax import tree
from lora_jax.axes import Axes, weight_axes
from lora_jax.choice import first_matches
from lora_jax.explicit import explicit_sharding, under_automatic_axes
from lora_jax.factors import Adapter, is_adapter
from lora_jax.placement import by_path, check_fits, is_spec, mesh_of, on_mesh, spec_of
from lora_jax.sites import Site
from lora_jax.variants.base import SHARED, Factors, Variant


def partition_specs(state: Any, base: Any) -> Any:
    """How the arrays of a training state are split over a mesh: each factor along an axis of its leaf as the leaf is.

    So A follows the in axes, B the out axes, and both the batch axes: stacked layers, experts. A rank is never split,
    nor an axis that a variant splits in two, as LoKr does. The moments that an optimizer keeps of a factor follow the
    factor, if they have its shape (after other axes, where several are stacked); others, as Adafactor's, are whole. So
    is what leaves share, as in VeRA. An array that belongs to no adapter stays where it lies on a mesh; else it is
    split like the leaf of `base` that its path ends with, as frozen leaves are, or, as a step count, whole.

    Args:
      state: Any pytree with adapters in it, of arrays or of `jax.ShapeDtypeStruct`: `lora_params`, optimizer state, or
        both and more.
      base: A tree like `params` that says how each leaf is split: of `PartitionSpec`, of `NamedSharding`, of arrays (or
        `jax.ShapeDtypeStruct`) that have one, or of Flax's boxes with axis names. Logical names give logical specs, for
        `flax.linen.logical_to_mesh`.

    Returns:
      A tree like `state`, with a `PartitionSpec` for each array.

    Raises:
      ValueError: `base` has nothing at the path of an adapter, or a spec of more dimensions than the leaf has.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((64, 32))}, {"w": lora.LoRA(rank=4)})
    >>> specs = partition_specs(lora_params, {"w": PartitionSpec("fsdp", "tp")})
    >>> [tuple(specs["w"].factors[name]) for name in ("A", "B")]
    [('fsdp', None), (None, 'tp')]
    """
    return _placed(state, by_path(base), None)


def shardings(state: Any, base: Any, mesh: Mesh | AbstractMesh | None = None) -> Any:
    """As `partition_specs`, with a `NamedSharding` for each array: for `device_put`, `in_shardings`, `out_shardings`.

    Give them to a jitted step as its `out_shardings`: without, the compiler chooses how updated factors lie.

    Args:
      state: As in `partition_specs`.
      base: As in `partition_specs`.
      mesh: The mesh whose axes the specs name; None for that of `base`.

    Raises:
      ValueError: As `partition_specs`; there is no mesh, or more than one; or an adapted leaf is split along an axis
        that the mesh does not have or whose size does not divide the leaf's.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    >>> params = {"w": jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, PartitionSpec("fsdp", "tp")))}
    >>> frozen, lora_params = lora.split(jax.random.key(0), params, {"w": lora.LoRA(rank=4)})
    >>> lora_params["w"].factors["A"].addressable_shards[0].data.shape
    (16, 4)
    >>> lora_params = jax.device_put(lora_params, shardings(lora_params, frozen))  # where split has put them already
    """
    places = by_path(base)
    if mesh is None:
        meshes = {place.mesh for place in places.values() if isinstance(place, NamedSharding)}
        if len(meshes) != 1:
            raise ValueError(
                f"base lies on {len(meshes)} meshes, and factors lie on one: give mesh=, or a base that lies on it"
            )
        mesh = meshes.pop()
    specs = _placed(state, places, mesh)
    return jax.tree.map(functools.partial(NamedSharding, mesh), specs, is_leaf=is_spec)


def match_partition_rules(
    rules: Mapping[str, PartitionSpec], params: Any, mesh: Mesh | AbstractMesh | None = None
) -> Any:
    """Partition rules by path: for each leaf, the spec of the first regular expression that matches its whole path.

    Args:
      rules: From regular expression to `PartitionSpec`; `PartitionSpec()` leaves a leaf whole everywhere.
      params: Any pytree of arrays, or of `jax.ShapeDtypeStruct`.
      mesh: Where it is given, the result is of `NamedSharding`, and specs are checked against it.

    Returns:
      A tree like `params`, which `partition_specs` and `shardings` take as `base`.

    Raises:
      ValueError: A rule that no leaf has to itself; a leaf that no rule matches; a spec of more dimensions than its
        leaf has, or of mesh axes that do not exist or do not divide.

    >>> import jax.numpy as jnp
    >>> rules = {".*/kernel": PartitionSpec("fsdp", "tp"), ".*": PartitionSpec()}
    >>> specs = match_partition_rules(rules, {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}})
    >>> tuple(specs["dense"]["kernel"]), tuple(specs["dense"]["bias"])
    (('fsdp', 'tp'), ())
    """
    leaves, treedef = tree.flatten(params)
    matched = first_matches(rules, leaves)
    if left := [path for path in leaves if path not in matched]:
        raise ValueError(
            f"no rule matches {left[0]!r}, nor {len(left) - 1} others: a last rule {{'.*': PartitionSpec()}} leaves "
            "whole what no other rule splits"
        )
    specs = {path: rules[matched[path]] for path in leaves}
    for path, spec in specs.items():
        check_fits(path, getattr(leaves[path], "shape", ()), spec, mesh)
    return tree.unflatten(treedef, {path: NamedSharding(mesh, spec) if mesh else spec for path, spec in specs.items()})


def starter() -> Callable[[jax.Array, Any, Variant, Site], tuple[Any, Factors]]:
    """`variant.initial` with the weight of a leaf: on a mesh each factor is made where it belongs, and whole nowhere.

    One program for all leaves of a form; it does not return a weight that stays as it is, which thus is not copied.
    """
    programs: dict[Any, tuple[Variant, Any]] = {}

    def start(key: jax.Array, leaf: Any, variant: Variant, site: Site) -> tuple[Any, Factors]:
        sharding = on_mesh(leaf) or explicit_sharding(leaf)
        if sharding is None:
            return variant.initial(key, leaf, site)
        abstract = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else None

        def initial(key: jax.Array, leaf: Any) -> tuple[Any, Factors]:
            weight = leaf if abstract is None else abstract
            frozen, factors = variant.initial(key, weight, site)
            return (None if frozen is weight else frozen), factors

        # Rules may make a variant anew for each leaf, and what says how factors begin may be an object or a function.
        own = (v if isinstance(v, str | float | int) else id(v) for v in vars(variant).values())
        form = type(variant), *own, site, sharding, abstract
        if form not in programs:
            specs = factor_specs(variant, site, sharding.spec)
            out = sharding, {name: NamedSharding(sharding.mesh, spec) for name, spec in specs.items()}
            started = functools.partial(under_automatic_axes, initial, out=out)
            programs[form] = variant, jax.jit(started, out_shardings=out)
        # One after the other: XLA's CPU devices share threads, and independent programs may wait for each other.
        frozen, factors = jax.block_until_ready(programs[form][1](key, None if abstract else leaf))
        return (leaf if frozen is None else frozen), factors

    return start


def factor_specs(variant: Variant, site: Site, spec: PartitionSpec) -> dict[str, PartitionSpec]:
    """The spec of each factor that a leaf has of its own, from the leaf's."""
    entries = dict(zip((axis.name for axis in weight_axes(site.shape)), spec, strict=False))
    axes = _axes(variant.begun(), site)
    return {
        name: PartitionSpec(*(entries.get(axis.name) for axis in axes.get(name, ()))) for name in variant.names(site)
    }


@functools.lru_cache(maxsize=4096)
def _axes(variant: Variant, site: Site) -> dict[str, Axes]:
    """Kept, since a state has each factor several times, and a model many of one form."""
    return variant.axes(site)


def check_mesh(path: str, leaf: Any, adapter: Adapter) -> None:
    """Raises ValueError where a leaf and its factors lie on different meshes."""
    mesh = mesh_of(leaf)
    for name, factor in adapter.factors.items():
        other = mesh_of(factor)
        if mesh is not None and other is not None and not _same(mesh, other):
            how = "other devices or another order" if mesh.shape == other.shape else dict(other.shape)
            raise ValueError(
                f"{path!r} lies on a mesh of {dict(mesh.shape)}, and its factor {name} on another, of {how}: "
                "move the adapter there with jax.device_put(lora_params, lora.shardings(lora_params, frozen))"
            )


def _same(mesh: Mesh | AbstractMesh, other: Mesh | AbstractMesh) -> bool:
    """Whether two meshes have the same axes, and the same devices in one order as far as is known."""
    if isinstance(mesh, Mesh) and isinstance(other, Mesh) and [*mesh.devices.flat] != [*other.devices.flat]:
        return False
    return mesh.shape == other.shape


def _placed(state: Any, places: Mapping[str, Any], mesh: Mesh | AbstractMesh | None) -> Any:
    def of(keys: tuple[Any, ...], node: Any) -> Any:
        if not is_adapter(node):
            return spec_of(on_mesh(node) or _like_leaf(keys, node, places))
        if not keys:
            raise ValueError("the state is an Adapter by itself, of a path that is not known: give {path: adapter}")
        path, site = str(getattr(keys[-1], "key", keys[-1])), node.site
        unboxed = path.removesuffix("/value")  # where a spec is that Flax took out of a box
        if site.kind == SHARED:
            specs, sizes = dict.fromkeys(node.factors, PartitionSpec()), {}
        elif path in places or unboxed in places:
            spec = spec_of(places.get(path, places.get(unboxed)))
            check_fits(path, site.shape, spec, mesh)
            specs = factor_specs(node.variant, site, spec)
            sizes = {name: tuple(axis.size for axis in axes) for name, axes in _axes(node.variant, site).items()}
        else:
            hint = tree.close_to(path, places)
            raise ValueError(f"base has no leaf at {path!r}, which is adapted: give it a tree like params{hint}")
        # Of an optimizer's state some adapters lack factors, or hold a mask or several arrays in their place.
        factors = {
            name: jax.tree.map(functools.partial(_like_factor, specs[name], sizes.get(name, ())), x)
            for name, x in node.factors.items()
        }
        return dataclasses.replace(node, factors=factors, keys=None if node.keys is None else PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=is_adapter)


def _like_factor(spec: PartitionSpec, shape: tuple[int, ...], array: Any) -> PartitionSpec:
    """The spec of what stands where a factor does: the factor's, or that of several stacked; else it is whole.

    Several are the adapters of a bank, or an optimizer's memory; of another shape are Adafactor's rows and columns.
    """
    own = getattr(array, "shape", ())
    more = len(own) - len(shape)
    return PartitionSpec(*(None,) * more, *spec) if shape and own[more:] == shape else PartitionSpec()


def _like_leaf(keys: tuple[Any, ...], array: Any, places: Mapping[str, Any]) -> Any:
    """The place of the leaf whose path is the end of an array's, as in a tree that holds the base or its moments."""
    parts = jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value").split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    place = next((places[end] for end in ends if end in places), None)
    return place if len(spec_of(place)) <= getattr(array, "ndim", 0) else None
