"""Each rule on small programs: lifted equals merged, values and gradients, and no weight is formed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from checks import all_adaptable, error, formed, normal, randomized, split_at_random
from in_numpy import in_numpy
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

import lora_jax as lora


def layer(x, w):
    return jnp.tanh(x @ w)


def counted_while(w, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, layer(c[1], w[c[0]])), (0, x))[1]


def scan_reverse(w, x):
    return lax.scan(lambda x, w: (layer(x, w), x.sum()), x, w, reverse=True, unroll=2)


def scan_twice(w, x):
    """One stack, two loops, the inner one over a constant of the outer."""

    def outer(x, i):
        return lax.scan(lambda x, w: (layer(x, w) + i, None), x, w)[0], None

    return lax.scan(outer, x, jnp.arange(2.0))[0]


def returned_by_scan(w, x):
    """As `nnx.scan` over rematerialized layers does: the body hands its weights on."""
    x, same = lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), w)), x, w)
    return layer(x, same[1])


@jax.custom_jvp
def scaled_product(w, x):
    return x @ w


@scaled_product.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return x @ w, 3.0 * (x @ dw) + dx @ w  # not the true derivative, so that a test can tell


W = normal(11, 7, seed=1)  # 11 in, 7 out
STACK = normal(3, 7, 7, seed=2)
HEADS = normal(11, 3, 5, seed=3)
TABLE = normal(13, 7, seed=4)
X = normal(2, 4, 11, seed=5)
SQUARE = normal(4, 7, seed=6)

# name: function of (weight, x), weight, x
PROGRAMS = {
    # dot_general: the weight on either side, batch, contracting and free axes in every arrangement
    "right": (lambda w, x: x @ w, W, X),
    "left": (lambda w, x: w @ x, W, normal(7, 4)),
    "left_of_batch": (lambda w, x: jnp.einsum("io,bot->bit", w, x), W, normal(2, 7, 4)),
    "vector": (lambda w, x: x @ w, W, normal(11)),
    "transposed": (lambda w, x: x @ w.T, W, normal(4, 7)),
    "heads_out": (lambda w, x: jnp.einsum("btd,dhk->bhtk", x, w), HEADS, X),
    "heads_in": (lambda w, x: jnp.einsum("bthk,dhk->btd", x, w), HEADS, normal(2, 4, 3, 5)),
    "heads_in_swapped": (lambda w, x: jnp.einsum("btkh,hkd->bdt", x, w), normal(3, 5, 11), normal(2, 4, 5, 3)),
    "middle_axis": (lambda w, x: jnp.einsum("btd,hdk->bthk", x, w), normal(3, 11, 5), X),
    "tensordot": (lambda w, x: jnp.tensordot(x, w, ((1, 2), (1, 0))), HEADS, normal(4, 3, 11)),
    "experts": (lambda w, x: jnp.einsum("end,edf->enf", x, w), normal(3, 11, 7), normal(3, 4, 11)),
    "experts_in_the_middle": (lambda w, x: jnp.einsum("ned,edf->nef", x, w), normal(3, 11, 7), normal(4, 3, 11)),
    "experts_all": (lambda w, x: jnp.einsum("nd,edf->enf", x, w), normal(3, 11, 7), normal(4, 11)),
    "experts_last": (lambda w, x: jnp.einsum("end,dfe->nfe", x, w), normal(11, 7, 3), normal(3, 4, 11)),
    "vmap_of_weights": (jax.vmap(lambda w, x: layer(x, w)), normal(3, 11, 7), normal(3, 4, 11)),
    "vmap_of_inputs": (lambda w, x: jax.vmap(jax.vmap(lambda x: x @ w))(x), W, X),
    "wide_accumulator": (lambda w, x: jnp.dot(x, w, preferred_element_type=jnp.float32), W, X),
    "precision": (lambda w, x: jnp.dot(x, w, precision="highest"), W, X),
    # layout
    "reshaped_to_heads": (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w.reshape(11, 3, 5)), normal(11, 15), X),
    "merged_heads": (lambda w, x: x @ w.reshape(11, 15), HEADS, X),
    "merged_inputs": (lambda w, x: x @ w.reshape(15, 11), normal(3, 5, 11), normal(4, 15)),
    "merged_across_sides": (lambda w, x: x @ w.reshape(2, 12), normal(4, 6), normal(3, 2)),
    "split_thrice": (
        lambda w, x: jnp.einsum("nabc,abcd->nd", x, w.reshape(2, 3, 2, 5)),
        normal(12, 5),
        normal(4, 2, 3, 2),
    ),
    "expanded": (lambda w, x: (x @ w[None])[0], W, normal(1, 4, 11)),
    "squeezed": (lambda w, x: x @ w.squeeze(1), normal(11, 1, 7), X),
    "broadcast": (lambda w, x: x @ jnp.broadcast_to(w, (2, 11, 7)), W, X),
    "broadcast_wide": (lambda w, x: x @ jnp.broadcast_to(w, (2, 5, 4)), normal(5, 4), normal(2, 50, 5)),
    "barrier": (lambda w, x: x @ lax.optimization_barrier((w, x))[0], W, X),
    "swapped_twice": (lambda w, x: x @ jnp.swapaxes(jnp.moveaxis(w, 0, -1), 0, 1), W, X),
    "cast": (lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32), W, X),
    "stop_gradient_of_base_copy": (lambda w, x: x @ jnp.copy(w), W, X),
    # scaling
    "scaled": (lambda w, x: x @ (w * 2.5), W, X),
    "scaled_by_input": (lambda w, x: x @ (x.mean() * w), W, X),
    "divided_and_negated": (lambda w, x: x @ -(w / jnp.sqrt(11.0)), W, X),
    "columns_scaled": (lambda w, x: x @ (w * jnp.arange(1.0, 8.0)), W, X),
    "rows_scaled": (lambda w, x: x @ (jnp.arange(1.0, 12.0)[:, None] * w), W, X),
    # indexing
    "sliced_outputs": (lambda w, x: x @ w[:, 2:6], W, X),
    "sliced_inputs": (lambda w, x: x[..., 1:11:2] @ w[1:11:2], W, X),
    "fused_and_split": (
        lambda w, x: jnp.tanh(x @ jnp.split(w, 3, axis=1)[1]) + x @ jnp.split(w, 3, axis=1)[2],
        normal(11, 15),
        X,
    ),
    "reversed": (lambda w, x: x @ w[::-1, ::-1], W, X),
    "unrolled_stack": (lambda w, x: layer(layer(layer(x, w[0]), w[1]), w[-1]), STACK, SQUARE),
    "traced_index": (lambda w, x: layer(x, w[jnp.argmax(x) % 3]), STACK, SQUARE),
    "dynamic_index": (lambda w, x: layer(x, lax.dynamic_index_in_dim(w, 1, keepdims=False)), STACK, SQUARE),
    "picked_experts": (lambda w, x: jnp.einsum("nd,ndf->nf", x, w[jnp.array([2, 0, 0, 1])]), STACK, SQUARE),
    "embedding": (lambda w, ids: w[ids] * 2.0 + 1.0, TABLE, jnp.array([[1, 5, 5], [0, 12, -1]])),
    "embedding_take": (lambda w, ids: jnp.take(w, ids, axis=0, mode="clip"), TABLE, jnp.array([3, 40])),
    "embedding_one_hot": (lambda w, ids: jax.nn.one_hot(ids, 13) @ w, TABLE, jnp.array([3, 4])),
    "embedding_last_axis": (lambda w, ids: jnp.take(w, ids, axis=1), TABLE, jnp.array([[0, 6], [2, 2]])),
    "embedding_vmap": (lambda w, ids: jax.vmap(lambda i: w[i])(ids), TABLE, jnp.array([1, 3])),
    "embedding_filled": (
        lambda w, ids: w.at[ids].get(mode="fill", fill_value=7.0),
        TABLE,
        jnp.array([[1, 40], [12, 3]]),
    ),
    "embedding_padded": (  # a padding id beyond the table, whose row is NaN and masked out
        lambda w, ids: jnp.where((ids < 13)[:, None], jnp.take(w, ids, axis=0), 0.0),
        TABLE,
        jnp.array([1, 13, 4]),
    ),
    "looked_up_one_by_one": (
        lambda w, ids: lax.scan(lambda h, i: (jnp.tanh(w[i] + h), None), w[0], ids)[0],
        TABLE,
        jnp.array([1, 3]),
    ),
    "positions": (lambda w, x: x + w[jnp.arange(4)], TABLE, normal(2, 4, 7)),
    "tied": (lambda w, ids: jnp.tanh(w[ids]) @ w.T, TABLE, jnp.array([1, 5])),
    # control flow
    "jit": (lambda w, x: jax.jit(layer)(x, w), W, X),
    "jit_of_a_view": (lambda w, x: x @ jax.jit(jnp.transpose)(w), normal(7, 11), X),
    "scan_over": (lambda w, x: lax.scan(lambda x, w: (layer(x, w), None), x, w)[0], STACK, SQUARE),
    "scan_reverse": (scan_reverse, STACK, SQUARE),
    "scan_constant": (lambda w, x: lax.scan(lambda x, _: (layer(x, w), None), x, length=3)[0], STACK[0], SQUARE),
    "scan_nested": (scan_twice, STACK, SQUARE),
    "scan_of_transposed": (
        lambda w, x: lax.scan(lambda x, w: (layer(x, w), None), x, w.transpose(2, 1, 0))[0],
        STACK.transpose(2, 1, 0),
        SQUARE,
    ),
    "scan_that_returns_its_weights": (returned_by_scan, STACK, SQUARE),
    "scan_remat": (lambda w, x: lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), None)), x, w)[0], STACK, SQUARE),
    "fori": (lambda w, x: lax.fori_loop(0, 3, lambda i, x: layer(x, w[i]), x), STACK, SQUARE),
    "while": (counted_while, STACK, SQUARE),
    "cond": (lambda w, x: lax.cond(x.sum() > 0, lambda x: layer(x, w), lambda x: x[..., :7], x), W, X),
    "switch": (lambda w, x: lax.switch(1, [lambda x, i=i: x @ w[i] for i in range(3)], x), STACK, SQUARE),
    "checkpoint": (
        jax.checkpoint(lambda w, x: layer(layer(x, w), w.T), policy=jax.checkpoint_policies.dots_saveable),
        W,
        X,
    ),
    "custom_jvp_elsewhere": (lambda w, x: jax.nn.silu(jax.nn.relu(x @ w)), W, X),
    # convolution
    "conv": (
        lambda w, x: lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        normal(3, 3, 4, 6),
        normal(2, 8, 8, 4),
    ),
    "conv_oihw": (lambda w, x: lax.conv(x, w, (1, 2), "VALID"), normal(6, 4, 3, 2), normal(2, 4, 8, 8)),
    "conv_1d_dilated": (
        lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME", None, (2,), dimension_numbers=("NHC", "HIO", "NHC")),
        normal(3, 4, 6),
        normal(2, 9, 4),
    ),
}
TOLERANCE = {"cast": 2e-2}


RANKS = [(name, 2) for name in PROGRAMS] + [
    (name, 1) for name in ("right", "merged_heads", "scan_over", "experts", "conv")
]


@pytest.mark.parametrize(("name", "rank"), RANKS)
def test_lifted_equals_merged(name, rank):
    fun, weight, x = PROGRAMS[name]
    params = {"w": weight}

    def model(params, x):
        return jax.tree.map(lambda y: jnp.sin(y) if name != "cast" else y, fun(params["w"], x))

    sites = lora.sites(model, params, x)
    assert sites["w"].adaptable, sites
    frozen, lora_params = split_at_random(params, all_adaptable(lora.LoRA(rank, alpha=2 * rank)), sites=sites)

    def lifted(lora_params, x):
        return lora.lift(model)(lora.attach(frozen, lora_params), x)

    def merged(lora_params, x):
        return model(lora.merge(frozen, lora_params), x)

    def step(fun):
        """The gradient of the results' sum, and the results; a while loop has no gradient."""

        def total(*args):
            y = fun(*args)
            return sum(leaf.sum() for leaf in jax.tree.leaves(y)), y

        return jax.grad(total, has_aux=True) if name != "while" else fun

    traced = jax.jit(step(lifted)).trace(lora_params, x)
    found, expected = traced.lower().compile()(lora_params, x), in_numpy(step(merged))(lora_params, x)
    assert error(found, expected) < TOLERANCE.get(name, 1e-5)
    assert formed(traced.jaxpr, lora_params) == []


def test_a_custom_derivative_stays_its_author_s():
    """Where a weight enters a custom_jvp, its tangent is factored and goes through the author's rule."""
    frozen, lora_params = split_at_random({"w": W}, {"w": lora.LoRA(rank=2)})

    def model(params, x):
        return jnp.sin(scaled_product(params["w"], x)).sum()

    found = jax.grad(lambda lp, x: lora.lift(model)(lora.attach(frozen, lp), x), argnums=(0, 1))(lora_params, X)
    expected = jax.grad(lambda lp, x: model(lora.merge(frozen, lp), x), argnums=(0, 1))(lora_params, X)
    assert error(found, expected) < 1e-5
    plain = jax.grad(lambda lp: jnp.sin(X @ lora.merge(frozen, lp)["w"]).sum())(lora_params)
    assert error(found[0], plain) > 1


def test_a_custom_derivative_of_a_weight_that_does_not_move():
    frozen, lora_params = lora.split(jax.random.key(0), {"w": W}, {"w": lora.LoRA(rank=2)})
    attached = lora.attach(frozen, randomized(lora_params, 0.3))

    def model(params, x):
        return jnp.sin(scaled_product(params["w"], x)).sum()

    found = jax.grad(lambda x: lora.lift(model)(attached, x))(X)
    assert error(found, jax.grad(lambda x: model(lora.merge(frozen, randomized(lora_params, 0.3)), x))(X)) < 1e-5


def test_what_a_layer_is_traced_under_stays_with_it():
    """Contexts such as `jax.default_matmul_precision` and names of scopes reach the lifted program."""
    frozen, lora_params = lora.split(jax.random.key(0), {"w": W}, {"w": lora.LoRA(rank=2)})

    def model(params, x):
        with jax.named_scope("my_scope"), set_xla_metadata(mark="mine"):
            return jnp.sin(x) @ params["w"]

    text = jax.jit(lora.lift(model)).lower(lora.attach(frozen, lora_params), X).as_text(debug_info=True)
    assert "my_scope" in text
    assert 'mark = "mine"' in text


@pytest.mark.parametrize("allow", [False, True])
def test_a_custom_vjp_gets_the_weight_only_if_allowed(allow):
    @jax.custom_vjp
    def product(w, x):
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda wx, g: (5.0 * jnp.einsum("btd,btk->dk", wx[1], g), g @ wx[0].T))
    frozen, lora_params = lora.split(jax.random.key(0), {"w": W}, {"w": lora.LoRA(rank=2)})
    lora_params = randomized(lora_params, 0.3)

    def model(params, x):
        return jnp.sin(product(params["w"], x)).sum()

    lifted = lora.lift(model, materialize="allow" if allow else "error")
    if not allow:
        with pytest.raises(
            lora.MaterializeError, match=r"'w' \(11, 7\) reaches 'custom_vjp_call' at test_rules.py:\d+"
        ):
            lifted(lora.attach(frozen, lora_params), X)
        return
    found = jax.grad(lambda lp: lifted(lora.attach(frozen, lp), X))(lora_params)
    expected = jax.grad(lambda lp: model(lora.merge(frozen, lp), X))(lora_params)
    assert error(found, expected) < 1e-5
