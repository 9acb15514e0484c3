"""Weights across devices: each factor is sharded as the axes are that it has, and every other axis is replicated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding

from lora_jax import compat
from lora_jax.axes import Axes, Axis
from lora_jax.explicit import typed
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter, rule
from lora_jax.network import Network
from lora_jax.placement import is_spec, ways
from lora_jax.shards import shards_of, spec_of


def constrained(weight: Factored, sharding: Any) -> Factored | None:
    """The weight with a sharding imposed on it; None where its factors cannot have it."""
    shards = shards_of(weight, sharding.spec, sharding.mesh) if isinstance(sharding, NamedSharding) else None
    if shards is None:
        return None

    def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        return imposed(array, NamedSharding(sharding.mesh, spec_of(axes, shards))), axes

    return weight.map(change)


def imposed(array: jax.Array, sharding: Any) -> jax.Array:
    """An array with a sharding, which its type says if axes are explicit."""
    impose = lax.with_sharding_constraint if compat.explicit_mesh(array) is None else jax.sharding.reshard
    return impose(array, sharding)


@rule("sharding_constraint", typed=True)
def sharding_constraint(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """The base is sharded as is said, and each factor along the axes that it shares with it."""
    value = constrained(weight, eqn.params["sharding"])
    return NotImplemented if value is None else value


@rule("reshard", typed=True)
def reshard(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """As a constraint, of types."""
    sharding = eqn.params["dst_sharding"]
    fits = shards_of(weight, sharding.spec, sharding.mesh) is not None
    return typed(weight, sharding) if fits else NotImplemented


@rule("shard_map", typed=True)
def shard_map(interpreter: Interpreter, eqn: Any, *operands: Any) -> Any:
    """Each factor gets the part of the weight's spec that its axes have: local factors multiply to the local ΔW."""
    mesh = eqn.params["mesh"]
    arrays, specs, locals_ = [], [], []
    for x, spec in zip(operands, eqn.params["in_specs"], strict=True):
        if not is_factored(x):
            arrays, specs, locals_ = [*arrays, x], [*specs, spec], [*locals_, jax.tree.structure(0)]
            continue
        shards = shards_of(x, spec, mesh)
        if shards is None:
            return NotImplemented
        if compat.explicit_mesh(x) is not None:
            x = typed(x, NamedSharding(mesh, spec))

        def local(axis: Axis, shards: dict[Axis, Any] = shards) -> Axis:
            return dataclasses.replace(axis, size=axis.size // ways(shards.get(axis), mesh))

        arrays += jax.tree.leaves(x)
        tree: Any = x.map(lambda _, axes, shards=shards: (spec_of(axes, shards), axes))  # pyright: ignore
        specs += jax.tree.leaves(tree, is_leaf=is_spec)
        locals_.append(jax.tree.structure(x.relabel(local)))

    def body(*arrays: jax.Array) -> tuple[Any, ...]:
        rest = iter(arrays)
        values = [jax.tree.unflatten(tree, [next(rest) for _ in range(tree.num_leaves)]) for tree in locals_]
        return tuple(interpreter.arrays(eqn, eqn.params["jaxpr"], *values))

    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=eqn.params["out_specs"],
        axis_names=eqn.params["newly_manual_axes"],
        check_vma=eqn.params["check_vma"],
    )(*arrays)


@rule("pvary")
def pvary(_: Interpreter, eqn: Any, weight: Factored) -> Factored:
    """A replicated weight that meets varying data is marked so, operand by operand, where it is not yet."""

    def mark(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        new = tuple(name for name in eqn.params["axes"] if name not in compat.varying(array))
        return (eqn.primitive.bind(array, **{**eqn.params, "axes": new}) if new else array), axes

    return weight.map(mark)


@rule("all_gather", "all_gather_invariant")
def all_gather(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """What differs between devices is gathered along a new axis; a factor that is the same on all stays where it is."""
    params = {**eqn.params, "all_gather_dimension": 0, "tiled": False}
    if params.get("axis_index_groups") is not None:
        return NotImplemented
    devices = Axis(next(weight.fresh()), params["axis_size"])
    d, names = eqn.params["all_gather_dimension"], eqn.params["axis_name"]
    weight = weight.each(lambda network: _gathered(network, devices, names, lambda x: eqn.primitive.bind(x, **params)))
    group = (*weight.dims[:d], (devices, *weight.dims[d]), *weight.dims[d + 1 :])
    return dataclasses.replace(
        weight, dims=group if eqn.params["tiled"] else (*weight.dims[:d], (devices,), *weight.dims[d:])
    )


def _gathered(network: Network, devices: Axis, names: Any, gather: Callable[[jax.Array], jax.Array]) -> Network:
    def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        return (gather(array), (devices, *axes)) if compat.may_vary(array, names) else (array, axes)

    return dataclasses.replace(dataclasses.replace(network, dropout=None).map(change), dropout=network.dropout)


@rule("psum", "psum_invariant")
def psum(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """A sum over devices is that of the one factor that differs, or over an axis of devices if several do."""
    names = eqn.params["axes"]
    if eqn.params.get("axis_index_groups") is not None or any(isinstance(name, int) for name in names):
        return NotImplemented
    return weight.each(lambda network: _summed(network, weight, names, lambda x: eqn.primitive.bind(x, **eqn.params)))


def _summed(network: Network, weight: Factored, names: Any, sum_of: Callable[[jax.Array], jax.Array]) -> Network:
    differs = [i for i, array in enumerate(network.operands) if compat.may_vary(array, names)]
    if len(differs) > 1:
        devices = Axis(next(weight.fresh()), compat.axis_size(names))
        return _gathered(network, devices, names, lambda array: compat.all_gather_invariant(array, names))
    one = differs[0] if differs else 0
    operands = tuple(sum_of(x) if i == one else x for i, x in enumerate(network.operands))
    return dataclasses.replace(network, operands=operands)


@rule("reduce_scatter")
def reduce_scatter(interpreter: Interpreter, eqn: Any, weight: Factored) -> Any:
    """Each device's part of the sum over devices."""
    params, d = eqn.params, eqn.params["scatter_dimension"]
    names, count = params["axis_name"], params["axis_size"]
    group = weight.dims[d]
    if params["axis_index_groups"] is not None or not params["tiled"] or not group or group[0].size % count:
        return NotImplemented
    axis = group[0]
    part = dataclasses.replace(axis, size=axis.size // count)

    def scatter(array: jax.Array, dim: int) -> jax.Array:
        return eqn.primitive.bind(array, **{**params, "scatter_dimension": dim})

    def own(array: jax.Array, dim: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, lax.axis_index(names) * part.size, part.size, dim)

    def of(network: Network) -> Network:
        differs = [i for i, x in enumerate(network.operands) if compat.may_vary(x, names)]
        if len(differs) != 1 or axis not in network.axes[differs[0]]:
            network = _summed(network, weight, names, lambda x: lax.psum(x, names))
            differs = []
        operands = [
            (scatter if i in differs else own)(x, axes.index(axis)) if axis in axes else x
            for i, (x, axes) in enumerate(zip(network.operands, network.axes, strict=True))
        ]
        axes = tuple(tuple(part if a == axis else a for a in named) for named in network.axes)
        return dataclasses.replace(network, operands=tuple(operands), axes=axes)

    dims = tuple(tuple(part if a == axis else a for a in g) for g in weight.dims)
    return dataclasses.replace(weight.each(of), dims=dims)


@rule("ppermute")
def ppermute(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """Every factor that differs between devices moves; where none comes, all of them are zero."""
    names = eqn.params["axis_name"]

    def of(network: Network) -> Network:
        differs = [i for i, array in enumerate(network.operands) if compat.may_vary(array, names)] or [0]
        operands = (eqn.primitive.bind(x, **eqn.params) if i in differs else x for i, x in enumerate(network.operands))
        return dataclasses.replace(network, operands=tuple(operands))

    return weight.each(of)
