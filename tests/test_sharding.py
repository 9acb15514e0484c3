"""Weights inside shard_map and under constraints: every collective leaves them factored, and means what it meant."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from checks import error, formed, normal, split_at_random
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
W = normal(16, 24, seed=1)
X = normal(6, 16, seed=2)
RING = [(0, 1), (1, 2), (2, 3), (3, 0)]


def layer(x, w):
    return jnp.tanh(x @ w)


def summed(y):
    return lax.psum(y, "model")


def scattered(w, dim=0):
    return lax.psum_scatter(w, "model", scatter_dimension=dim, tiled=True)


def rotated(w, x):
    """A ring: each device's rows meet every device's columns."""
    x, y = (lax.pcast(a, names, to="varying") for a, names in ((x, "model"), (jnp.zeros((3, 6)), ("data", "model"))))
    return lax.fori_loop(0, 4, lambda _, c: (lax.ppermute(c[0], "model", RING), c[1] + layer(c[0], w)), (x, y))[1]


# name: body over the parts of w and x, spec of w, spec of the result; x is split over "data"
BODIES = {
    "replicated": (lambda w, x: layer(x, w), P(), P("data")),
    "columns": (lambda w, x: layer(x, w), P(None, "model"), P("data", "model")),
    "both": (
        lambda w, x: jnp.tanh(lax.psum(lax.all_gather(x, "data", tiled=True)[:, :8] @ w, "data")),
        P("data", "model"),
        P(None, "model"),
    ),
    "gathered_rows": (lambda w, x: summed(layer(x, lax.all_gather(w, "model", tiled=True))), P("model"), P("data")),
    "gathered_columns": (
        lambda w, x: summed(layer(x, lax.all_gather(w, "model", axis=1, tiled=True))),
        P(None, "model"),
        P("data"),
    ),
    "gathered_along_the_other_axis": (
        lambda w, x: summed(layer(x[:, :4], lax.all_gather(w, "model", axis=1, tiled=True))),
        P("model"),
        P("data"),
    ),
    "gathered_to_a_stack": (
        lambda w, x: summed(jnp.einsum("nd,edk->enk", x, lax.all_gather(w, "model", axis=0)).sum(0)),
        P(None, "model"),
        P("data"),
    ),
    "summed_columns": (lambda w, x: layer(x, summed(w)), P(None, "model"), P("data")),
    "summed_rows": (lambda w, x: layer(x[:, :4], summed(w)), P("model"), P("data")),
    "summed_over_both": (lambda w, x: layer(x[:, :8], lax.psum(w, ("data", "model"))), P("data", "model"), P("data")),
    "averaged": (lambda w, x: layer(x, lax.pmean(w, "model")), P(None, "model"), P("data")),
    "scattered_rows": (lambda w, x: summed(layer(x[:, :4], scattered(w))), P(None, "model"), P("data")),
    "scattered_columns": (lambda w, x: summed(layer(x[:, :4], scattered(w, 1))), P("model"), P("data")),
    "scattered_replicas": (lambda w, x: summed(layer(x[:, :4], scattered(w))), P(), P("data")),
    "scattered_where_two_factors_have_the_axis": (
        lambda w, x: summed(
            layer(
                x[:, :4],
                scattered(w * (1.0 + lax.axis_index("model").astype("float32") * jnp.linspace(-0.4, 0.3, 16))[:, None]),
            )
        ),
        P(),
        P("data"),
    ),
    "passed_on": (
        lambda w, x: summed(layer(x, lax.ppermute(w, "model", [(0, 1), (1, 2), (2, 3)]))),
        P(None, "model"),
        P("data"),
    ),
    "rotated": (rotated, P(None, "model"), P("data", "model")),
}


def constrained(spec):
    return lambda p, x: layer(x, lax.with_sharding_constraint(p["w"], NamedSharding(MESH, spec)))


PROGRAMS = {
    "constrained": constrained(P("data", "model")),
    "unconstrained_rows": constrained(P(P.UNCONSTRAINED, "model")),
    "constrained_heads": lambda p, x: jnp.einsum(
        "nd,dhk->nhk",
        x,
        lax.with_sharding_constraint(p["w"].reshape(16, 4, 6), NamedSharding(MESH, P("data", "model"))),
    ),
    "constrained_by_jit": lambda p, x: jax.jit(
        lambda w, x: layer(x, w), in_shardings=(NamedSharding(MESH, P("data", "model")), None)
    )(p["w"], x),
}


def holds(model, rank, expected=None):
    """What merged weights give, if that is not known already, is what lifted ones give, which are not formed."""
    params = {"w": W}
    sites = lora.sites(model, params, X)
    frozen, lora_params = split_at_random(params, {"w": lora.LoRA(rank, alpha=4)}, sites=sites, scale=0.1)

    def lifted(lora_params, x):
        return lora.lift(model)(lora.attach(frozen, lora_params), x)

    def merged(lora_params, x):
        return model(lora.merge(frozen, lora_params), x)

    def step(fun):
        def total(*args):
            y = fun(*args)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(total, (0, 1), has_aux=True)

    traced = jax.jit(step(lifted)).trace(lora_params, X)
    expected = jax.jit(step(merged))(lora_params, X) if expected is None else expected
    assert error(traced.lower().compile()(lora_params, X), expected) < 1e-5
    assert formed(traced.jaxpr, lora_params) == []
    return expected


@pytest.mark.parametrize("name", BODIES)
def test_inside_shard_map(name):
    """With and without JAX's check of what varies over which axes, which gradients are made by."""
    (body, spec, out), expected = BODIES[name], None
    for check_vma in (True, False):
        part = jax.shard_map(body, mesh=MESH, in_specs=(spec, P("data")), out_specs=out, check_vma=check_vma)
        expected = holds(lambda p, x, part=part: part(p["w"], x), 2, expected)


@pytest.mark.parametrize("name", PROGRAMS)
def test_under_a_constraint(name):
    holds(PROGRAMS[name], rank=2)


def test_factors_get_the_part_of_the_spec_that_their_axes_have():
    frozen, lora_params = lora.split(jax.random.key(0), {"w": W}, {"w": lora.LoRA(2)})
    fun = lora.lift(constrained(P("data", "model")))
    jaxpr = jax.make_jaxpr(fun)(lora.attach(frozen, lora_params), X)
    found = {eqn.invars[0].aval.shape: eqn.params["sharding"].spec for eqn in jaxpr.eqns if "sharding" in eqn.params}
    assert found == {(16, 24): P("data", "model"), (16, 2): P("data", None), (2, 24): P(None, "model")}


def test_a_sharding_that_the_axes_cannot_have_is_an_error():
    """Of rows made of two axes, 3 × 8, four devices would each get a part of the slower one."""

    def model(p, x):
        w = lax.with_sharding_constraint(p["w"].reshape(24, 16), NamedSharding(MESH, P("model")))
        return jnp.ones((2, 24)) @ w

    params = {"w": jnp.ones((3, 8, 16))}
    frozen, lora_params = lora.split(
        jax.random.key(0), params, {"w": lora.LoRA(2).at(batch_axes=(), in_axes=(0, 1), out_axes=2)}
    )
    with pytest.raises(lora.MaterializeError, match="'sharding_constraint'"):
        lora.lift(model)(lora.attach(frozen, lora_params), X)
