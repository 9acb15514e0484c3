"""Shards: the sharding of a whole weight as those of its operands, and back."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

from lora_jax.axes import Axes, Axis
from lora_jax.factored import Factored
from lora_jax.placement import names_of, ways

Shards = dict[Axis, Any]


def shards_of(weight: Factored, spec: PartitionSpec, mesh: Any) -> Shards | None:
    """For each axis of a weight that is sharded, the mesh axes that it is sharded over, as in a PartitionSpec.

    A dim made of several axes is sharded along the slowest. None where that one does not divide.
    """
    shards: Shards = {}
    for entry, group in zip(spec, weight.dims, strict=False):
        if entry is PartitionSpec.UNCONSTRAINED:
            shards.update(dict.fromkeys(group, entry))
            continue
        count = ways(entry, mesh)
        if count > 1 and (not group or group[0].size % count):
            return None
        if entry is not None and group:
            shards[group[0]] = entry
    return shards


def spec_of(axes: Axes, shards: Shards) -> PartitionSpec:
    """The PartitionSpec of an operand over these axes."""
    return PartitionSpec(*(shards.get(axis) for axis in axes))


def own_spec(weight: Factored) -> PartitionSpec:
    """The PartitionSpec that the types of a weight's operands make, those of the base first."""
    shards: Shards = {}
    for term in weight.terms:
        for array, axes in zip(term.operands, term.axes, strict=True):
            for axis, entry in zip(axes, jax.typeof(array).sharding.spec, strict=False):
                taken = {name for other in shards.values() for name in names_of(other)}
                if axis in weight.axes and taken.isdisjoint(names_of(entry)):
                    shards.setdefault(axis, entry)
    return PartitionSpec(*(shards.get(group[0]) if group else None for group in weight.dims))
