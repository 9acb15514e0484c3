"""Indexing with arrays: layers and experts stay weights, tokens become activations, whatever the index looks like."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from checks import all_adaptable, error, formed, normal, split_at_random
from in_numpy import in_numpy
from jax import lax

import lora_jax as lora

TABLE = normal(13, 7)
STACK = normal(3, 11, 7, seed=1)
X = normal(4, 11, seed=2)
IDS = jnp.array([[1, 5, 5], [0, 12, 3]])

# name: function of the weight, the weight, kind and axes that are found
PROGRAMS = {
    "tokens": (lambda w: w[IDS], TABLE, ("embedding", (), (0,), (1,))),
    "tokens_of_heads": (lambda w: w[IDS] + 1.0, normal(13, 2, 3), ("embedding", (), (0,), (1, 2))),
    "tokens_reshaped": (lambda w: jnp.sin(w[IDS].reshape(2, -1)), normal(13, 2, 3), ("embedding", (), (0,), (1, 2))),
    "tables": (lambda w: jax.vmap(lambda t, i: t[i])(w, IDS), normal(2, 13, 7), ("embedding", (0,), (1,), (2,))),
    "tables_filled": (
        lambda w: jax.vmap(lambda t, i: jnp.take(t, i, 0, mode="fill", fill_value=3.0))(w, IDS + 1),
        normal(2, 13, 7),
        ("embedding", (0,), (1,), (2,)),
    ),
    "one_of_each_table": (
        lambda w: w[jnp.arange(2)[:, None], IDS],
        normal(2, 13, 7),
        ("embedding", (), (0, 1), (2,)),
    ),
    "scaled_table_filled": (lambda w: jnp.take(w * 2.0, IDS, 0), TABLE, ("embedding", (), (0,), (1,))),
    "broadcast_table_filled": (
        lambda w: jnp.broadcast_to(w, (3, 13, 7)).at[IDS, IDS].get(mode="fill", fill_value=0.5),
        TABLE,
        ("embedding", (), (0,), (1,)),
    ),
    "one_table_or_another_of_each_example": (
        lambda w: jax.vmap(lambda i: jnp.where(i[0] > 0, w, w[::-1])[i])(IDS),
        TABLE,
        ("embedding", (), (0,), (1,)),
    ),
    "shifted_table_in_a_loop": (
        lambda w: lax.fori_loop(0, 2, lambda _, y: y + jnp.sin((1.0 - w)[IDS]), jnp.zeros((2, 3, 7))),
        TABLE,
        ("embedding", (), (0,), (1,)),
    ),
    "shifted_table": (lambda w: (w - w.mean(0))[IDS], TABLE, ("embedding", (), (0,), (1,))),
    "columns": (lambda w: w[:, IDS % 7], TABLE, ("embedding", (), (1,), (0,))),
    "experts": (lambda w: jnp.einsum("nd,ndf->nf", X, w[jnp.array([2, 0, 0, 1])]), STACK, ("linear", (0,), (1,), (2,))),
    "experts_taken": (
        lambda w: jnp.einsum("nd,ndf->nf", X, jnp.take(w, jnp.array([2, 0, 0, 1]), 0)),
        STACK,
        ("linear", (0,), (1,), (2,)),
    ),
    "experts_of_each_token": (
        lambda w: jax.vmap(lambda x, e: x @ w[e])(X, jnp.array([2, 0, 0, 1])),
        STACK,
        ("linear", (0,), (1,), (2,)),
    ),
    "two_experts_of_each_token": (
        lambda w: jnp.einsum("nd,nkdf->nkf", X, w[jnp.array([[2, 0], [0, 1], [1, 2], [2, 1]])]),
        STACK,
        ("linear", (0,), (1,), (2,)),
    ),
    "experts_by_two_indices": (
        lambda w: jnp.einsum("nd,ndf->nf", X, w[jnp.array([1, 0, 0, 1]), jnp.array([2, 0, 1, 2])]),
        normal(2, 3, 11, 7),
        ("linear", (0, 1), (2,), (3,)),
    ),
    "windows": (
        lambda w: jax.vmap(lambda x, s: x[:5] @ lax.dynamic_slice_in_dim(w, s, 5, 0))(X, jnp.array([2, 0, 9, 1])),
        normal(11, 7),
        ("linear", (), (0,), (1,)),
    ),
    "one_hot": (lambda w: jax.nn.one_hot(IDS, 13) @ w, TABLE, ("linear", (), (0,), (1,))),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_lifted_equals_merged(name):
    fun, weight, expected = PROGRAMS[name]
    params = {"w": weight}

    def model(params):
        return fun(params["w"])

    sites = lora.sites(model, params)
    site = sites["w"]
    assert (site.kind, site.batch_axes, site.in_axes, site.out_axes) == expected, site.uses
    frozen, lora_params = split_at_random(params, all_adaptable(lora.LoRA(2, alpha=4)), sites=sites)

    def step(fun):
        return jax.grad(lambda lp: (jnp.sum(jnp.sin(y := fun(lp))), y), has_aux=True)

    def lifted(lora_params):
        return lora.lift(model)(lora.attach(frozen, lora_params))

    def merged(lora_params):
        return model(lora.merge(frozen, lora_params))

    traced = jax.jit(step(lifted)).trace(lora_params)
    assert error(traced.lower().compile()(lora_params), in_numpy(step(merged))(lora_params)) < 1e-5
    assert formed(traced.jaxpr, lora_params) == []


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_what_is_out_of_bounds_is_as_without_adapters(mode):
    ids = jnp.array([3, 40, -50, 12])
    frozen, lora_params = split_at_random({"w": TABLE}, {"w": lora.LoRA(2)}, scale=0.1)
    found = lora.lift(lambda p: jnp.take(p["w"], ids, 0, mode=mode))(lora.attach(frozen, lora_params))
    right = jnp.take(lora.merge(frozen, lora_params)["w"], ids, 0, mode=mode)
    assert bool((jnp.isnan(found) == jnp.isnan(right)).all())
    assert error(jnp.nan_to_num(found), jnp.nan_to_num(right)) < 1e-5
