"""Explicit mesh axes: what works on plain weights works lifted, and comes out with the same types."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from checks import all_adaptable, error, formed, normal, split_at_random
from jax import lax
from jax.sharding import AxisType, NamedSharding, auto_axes, reshard
from jax.sharding import PartitionSpec as P

import lora_jax as lora

MESH = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tp"), axis_types=(AxisType.Explicit,) * 3)
ROWS, COLUMNS = P(("data", "fsdp")), P(("data", "fsdp"), None, "tp")
X = normal(8, 3, 8, seed=1)  # of another size than any weight
TOKENS = jnp.arange(24).reshape(8, 3) % 12
SQUARE, WIDE = normal(8, 8, seed=2, scale=0.4), normal(8, 16, seed=3, scale=0.4)


def product(x, w, out=ROWS):
    return jnp.einsum("bld,df->blf", x, w, out_sharding=out)


def columns_then_rows(p, x):
    return product(jnp.tanh(product(x, p["up"], COLUMNS) + p["bias"]), (p["down"] * 0.5).T)


def heads(p, x):
    q = jnp.einsum("bld,dhk->blhk", x, lax.reshape(p["q"], (8, 4, 4), out_sharding=P("fsdp", "tp")))
    return jnp.einsum("blhk,hkd->bld", jnp.tanh(q), p["out"], out_sharding=ROWS)


def tied(p, tokens):
    x = p["table"].at[tokens].get(out_sharding=ROWS)
    return jnp.einsum("bld,vd->blv", jnp.tanh(x), p["table"], out_sharding=COLUMNS)


def rematerialized_layers(p, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(product(x, w)), None)), x, p["layers"])[0]


def one_layer_in_a_jit(p, x):
    by_columns = NamedSharding(MESH, P(None, "tp"))
    return product(x, jax.jit(lambda w: 2 * w, out_shardings=by_columns)(p["layers"][1]))


def chosen(p, x):
    return product(x, lax.cond(x.sum() > 0, lambda w: 2 * w, lambda w: w, p["w"]))


def under_automatic_axes(p, x):
    return auto_axes(lambda w, x: jnp.tanh(x @ w), out_sharding=COLUMNS)(p["w"], x)


def gathered_first(p, x):
    return product(x, reshard(p["w"], P(None, "tp")), COLUMNS)


def fused(p, x):
    w = jnp.concatenate([p["q"], p["k"]], 1)
    q, k = jnp.split(product(x, w / jnp.sqrt((w**2).sum(0))), 2, -1)
    return q * k


def experts(p, x):
    return jax.vmap(lambda w, x: jnp.einsum("ld,df->lf", x, w, out_sharding=P("fsdp")))(p["experts"], x)


def by_hand(p, x):
    def body(w, x):
        return lax.psum(x @ w, "tp")

    return jax.shard_map(body, in_specs=(P("tp"), P("data", None, "tp")), out_specs=P("data"))(p["w"], x)


# name: function, its weights with their specs, what it is called with
PROGRAMS = {
    "columns_then_rows": (
        columns_then_rows,
        {"up": (WIDE, P("fsdp", "tp")), "down": (WIDE, P("fsdp", "tp")), "bias": (normal(16), P("tp"))},
        (X, ROWS),
    ),
    "heads": (heads, {"q": (WIDE, P("fsdp", "tp")), "out": (normal(4, 4, 8), P("tp", None, "fsdp"))}, (X, ROWS)),
    "tied": (tied, {"table": (normal(12, 8), P("tp", "fsdp"))}, (TOKENS, ROWS)),
    "rematerialized_layers": (rematerialized_layers, {"layers": (normal(5, 8, 8), P(None, "fsdp", "tp"))}, (X, ROWS)),
    "one_layer_in_a_jit": (one_layer_in_a_jit, {"layers": (normal(5, 8, 8), P(None, "fsdp"))}, (X, ROWS)),
    "chosen": (chosen, {"w": (SQUARE, P("tp", "fsdp"))}, (X, ROWS)),
    "under_automatic_axes": (under_automatic_axes, {"w": (WIDE, P("fsdp", "tp"))}, (X, ROWS)),
    "gathered_first": (gathered_first, {"w": (WIDE, P("fsdp", "tp"))}, (X, ROWS)),
    "fused": (fused, {"q": (SQUARE, P("fsdp")), "k": (WIDE, P("fsdp"))}, (X, ROWS)),
    "experts": (experts, {"experts": (normal(2, 8, 16), P("tp", "fsdp"))}, (normal(2, 6, 8), P("tp", "data"))),
    "by_hand": (by_hand, {"w": (WIDE, P("tp"))}, (X, P("data", None, "tp"))),
}


def put(array, spec):
    return jax.device_put(array, NamedSharding(MESH, spec))


def adapted(name, variant):
    """The function, frozen weights, random factors where their leaves lie, and what else the function takes."""
    fun, weights, rest = PROGRAMS[name]
    params, x = {path: put(*placed) for path, placed in weights.items()}, put(*rest)
    sites = lora.sites(fun, params, x)
    frozen, lora_params = split_at_random(params, all_adaptable(variant), sites)
    return fun, frozen, jax.device_put(lora_params, lora.shardings(lora_params, frozen)), x


def types(tree):
    return [jax.typeof(x) for x in jax.tree.leaves(tree)]


def step(fun):
    def total(lora_params, x):
        y = fun(lora_params, x)
        return jnp.sum(jnp.sin(y)), y

    return jax.grad(total, has_aux=True)


@pytest.mark.parametrize("name", PROGRAMS)
def test_lifted_equals_merged(name):
    with jax.set_mesh(MESH):
        fun, frozen, lora_params, x = adapted(name, lora.LoRA(2))
        lifted = jax.jit(step(lambda lp, x: lora.lift(fun)(lora.attach(frozen, lp), x))).trace(lora_params, x)
        found = lifted.lower().compile()(lora_params, x)
        expected = jax.jit(step(lambda lp, x: fun(lora.merge(frozen, lp), x)))(lora_params, x)
        assert formed(lifted.jaxpr, lora_params) == []
    assert error(found, expected) < 1e-5
    assert types(found) == types(expected)


@pytest.mark.parametrize("variant", [lora.DoRA(2, init="pissa"), lora.LoKr(2)], ids=["DoRA", "LoKr"])
def test_weights_stay_where_they_are(variant):
    """Outside jit and without a mesh in context, where arrays alone say how they lie."""
    fun, weights, rest = PROGRAMS["gathered_first"]
    params, x = {"w": put(*weights["w"])}, put(*rest)
    split = functools.partial(lora.split, jax.random.key(0), rules={"w": variant})
    frozen, lora_params = split(params)
    merged, attached = lora.merge(frozen, lora_params), lora.attach(frozen, lora_params)
    assert types(merged) == types(frozen) == types(params)
    placed = jax.tree.leaves(lora.shardings(lora_params, frozen))
    assert all(
        a.sharding.is_equivalent_to(s, a.ndim) for a, s in zip(jax.tree.leaves(lora_params), placed, strict=True)
    )
    with jax.set_mesh(MESH):
        assert error(lora.lift(fun)(attached, x), fun(merged, x)) < 1e-5
        assert types(jax.eval_shape(split, params)) == types((frozen, lora_params))


def test_what_is_returned_factored_has_its_type():
    with jax.set_mesh(MESH):
        _, frozen, lora_params, x = adapted("gathered_first", lora.LoRA(2))
        turned = lora.lift(lambda p: 2 * p["w"].T)(lora.attach(frozen, lora_params))
        found = lora.lift(lambda w, x: product(x, w.T, COLUMNS))(turned, x)
        assert error(found, product(x, 2 * lora.merge(frozen, lora_params)["w"], COLUMNS)) < 1e-5


ALGEBRA = {
    "resize": lambda _, lp: lora.resize(lp, 1),
    "grow": lambda _, lp: lora.resize(lp, 3, key=jax.random.key(0)),
    "ties": lambda _, lp: lora.combine([lp, lp], [0.7, 0.3], method="ties", density=0.5),
    "extract": lambda frozen, lp: lora.extract(frozen, lora.merge(frozen, lp), {"w": lora.LoRA(2)}),
    "relative_to": lambda frozen, lp: lora.relative_to(jax.tree.map(jnp.negative, frozen), frozen, lp),
}


@pytest.mark.parametrize("name", ALGEBRA)
def test_algebra_is_that_of_one_device(name):
    with jax.set_mesh(MESH):
        frozen = {"w": put(jnp.outer(WIDE[:, 0], WIDE[0]), P(("fsdp", "tp")))}  # of a rank that an adapter can hold
        _, lora_params = split_at_random(frozen, {"w": lora.LoRA(2)}, None)
        found = lora.merge(frozen, ALGEBRA[name](frozen, lora_params))
    one = jax.device_get((frozen, lora_params))
    run = jax.jit if name != "relative_to" else lambda fun: fun  # it looks at the values
    assert error(found, run(lambda frozen, lp: lora.merge(frozen, ALGEBRA[name](frozen, lp)))(*one)) < 1e-5
