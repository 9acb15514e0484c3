"""`explain` and printed `sites`: what is said of a function is what is done with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from checks import all_adaptable, flops, normal
from jax import lax
from zoo import ZOO

import lora_jax as lora

N, D, RANK = 64, 256, 4


def mlp(params, x):
    for kernel in params["layers"]:
        x = jnp.tanh(x @ kernel)
    return x @ params["head"].T


PARAMS = {"layers": jnp.ones((3, D, D)), "head": jnp.ones((10, D))}
X = jax.ShapeDtypeStruct((N, D), jnp.float32)


def explained(model, params, *args, rank=RANK, **options):
    sites = lora.sites(model, params, *args)
    frozen, lora_params = lora.split(jax.random.key(0), params, all_adaptable(lora.LoRA(rank)), sites=sites)
    return lora.explain(model, **options)(lora.attach(frozen, lora_params), *args), frozen, lora_params


def test_each_use_is_a_row():
    found, *_ = explained(mlp, PARAMS, X)
    rows = [(row.path, row.factored, row.use.kind, row.use.primitive, row.use.cost) for row in found.rows]
    small = 2 * N * RANK
    layer = lora.Cost(2 * N * D * D, 2 * small * D, "(x·A)·B")
    assert rows == [
        ("head", True, "linear", "dot_general", lora.Cost(2 * N * D * 10, small * (D + 10), "(x·A)·B")),
        *[("layers", True, "linear", "dot_general", layer)] * 3,
    ]
    assert [row.use.where for row in found.rows] == ["test_explain.py:20 (mlp)"] + ["test_explain.py:19 (mlp)"] * 3
    assert found.materialized == ()


def test_flops_are_those_that_xla_counts():
    """The model without tanh, so that products are all there is."""

    def model(params, x):
        for kernel in params["layers"]:
            x = x @ kernel
        return x

    params = {"layers": PARAMS["layers"]}
    found, frozen, lora_params = explained(model, params, X)
    counted = flops(lambda f, lp, x: lora.lift(model)(lora.attach(f, lp), x), frozen, lora_params, X)
    assert counted == pytest.approx(found.base_flops + found.low_rank_flops, rel=0.01)


def test_a_loop_counts_its_rounds():
    def model(params, x):
        return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["layers"])[0]

    found, *_ = explained(model, {"layers": PARAMS["layers"]}, X)
    (row,) = found.rows
    assert (row.use.times, row.use.cost.base) == (3, 3 * 2 * N * D * D)


def test_a_call_counts_at_each_place_that_it_is_made():
    """The body of a jitted layer is traced once, and noted for each leaf and line that it is called with."""
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))

    def model(params, x):
        x = layer(x, params["layers"][0])
        return layer(x, params["other"])

    found, *_ = explained(model, {"layers": PARAMS["layers"], "other": jnp.ones((D, D))}, X)
    assert [(row.path, row.use.cost.base) for row in found.rows] == [
        ("layers", 2 * N * D * D),
        ("other", 2 * N * D * D),
    ]


def test_what_is_joined_is_counted_once():
    params = {"q": jnp.ones((D, 64)), "k": jnp.ones((D, 64))}
    found, *_ = explained(lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1), params, X)
    assert found.base_flops == 2 * N * D * 128
    assert [row.use.paths for row in found.rows] == [("q", "k")] * 2
    assert "linear (with 1 more)" in str(found)


def test_a_product_of_two_weights_costs_that_of_the_bases_once():
    params = {"v": jnp.ones((D, 3)), "w": jnp.ones((3, D))}
    found, *_ = explained(lambda p, x: x @ (p["v"] @ p["w"]), params, X, rank=2)
    assert [(row.path, row.use.cost.base, row.use.cost.order) for row in found.rows if len(row.use.paths) == 1] == [
        ("v", 2 * D * 3 * D, "W·V"),
        ("w", 0, ""),
    ]


def test_what_is_formed_says_so():
    def model(params, x):
        return x @ jnp.sort(params["w"])

    rules = {"w": lora.LoRA(2).at(in_axes=0, out_axes=1)}
    frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((D, D))}, rules)
    found = lora.explain(model)(lora.attach(frozen, lora_params), X)
    (row,) = found.materialized
    assert (row.use.primitive, row.use.cost.low_rank) == ("sort", 2 * D * D * 2)
    assert "FORMED for sort" in str(found)
    with pytest.raises(lora.MaterializeError):
        lora.lift(model)(lora.attach(frozen, lora_params), jnp.ones((N, D)))


def test_a_leaf_that_is_not_read_says_so():
    frozen, lora_params = lora.split(
        jax.random.key(0), {"a": jnp.ones((D, D)), "b": jnp.ones((D, D))}, {".": lora.LoRA(2)}
    )
    found = lora.explain(lambda p, x: x @ p["a"])(lora.attach(frozen, lora_params), X)
    assert [(row.path, row.use is None) for row in found.rows] == [("a", False), ("b", True)]
    assert "not used" in str(found)


def test_nothing_attached_is_an_error():
    with pytest.raises(ValueError, match="no argument has an adapted leaf"):
        lora.explain(mlp)(PARAMS, X)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("model", ZOO)
def test_real_models_are_explained(model):
    loss, params, batch = ZOO[model]()
    found, _, lora_params = explained(loss, params, *batch, rank=1)
    assert {row.path for row in found.rows} == lora_params.keys()
    assert found.materialized == ()
    assert 0 < found.low_rank_flops < found.base_flops
    lines = str(found).splitlines()
    assert len(lines) == len(found.rows) + 4
    assert str(lora.sites(loss, params, *batch)).count("\n") == len(lora.sites(loss, params, *batch)) + 1


# The order of contraction, which is chosen by cost, or by the user.


@pytest.mark.parametrize("tokens", [1, 16, 100_000])
def test_neither_skinny_nor_wide_batches_form_a_weight(tokens):
    x = jax.ShapeDtypeStruct((tokens, D), jnp.float32)
    found, *_ = explained(lambda p, x: x @ p["w"], {"w": jnp.ones((D, D))}, x)
    assert [row.use.cost.order for row in found.rows] == ["(x·A)·B"]


@pytest.mark.parametrize(("n", "d", "k"), [(4, 512, 2), (512, 4, 600)])
def test_transposed_uses_start_from_the_other_factor(n, d, k):
    x = jax.ShapeDtypeStruct((n, k), jnp.float32)
    params = {"w": jnp.ones((d, k))}
    frozen, lora_params = lora.split(jax.random.key(0), params, {"w": lora.LoRA(2)})
    found = lora.explain(lambda p, x: x @ p["w"].T)(lora.attach(frozen, lora_params), x)
    assert [row.use.cost.order for row in found.rows] == ["(x·B)·A"]


def test_an_order_that_leaves_operands_is_an_error():
    frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((D, D))}, {"w": lora.LoRA(2)})
    with pytest.raises(ValueError, match="leaves 2 of 2 operands unmultiplied"):
        lora.lift(lambda p, x: x @ p["w"], strategy=lambda *_: ())(lora.attach(frozen, lora_params), jnp.ones(X.shape))


def test_a_user_can_choose_the_order():
    """The hybrid that forms AB first: more memory, and fewer FLOPs where tokens are many."""

    def formed_first(operands, out, whole, frozen):
        return ((1, 2), (0, 1)) if len(operands) == 3 else ((0, 1),)

    params = {"w": normal(D, D)}
    found, frozen, lora_params = explained(lambda p, x: x @ p["w"], params, X, strategy=formed_first)
    assert [row.use.cost.order for row in found.rows] == ["x·(A·B)"]
    lifted = lora.lift(lambda p, x: x @ p["w"], strategy=formed_first)
    counted = flops(lambda f, lp, x: lifted(lora.attach(f, lp), x), frozen, lora_params, X)
    assert counted == pytest.approx(found.base_flops + found.low_rank_flops, rel=0.01)
