"""Weights put together before they are used: lifted equals merged, nothing is formed, and no FLOP more is spent."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from checks import all_adaptable, error, flops, formed, normal, split_at_random
from in_numpy import in_numpy
from jax import lax

import lora_jax as lora


def layer(x, w):
    return jnp.tanh(x @ w)


def with_weight_norm(p, x):
    return layer(x, p["v"] / jnp.linalg.norm(p["v"], axis=0) * jnp.arange(1.0, 8.0))


def with_standardized_weights(p, x):
    v = p["v"]
    return layer(x, (v - v.mean(0)) / jnp.sqrt(v.var(0) + 1e-5))


def carried(p, x):
    return lax.fori_loop(0, 3, lambda _, c: (c[0], layer(c[1], c[0])), (p["v"], x))[1]


def carried_in_scan(p, x):
    def body(c, _):
        return (layer(*c), c[1]), c[0].sum()

    return lax.scan(jax.jit(body), (x, p["v"]), length=3)[0][0]


def carried_by_while(p, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, layer(c[1], c[2]), c[2]), (0, x, p["v"]))[1]


X = normal(2, 4, 11, seed=9)
SQUARE = {"v": normal(11, 11)}
ONE = {"v": normal(11, 7)}
TWO = {"v": normal(11, 7), "w": normal(11, 7, seed=1)}
STACKS = {"v": normal(3, 11, 7), "w": normal(3, 11, 7, seed=1)}
U = normal(11, 7, seed=2)
MASK = jnp.array([True, False, True])

# name: function of (params, x), params
PROGRAMS = {
    "fused": (
        lambda p, x: layer(x, jnp.concatenate([p["q"], p["k"], p["v"]], 1)),
        {"q": normal(11, 5), "k": normal(11, 5, seed=1), "v": normal(11, 5, seed=2)},
    ),
    "fused_unequal": (
        lambda p, x: layer(x, jnp.concatenate([p["q"], p["k"], p["v"]], 1)),
        {"q": normal(11, 12), "k": normal(11, 4, seed=1), "v": normal(11, 4, seed=2)},
    ),
    "fused_prime": (
        lambda p, x: layer(x, jnp.concatenate([p["q"], p["k"]], 1)),
        {"q": normal(11, 5), "k": normal(11, 7, seed=1)},
    ),
    "fused_inputs": (
        lambda p, x: layer(x, jnp.concatenate([p["a"], p["b"]], 0)),
        {"a": normal(6, 13), "b": normal(5, 13, seed=1)},
    ),
    "fused_with_a_frozen_one": (lambda p, x: layer(x, jnp.concatenate([p["v"], U], 1)), {"v": normal(11, 14)}),
    "fused_and_split": (
        lambda p, x: (
            sum(layer(x, w) for w in jnp.split(jnp.concatenate([p["q"], p["k"]], 1), [6, 9], 1)[:2:2])
            + layer(x, jnp.concatenate([p["q"], p["k"]], 1)[:, 7:9]).sum()
        ),
        {"q": normal(11, 6), "k": normal(11, 6, seed=1)},
    ),
    "with_its_transpose": (
        lambda p, x: layer(x, jnp.concatenate([p["v"], p["v"].T], 1)),
        SQUARE,
    ),
    "stacked_and_scanned": (
        lambda p, x: lax.scan(lambda x, w: (layer(x, w), None), x, jnp.stack([p["a"], p["b"], p["c"]]))[0],
        {"a": normal(11, 11), "b": normal(11, 11, seed=1), "c": normal(11, 11, seed=2)},
    ),
    "stacks_joined_and_scanned": (
        lambda p, x: lax.scan(lambda x, w: (layer(x, w), None), x, jnp.concatenate([p["a"], p["b"]]))[0],
        {"a": normal(2, 11, 11), "b": normal(2, 11, 11, seed=1)},
    ),
    "heads_fused_with_a_matrix": (
        lambda p, x: layer(x, jnp.concatenate([p["a"].reshape(11, 15), p["b"]], 1)),
        {"a": normal(11, 3, 5), "b": normal(11, 5, seed=1)},
    ),
    "fused_with_nothing": (
        lambda p, x: layer(x, jnp.concatenate([p["a"][:, :0], p["a"], jnp.zeros((11, 0)), p["b"]], 1)),
        {"a": normal(11, 7), "b": normal(11, 5, seed=1)},
    ),
    "a_part_across_heads": (
        lambda p, x: layer(x, p["v"].reshape(11, 12)[:, 3:10]) + x[..., :7] * p["v"].reshape(11, 12)[2, 5:6],
        {"v": normal(11, 3, 4)},
    ),
    "padded_heads": (lambda p, x: layer(x, jnp.pad(p["v"].reshape(11, 6), ((0, 0), (1, 2)))), {"v": normal(11, 2, 3)}),
    "from_where_x_says_across_heads": (
        lambda p, x: layer(x, lax.dynamic_slice_in_dim(p["v"].reshape(11, 12), x.argmax() % 5, 7, 1)),
        {"v": normal(11, 3, 4)},
    ),
    "columns_picked_across_heads": (
        lambda p, x: layer(x, p["v"].reshape(11, 12)[:, jnp.array([7, 1, 11, 4])]),
        {"v": normal(11, 3, 4)},
    ),
    "stacked_last": (lambda p, x: jnp.einsum("bti,iko->btko", x, jnp.stack([p["v"], p["w"]], 1)), TWO),
    "stacked_and_unstacked": (lambda p, x: sum(layer(x, w) for w in jnp.unstack(p["v"])), {"v": normal(3, 11, 7)}),
    "tiled": (lambda p, x: layer(x, jnp.tile(p["v"], (1, 3))), ONE),
    "padded": (lambda p, x: layer(x, jnp.pad(p["v"], ((0, 0), (1, 2)), constant_values=2.0)), ONE),
    "padded_inputs": (lambda p, x: layer(x, jnp.pad(p["v"], ((1, 3), (0, 0)))), {"v": normal(7, 13)}),
    "plus_an_array": (lambda p, x: layer(x, p["v"] + U), ONE),
    "taken_from_an_array": (lambda p, x: layer(x, U - p["v"]), ONE),
    "plus_a_number": (lambda p, x: layer(x, 0.5 + p["v"]), ONE),
    "plus_columns": (lambda p, x: layer(x, p["v"] - jnp.arange(11.0)[:, None]), ONE),
    "plus_another": (lambda p, x: layer(x, p["v"] - 2 * p["w"]), TWO),
    "plus_a_view_of_another": (
        lambda p, x: layer(x, p["v"] + p["w"].reshape(11, 6)),
        {"v": normal(11, 6), "w": normal(11, 2, 3, seed=1)},
    ),
    "plus_another_cut_otherwise": (
        lambda p, x: layer(x, p["v"].reshape(11, 6) + p["w"].reshape(11, 6)),
        {"v": normal(11, 2, 3), "w": normal(11, 3, 2, seed=1)},
    ),
    "plus_the_same_for_all_layers": (
        lambda p, x: jnp.einsum("bti,lio->lbto", x, p["v"] - p["w"]),
        {"v": normal(3, 11, 7), "w": normal(11, 7, seed=1)},
    ),
    "scaled_many_times": (
        lambda p, x: layer(
            x,
            functools.reduce(
                lambda v, i: v * jnp.cos(x[0, 0, :7]) * jnp.cos(x[0, 0])[:, None] * -1.1, range(9), p["v"]
            ),
        ),
        ONE,
    ),
    "times_a_broadcast_vector": (lambda p, x: layer(x, p["v"] * jnp.broadcast_to(jnp.arange(7.0), (11, 7))), ONE),
    "centered": (lambda p, x: layer(x, p["v"] - p["v"].mean(0)), ONE),
    "weight_norm": (with_weight_norm, ONE),
    "standardized": (with_standardized_weights, ONE),
    "penalized": (lambda p, x: layer(x, p["v"]) + x @ p["w"] + jnp.sum(p["v"] ** 2) + jnp.sum(p["v"] * p["w"]), TWO),
    "of_two_factors": (lambda p, x: layer(x, p["v"] @ p["w"]), {"v": normal(11, 5), "w": normal(5, 9, seed=1)}),
    "of_two_stacks": (
        lambda p, x: jnp.einsum("bti,eio->ebto", x, jnp.einsum("eij,ejo->eio", p["v"], p["w"])),
        {"v": normal(3, 11, 5), "w": normal(3, 5, 9, seed=1)},
    ),
    "summed_over_nothing": (
        lambda p, x: layer(x, p["v"]) + jnp.sum(p["v"] * p["w"], keepdims=True)[None].sum((0, 1)) + x @ p["w"],
        TWO,
    ),
    "one_product_or_the_other": (
        lambda p, x: layer(x, lax.cond(x.sum() > 0, lambda: p["v"] @ p["w"], lambda: 2.0 * p["v"] @ p["w"])),
        {"v": normal(11, 5), "w": normal(5, 9, seed=1)},
    ),
    "one_or_the_other": (lambda p, x: layer(x, jnp.where(x.sum() > 0, p["v"], p["w"])), TWO),
    "one_or_its_double": (lambda p, x: layer(x, jnp.where(x.sum() > 0, p["v"], 2 * p["v"])), ONE),
    "one_or_nothing": (lambda p, x: layer(x, jnp.where(x.sum() > 0, 0, p["v"])), ONE),
    "one_or_the_other_by_cond": (lambda p, x: layer(x, lax.cond(x.sum() > 0, lambda: p["v"], lambda: p["w"])), TWO),
    "one_or_a_view_of_the_other_by_switch": (
        lambda p, x: layer(x, lax.switch(2, [lambda: p["v"], lambda: 2 * p["w"].T, lambda: p["v"][::-1]])),
        {"v": normal(11, 7), "w": normal(7, 11, seed=1)},
    ),
    "layers_chosen": (
        lambda p, x: jax.vmap(lambda v, w, c: layer(x, jnp.where(c, v, w)))(p["v"], p["w"], MASK),
        STACKS,
    ),
    "layers_chosen_by_cond": (
        lambda p, x: jax.vmap(lambda w, c: lax.cond(c, lambda w: layer(x, w), lambda w: x @ (2 * w), w))(p["v"], MASK),
        {"v": STACKS["v"]},
    ),
    "one_and_how_it_is_used": (
        lambda p, x: (lambda wy: layer(x, wy[0]) + wy[1])(
            lax.cond(x.sum() > 0, lambda: (p["v"], x @ p["w"]), lambda: (p["w"], x @ p["v"]))
        ),
        TWO,
    ),
    "carried": (carried, SQUARE),
    "carried_in_scan": (carried_in_scan, SQUARE),
    "carried_by_while": (carried_by_while, SQUARE),
}


def adapted(model, params, variant):
    sites = lora.sites(model, params, X)
    frozen, lora_params = split_at_random(params, all_adaptable(variant), sites=sites, scale=0.1)
    assert lora_params.keys() == params.keys(), sites
    return frozen, lora_params


@pytest.mark.parametrize("name", PROGRAMS)
def test_lifted_equals_merged(name):
    model, params = PROGRAMS[name]
    frozen, lora_params = adapted(model, params, lora.LoRA(2, alpha=4))

    def step(fun):
        def total(*args):
            y = fun(*args)
            return jnp.sum(jnp.sin(y)), y

        return fun if name == "carried_by_while" else jax.grad(total, (0, 1), has_aux=True)

    def lifted(lora_params, x):
        return lora.lift(model)(lora.attach(frozen, lora_params), x)

    def merged(lora_params, x):
        return model(lora.merge(frozen, lora_params), x)

    traced = jax.jit(step(lifted)).trace(lora_params, X)
    found, expected = traced.lower().compile()(lora_params, X), in_numpy(step(merged))(lora_params, X)
    assert error(found, expected) < 3e-5
    assert formed(traced.jaxpr, lora_params) == []


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 2, 3)])
def test_parts_of_several_ranks_and_scales(ranks):
    model, params = PROGRAMS["fused_unequal"]
    rules = {path: lora.LoRA(rank, alpha=5) for path, rank in zip(params, ranks, strict=True)}
    frozen, lora_params = split_at_random(params, rules)
    found = lora.lift(model)(lora.attach(frozen, lora_params), X)
    assert error(found, model(lora.merge(frozen, lora_params), X)) < 1e-5


@pytest.mark.parametrize("widths", [(256, 256, 256), (256, 64, 64)])
def test_a_fused_weight_costs_what_its_parts_cost(widths):
    """4ndk + 6nr(d + k) for each part: the factors of one are not multiplied for the columns of another."""
    n, d, rank = 512, 256, 8
    params = {name: normal(d, width) for name, width in zip("qkv", widths, strict=True)}
    x = normal(n, d)
    frozen, lora_params = lora.split(jax.random.key(0), params, {".": lora.LoRA(rank)})

    def loss(params, x):
        return jnp.sum(jnp.sin(x @ jnp.concatenate([params["q"], params["k"], params["v"]], 1)))

    def step(lora_params, x, frozen):
        return lora.lift(loss)(lora.attach(frozen, lora_params), x)

    found = flops(jax.grad(step, (0, 1)), lora_params, x, frozen)
    assert found == pytest.approx(sum(4 * n * d * k + 6 * n * rank * (d + k) for k in widths), rel=0.01)


@pytest.mark.parametrize(
    ("model", "primitive"),
    [
        (lambda p, x: x @ (p["v"] * p["w"]), "dot_general"),  # W∘AB has no cheap product with x
        (lambda p, x: x @ jnp.where(U > 0, p["v"], p["w"]), "select_n"),  # a mask of single weights
        (lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p["v"], lambda: jnp.exp(p["w"])), "exp"),
        # The derivative of a scale is the sum of W∘G, for a G as large as W.
        (lambda p, x: jax.grad(lambda s: jnp.sin(x @ (s * (p["v"] + p["w"]))).sum())(2.0), "mul"),
    ],
)
def test_what_cannot_be_kept_apart_is_an_error(model, primitive):
    assert not any(site.adaptable for site in lora.sites(model, TWO, X).values())
    frozen, lora_params = lora.split(jax.random.key(0), TWO, {".": lora.LoRA(2)})
    with pytest.raises(lora.MaterializeError, match=rf"'[vw]'.*reaches '{primitive}' at test_joining.py:\d+"):
        lora.lift(model)(lora.attach(frozen, lora_params), X)


def test_a_norm_over_layers_leaves_a_matrix_that_has_to_be_formed():
    """Of each entry of a layer, over all layers: as large as a layer, and no sum of few products."""

    def model(p, x):
        return jnp.einsum("lti,lio->lto", x, p["v"] / jnp.sqrt(jnp.square(p["v"]).sum(0)))

    params = {"v": STACKS["v"][:2]}
    assert lora.sites(model, params, X)["v"].kind == "other"
    rules = {"v": lora.LoRA(2).at(batch_axes=0, in_axes=1, out_axes=2)}
    frozen, lora_params = lora.split(jax.random.key(0), params, rules)
    with pytest.raises(lora.MaterializeError, match=r"'v' \(2, 11, 7\) reaches 'reduce_sum'"):
        lora.lift(model)(lora.attach(frozen, lora_params), X)


def test_a_leaf_that_is_formed_where_it_meets_another_is_not_adaptable():
    """Alone each could be kept apart; the odd part of both together cannot, and `sites` says so beforehand."""

    def model(p, x):
        return layer(x, jnp.concatenate([p["v"], p["w"]], 1)[:, 2:9]) + x @ p["u"]

    sites = lora.sites(model, {**TWO, "u": U}, X)
    assert {path: site.kind for path, site in sites.items()} == {"u": "linear", "v": "other", "w": "other"}
    assert [use.primitive for use in sites["v"].uses if use.kind == "other"] == ["slice"]


def test_calls_of_one_function_with_weights_joined_in_different_ways():
    """The second call's weights have the form of the first's, but their dimensions come from elsewhere."""
    product = jax.jit(lambda x, w: x @ w)

    def model(p, x):
        return product(x, p["a"] + p["b"]) + product(x, p["c"] + p["d"].T)

    params = {name: normal(11, 7) for name in "abc"} | {"d": normal(7, 11)}
    sites = lora.sites(model, params, X)
    assert {path: (site.in_axes, site.out_axes) for path, site in sites.items()} == {
        **{name: ((0,), (1,)) for name in "abc"},
        "d": ((1,), (0,)),
    }


def test_an_array_is_not_taken_for_another_that_is_gone():
    """Arrays that were broadcast are known by identity, and another may get the identity of one that is gone."""

    def model(p, x, flag):
        y = 0.0
        for _ in range(20):
            y += lax.cond(flag, lambda w: x @ w, lambda w: jnp.zeros((4, 7)), p["v"])
            y += x @ (p["v"] + jnp.tanh(x.T @ y))
        return y

    frozen, lora_params = split_at_random(ONE, {"v": lora.LoRA(2)}, scale=0.1)

    @jax.jit
    def lifted(lora_params, x, flag):
        return lora.lift(model)(lora.attach(frozen, lora_params), x, flag)

    x = 0.1 * X[0]
    assert error(lifted(lora_params, x, True), model(lora.merge(frozen, lora_params), x, True)) < 1e-5


def test_tokens_and_positions_are_activations():
    """What meets a weight after an array was added to it is no weight, though it may be as large as one."""

    def model(p, x):
        return jnp.tanh((x[0] + p["positions"]) @ p["w"])

    params = {"positions": normal(4, 11), "w": normal(11, 7)}
    sites = lora.sites(model, params, X)
    assert {path: site.kind for path, site in sites.items()} == {"positions": "other", "w": "linear"}
