"""Where a leaf lies: its sharding over a mesh, or a spec that stands for one."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.core
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import tree


def by_path(base: Any) -> dict[str, Any]:
    """The placement of each leaf of a tree; a box of Flax's counts as a leaf."""
    leaves, _ = tree.flatten(base, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec) or is_box(x))
    return {path: placement(leaf) for path, leaf in leaves.items()}


def placement(leaf: Any) -> Any:
    """A sharding or a spec: what an array lies by, the leaf itself, or the axes that a box of Flax's names unless it
    holds a spec.

    None for an array that is traced or has none yet.
    """
    if is_box(leaf):
        return leaf.value if is_spec(leaf.value) else on_mesh(leaf.value) or leaf.get_partition_spec()
    if isinstance(leaf, jax.sharding.Sharding | PartitionSpec):
        return leaf
    return None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)


def on_mesh(leaf: Any) -> NamedSharding | None:
    """The placement of a leaf that lies on a mesh."""
    lies = placement(leaf)
    return lies if isinstance(lies, NamedSharding) else None


def mesh_of(leaf: Any) -> Any:
    """The mesh that an array lies on, if any; of a traced array the one that its type names."""
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else on_mesh(leaf)
    return None if sharding is None or sharding.mesh.empty else sharding.mesh


def spec_of(placement: Any) -> PartitionSpec:
    """The spec of a placement; where there is none, the leaf is whole."""
    return placement if is_spec(placement) else getattr(placement, "spec", PartitionSpec())


def is_box(leaf: Any) -> bool:
    """Whether a leaf is a `flax.linen.Partitioned`, known by what it does: Flax takes long to import."""
    return hasattr(leaf, "get_partition_spec") and hasattr(leaf, "value")


def is_spec(leaf: Any) -> bool:
    """Whether a leaf is a `PartitionSpec`."""
    return isinstance(leaf, PartitionSpec)


def ways(entry: Any, mesh: Any) -> int:
    """How many parts an entry of a PartitionSpec makes."""
    return math.prod(mesh.shape[name] for name in names_of(entry))


def check_fits(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Any = None) -> None:
    """Raises ValueError where a leaf cannot be split as a spec says, over a mesh if one is given."""
    if len(spec) > len(shape):
        raise ValueError(f"{path!r} {shape}: {spec} is of {len(spec)} dimensions, and the leaf of {len(shape)}")
    for d, entry in enumerate(spec):
        if mesh is None or entry is PartitionSpec.UNCONSTRAINED:
            continue
        if absent := [name for name in names_of(entry) if name not in mesh.shape]:
            raise ValueError(
                f"{path!r} {shape}: {spec} names {absent[0]!r}, and the mesh has the axes {dict(mesh.shape)}: give "
                "specs in its axes (flax.linen.logical_to_mesh translates logical names)"
            )
        if shape[d] % ways(entry, mesh):
            raise ValueError(
                f"{path!r} {shape}: {spec} splits dimension {d}, of size {shape[d]}, in {ways(entry, mesh)} along "
                f"{entry!r}, which does not divide it: split another dimension, or leave it whole with None"
            )


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
