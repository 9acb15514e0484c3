"""Factors are made where their leaves lie, however they begin; what cannot is an error."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from checks import error, normal, randomized
from flax import linen as nn
from flax import nnx
from in_numpy import in_numpy
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_laws import VARIANTS

import lora_jax as lora

MESH = jax.make_mesh((2, 4), ("f", "t"), axis_types=(AxisType.Auto,) * 2)
PARAMS = {"kernel": normal(16, 8, seed=1), "heads": normal(2, 16, 4, 6, seed=2)}
SPECS = {"kernel": P("f", "t"), "heads": P(None, "f", "t")}
PLACED = jax.device_put(PARAMS, {path: NamedSharding(MESH, spec) for path, spec in SPECS.items()})


def rules(variant):
    return {"kernel": variant, "heads": variant.at(batch_axes=0, in_axes=1, out_axes=(2, 3))}


BEGINNINGS = {init: lora.LoRA(rank=2, init=init) for init in ("orthogonal", "pissa", "olora")}


@pytest.mark.parametrize("name", [*VARIANTS, *BEGINNINGS])
def test_on_a_mesh_it_begins_as_on_one_device(name):
    variant = {**VARIANTS, **BEGINNINGS}[name]
    used = rules(variant) if name == "LoRA" else {"heads": rules(variant)["heads"]}
    frozen, lora_params = lora.split(jax.random.key(0), PLACED, used)
    expected = jax.jit(lambda params: lora.split(jax.random.key(0), params, used))(PARAMS)
    assert error((frozen, lora_params), expected) < 1e-6
    lie(lora_params, lora.shardings(lora_params, PLACED))
    if name in BEGINNINGS:
        return
    assert all(frozen[path] is PLACED[path] for path in PLACED)  # never copied
    lora_params = randomized(lora_params)
    merged = lora.merge(frozen, lora_params)
    lie(merged, {path: leaf.sharding for path, leaf in PLACED.items()})
    assert error(merged, in_numpy(lora.merge)(PARAMS, jax.device_get(lora_params))) < 1e-6


def test_how_factors_began_makes_no_difference():
    """As that of a file: the name says that more was needed than the weight."""
    _, lora_params = lora.split(jax.random.key(0), PARAMS, {"kernel": lora.LoRA(2)})
    loaded = dataclasses.replace(lora_params["kernel"], variant=lora.LoRA(2, init="eva"))
    assert spec(lora.partition_specs({"kernel": loaded}, SPECS)) == ("f", None)


def lie(arrays, shardings):
    """Each array lies as its sharding says, on the mesh and not on one of its devices."""
    for array, sharding in zip(jax.tree.leaves(arrays), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim), (array.shape, array.sharding, sharding)


def spec(lora_params, name="A"):
    (adapter,) = lora_params.values()
    return tuple(adapter.factors[name])


LOGICAL = nn.Dense(8, kernel_init=nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp")))
NAMES = (("embed", "f"), ("mlp", "t"))


@pytest.mark.parametrize("unbox", [True, False])
def test_logical_names_of_flax_s_boxes(unbox):
    boxed = LOGICAL.init(jax.random.key(0), jnp.ones((1, 16)))
    params = nn.unbox(boxed) if unbox else boxed
    frozen, lora_params = lora.split(jax.random.key(0), params, {".*kernel.*": lora.LoRA(2)})
    for base in (boxed, nn.get_partition_spec(boxed)):
        logical = lora.partition_specs(lora_params, base)
        assert spec(logical) == ("embed", None)
        placed = jax.device_put(lora_params, nn.logical_to_mesh_sharding(logical, MESH, NAMES))
        assert spec(jax.tree.map(lambda x: x.sharding.spec, placed), "B") == (None, "t")
    with pytest.raises(ValueError, match="names 'embed', and the mesh has the axes .*: give specs in its axes"):
        lora.shardings(lora_params, boxed, MESH)


def test_nnx():
    with jax.set_mesh(MESH):
        partitioned = nnx.with_partitioning(nnx.initializers.normal(), ("f", "t"))
        _, params = nnx.split(nnx.Linear(16, 8, rngs=nnx.Rngs(0), kernel_init=partitioned))
    _, lora_params = lora.split(jax.random.key(0), params, {".*kernel.*": lora.LoRA(2)})
    for base in (params, nnx.get_partition_spec(params)):
        assert spec(lora.partition_specs(lora_params, base)) == ("f", None)
    lie(lora_params, lora.shardings(lora_params, params))


def test_a_state_follows_its_factors_wherever_they_are_in_it():
    _, lora_params = lora.split(jax.random.key(0), PARAMS, {"kernel": lora.LoRA(2)})
    adam = optax.adamw(1e-3)
    state = {
        "lora": lora_params,
        "moments": (adam.init(lora_params), lora.optimizer(adam).init(lora_params)),
        "step": 0,
    }
    expected = {(16, 2): ("f", None), (2, 8): (None, "t"), (): ()}
    arrays, specs = jax.tree.leaves(state), jax.tree.leaves(lora.partition_specs(state, SPECS))
    assert [tuple(spec) for spec in specs] == [expected[jnp.shape(x)] for x in arrays]
    assert len(arrays) == 2 + 2 * (4 + 1) + 1  # A and B; twice Adam's moments of both, and its count; the step


OPTIMIZERS = {
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "novograd": optax.novograd(1e-3),
    "sm3": optax.sm3(1e-3),
    "lbfgs": optax.scale_by_lbfgs(3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_other_shapes_lie_on_the_mesh(name):
    _, lora_params = lora.split(jax.random.key(0), PARAMS, {"kernel": lora.LoRA(2)})
    state = OPTIMIZERS[name].init(lora_params)
    places = lora.shardings(state, SPECS, MESH)
    lie(jax.device_put(state, places), places)
    expected = {(16, 2): ("f", None), (2, 8): (None, "t"), (3, 16, 2): (None, "f", None), (3, 2, 8): (None, None, "t")}
    arrays = [
        (jnp.shape(x), tuple(place.spec)) for x, place in zip(*map(jax.tree.leaves, (state, places)), strict=True)
    ]
    assert all(found == expected.get(shape, ()) for shape, found in arrays)


def test_a_bank_lies_as_its_adapters():
    keys = jax.random.split(jax.random.key(0), 3)
    bank = jax.vmap(lambda key: lora.split(key, PLACED, {"kernel": lora.LoRA(2)})[1])(keys)
    assert spec(lora.partition_specs(bank, SPECS), "B") == (None, None, "t")


def test_the_base_and_its_moments_lie_as_the_base_wherever_they_are():
    _, lora_params = lora.split(jax.random.key(0), PARAMS, {"kernel": lora.LoRA(2)})
    tree = {"base": PARAMS, "lora": lora_params}
    state = {"params": tree, "moments": jax.eval_shape(optax.adam(1e-3).init, tree), "kernel": 0}
    specs = lora.partition_specs(state, SPECS)
    assert specs["params"]["base"] == specs["moments"][0].mu["base"] == SPECS
    assert specs["kernel"] == P()


def test_what_lies_on_a_mesh_already_stays_there():
    count = jax.device_put(jnp.ones(8), NamedSharding(MESH, P("f")))
    assert lora.shardings({"count": count}, PLACED)["count"].spec == P("f")


def test_rules_give_the_first_spec_that_matches():
    specs = lora.match_partition_rules({"heads": P(None, "f"), ".*": P("t")}, PARAMS)
    assert specs == {"kernel": P("t"), "heads": P(None, "f")}
    assert lora.match_partition_rules({".*": P()}, PARAMS, MESH) == dict.fromkeys(PARAMS, NamedSharding(MESH, P()))
    assert lora.match_partition_rules({".*": P()}, {"w": 1.0, "name": "w"}) == {"w": P(), "name": P()}


def test_rules_count_more_than_the_names_of_a_box():
    boxed = LOGICAL.init(jax.random.key(0), jnp.ones((1, 16)))
    _, lora_params = lora.split(jax.random.key(0), boxed, {".*kernel.*": lora.LoRA(2)})
    base = lora.match_partition_rules({".*kernel.*": P("f", "t"), ".*": P()}, boxed)
    assert spec(lora.partition_specs(lora_params, base)) == ("f", None)


def test_merged_weights_lie_as_the_base_wherever_the_factors_come_from():
    _, lora_params = lora.split(
        jax.random.key(0), PARAMS, {"kernel": lora.Full(), "heads": rules(lora.LoRA(2))["heads"]}
    )
    merged = lora.merge(PLACED, lora_params)
    lie(merged, {path: leaf.sharding for path, leaf in PLACED.items()})


@functools.cache
def adapted():
    return lora.split(jax.random.key(0), PLACED, rules(lora.LoRA(2)))


ERRORS = {
    "an axis that does not divide": (
        lambda: lora.match_partition_rules({".*": P("f", None, None, "t")}, {"heads": PARAMS["heads"]}, MESH),
        r"'heads' \(2, 16, 4, 6\): .* splits dimension 3, of size 6, in 4 along 't', which does not divide it",
    ),
    "an axis that does not divide, of the leaf of a factor": (
        lambda: lora.shardings(adapted()[1], {"kernel": P(), "heads": P(None, None, None, ("f", "t"))}, MESH),
        r"'heads' .* splits dimension 3, of size 6, in 8 along \('f', 't'\), which does not divide it",
    ),
    "an axis that the mesh does not have": (
        lambda: lora.shardings(adapted()[1], {"kernel": P("model"), "heads": P()}, MESH),
        r"'kernel' .* names 'model', and the mesh has the axes {'f': 2, 't': 4}",
    ),
    "too many dimensions": (
        lambda: lora.partition_specs(adapted()[1], {"kernel": P("f", "t", None), "heads": P()}),
        r"'kernel' \(16, 8\): .* is of 3 dimensions, and the leaf of 2",
    ),
    "no spec for an adapted path": (
        lambda: lora.shardings(adapted()[1], {"kernle": P(), "heads": P()}, MESH),
        "base has no leaf at 'kernel', which is adapted: give it a tree like params; close matches: kernle",
    ),
    "a spec for a path that does not exist": (
        lambda: lora.match_partition_rules({"kernle": P("f"), ".*": P()}, PARAMS),
        "the rule 'kernle' matches no path .*; close matches: kernel",
    ),
    "a leaf without a rule": (
        lambda: lora.match_partition_rules({"kernel": P("f")}, PARAMS),
        "no rule matches 'heads', nor 0 others: a last rule {'.*': PartitionSpec.*} leaves whole",
    ),
    "an adapter by itself": (
        lambda: lora.partition_specs(adapted()[1]["kernel"], SPECS),
        "the state is an Adapter by itself, of a path that is not known: give {path: adapter}",
    ),
    "no mesh": (
        lambda: lora.shardings(adapted()[1], SPECS),
        "base lies on 0 meshes, and factors lie on one: give mesh=",
    ),
}
OTHER = {
    "of another shape": jax.make_mesh((4, 2), ("f", "t"), axis_types=(AxisType.Auto,) * 2),
    "of some devices": jax.make_mesh((2,), ("f",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]),
    "in another order": Mesh(MESH.devices[::-1], MESH.axis_names),
}
VERBS = {"attach": lora.attach, "merge": lora.merge, "attach under jit": jax.jit(lora.attach)}


def moved(mesh, verb):
    frozen, lora_params = adapted()
    return verb(frozen, jax.device_put(lora_params, NamedSharding(mesh, P())))


for _mesh, _verb in [*itertools.product(OTHER, ["attach", "merge"]), ("of another shape", "attach under jit")]:
    ERRORS[f"{_verb}, factors on a mesh {_mesh}"] = (
        functools.partial(moved, OTHER[_mesh], VERBS[_verb]),
        r"'heads' lies on a mesh of {'f': 2, 't': 4}, and its factor A on another, of .*lora.shardings\(",
    )


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    wrong, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        wrong()
