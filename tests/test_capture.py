"""`capture`: the moments of a weight's inputs are those one computes by hand, wherever the weight is used."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import error, flops, normal
from jax import lax
from zoo import ZOO

import lora_jax as lora

X = normal(4, 5, 6, seed=1)
W, V = normal(6, 6, seed=2, scale=0.4), normal(6, 3, seed=3)
STACK = normal(3, 6, 6, seed=4, scale=0.4)


def moments_of(x, batch=0):
    """By hand: of inputs (*batch, ..., in)."""
    x = np.asarray(x, np.float64).reshape(*x.shape[:batch], -1, x.shape[-1])
    count = np.full(x.shape[:-2], x.shape[-2], np.float64)
    return lora.Moments(np.swapaxes(x, -1, -2) @ x, x.sum(-2), count)


def layers(w, x):
    """The inputs of each layer, by hand."""
    inputs = []
    for layer in w:
        inputs.append(x)
        x = jnp.tanh(x @ layer)
    return jnp.stack(inputs)


def mlp(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def scanned(p, x, wrap=lambda f: f):
    return jnp.sum(lax.scan(lambda x, w: (wrap(lambda x: jnp.tanh(x @ w))(x), None), x, p["stack"])[0])


def unrolled(p, x):
    for i in range(3):
        x = jnp.tanh(x @ p["stack"][i])
    return x


def shared(p, x):
    """One weight in three rounds of a loop that does not stack it, and once behind a branch."""
    x = lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["w"]), x)
    return lax.cond(x[0, 0, 0] > 99, lambda x: x, lambda x: x @ p["w"], x)


def fused(p, x):
    """The weights of two projections, one of them (out, in), concatenated before use."""
    return x @ jnp.concatenate([p["w"], jax.jit(lambda u: u.T)(p["u"])], 1)


def four(w, x):
    """What goes into one weight that is used four times, one after another."""
    return layers([w] * 4, x)


INPUTS = {"w": X, "v": jnp.tanh(X @ W)}
# name: a function, its weights, and what each of them is multiplied by, after how many batch axes
PROGRAMS = {
    "mlp": (mlp, {"w": W, "v": V}, {"w": (X, 0), "v": (jnp.tanh(X @ W), 0)}),
    "one_row": (lambda p, x: mlp(p, x[0, 0]), {"w": W, "v": V}, {"w": (X[0, 0], 0), "v": (jnp.tanh(X @ W)[0, 0], 0)}),
    "scan": (scanned, {"stack": STACK}, {"stack": (layers(STACK, X), 1)}),
    "scan_checkpoint": (
        functools.partial(scanned, wrap=jax.checkpoint),
        {"stack": STACK},
        {"stack": (layers(STACK, X), 1)},
    ),
    "scan_jit": (functools.partial(scanned, wrap=jax.jit), {"stack": STACK}, {"stack": (layers(STACK, X), 1)}),
    "unrolled": (unrolled, {"stack": STACK}, {"stack": (layers(STACK, X), 1)}),
    "vmap": (lambda p, x: jax.vmap(lambda x: mlp(p, x))(x), {"w": W, "v": V}, {k: (x, 0) for k, x in INPUTS.items()}),
    "shared": (shared, {"w": W}, {"w": (four(W, X), 0)}),
    "experts": (
        lambda p, x: jnp.einsum("eni,eio->eno", x, p["w"]),
        {"w": normal(4, 6, 3, seed=5)},
        {"w": (X, 1)},
    ),
    "all_experts": (
        lambda p, x: jnp.einsum("bni,eio->bneo", x, p["w"]),
        {"w": STACK},
        {"w": (jnp.stack([X] * 3), 1)},
    ),
    "out_in": (lambda p, x: x @ p["w"].T, {"w": normal(3, 6, seed=6)}, {"w": (X, 0)}),
    "left": (lambda p, x: p["w"] @ x[0].T, {"w": normal(3, 6, seed=6)}, {"w": (X[0], 0)}),
    "heads": (
        lambda p, x: jnp.einsum("bnhk,hkd->bnd", x.reshape(4, 5, 2, 3), p["w"]),
        {"w": normal(2, 3, 6, seed=7)},
        {"w": (X, 0)},
    ),
    "split_heads": (
        lambda p, x: jnp.einsum("bnhk,hkd->bnd", x.reshape(4, 5, 2, 3), p["w"].reshape(2, 3, 3)),
        {"w": V},
        {"w": (X, 0)},
    ),
    "fused": (fused, {"w": W, "u": normal(3, 6, seed=8)}, {"w": (X, 0), "u": (X, 0)}),
    "bfloat16": (
        lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16),
        {"w": W},
        {"w": (X.astype(jnp.bfloat16), 0)},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_moments_are_those_by_hand(name):
    model, params, inputs = PROGRAMS[name]
    captured = jax.jit(lora.capture(model, lora.sites(model, params, X)))(params, X)
    assert error(captured, {path: moments_of(x, batch) for path, (x, batch) in inputs.items()}) < 1e-6
    assert {x.dtype for x in jax.tree.leaves(captured)} == {np.dtype("float32")}


@pytest.mark.parametrize("model", ["linen", "equinox", "nnx"])
def test_models_need_no_hooks(model):
    """Scanned, rematerialized layers in Linen, one token at a time under vmap in Equinox, and modules of NNX."""
    loss, params, batch = ZOO[model]()
    found = lora.sites(loss, params, *batch)
    linear = {path: site for path, site in found.items() if site.kind == "linear"}
    captured = jax.jit(functools.partial(lora.capture(loss, linear), params))(*batch)
    assert len(captured) == len(linear) > 2
    for path, moments in captured.items():
        sizes, inner, _ = linear[path].sizes()
        assert moments.second.shape == (*sizes, np.prod(inner), np.prod(inner))
        assert bool((moments.tokens == batch[0].size).all())
        assert bool((jnp.linalg.eigvalsh(moments.second)[..., -1] > 0).all())


def test_it_costs_a_forward_pass_and_the_products_of_inputs():
    n, d, k = 256, 128, 512
    params = {"up": normal(d, k), "down": normal(k, d)}
    x = normal(n, d)

    def model(p, x):
        return x @ p["up"] @ p["down"]

    forward = flops(model, params, x)
    found = flops(lora.capture(model, lora.sites(model, params, x)), params, x)
    assert found < 1.03 * (forward + 2 * n * (d * d + k * k))


@pytest.mark.parametrize(
    ("model", "weight", "message"),
    [
        (lambda p, x: p["w"][jnp.array([1, 2])], W, "is embedding"),
        (
            lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")),
            normal(3, 6, 4),
            "is conv",
        ),
        (lambda p, x: lax.ragged_dot(x[0], p["w"], jnp.array([2, 0, 3], jnp.int32)), STACK, "'w' is used in a way"),
        (lambda p, x: x[..., :2] @ p["w"][:2] + x[..., 2:] @ p["w"][2:], W, "in parts, 2 of 6"),
        (lambda p, x: jnp.tile(x, 2) @ jnp.concatenate([p["w"], V @ V.T]), W, "in parts, 12 of 6"),
        (lambda p, x: x @ jnp.where(x[0, 0, 0] > 0, p["w"], 0), W, "one of several to choose from"),
    ],
)
def test_what_has_no_moments_is_refused(model, weight, message):
    params = {"w": weight}
    with pytest.raises(ValueError, match=message):
        lora.capture(model, lora.sites(model, params, X))(params, X)


@pytest.mark.parametrize(
    "join", [jnp.matmul, lambda w, v: lax.cond(w[0, 0] > 0, lambda: w, lambda: v), lambda w, v: jnp.where(True, w, v)]
)
def test_weights_that_meet_each_other_before_their_input_are_refused(join):
    params = {"w": W, "v": STACK[0]}

    def model(p, x):
        return x @ join(p["w"], p["v"])

    with pytest.raises(ValueError, match="multiplied by another weight, or one of several to choose from"):
        lora.capture(model, lora.sites(model, params, X))(params, X)


def test_a_weight_that_meets_no_input_along_its_in_axes_is_refused():
    params = {"w": W, "v": V}

    def model(p, x):
        return x @ (p["w"] @ p["v"])

    sites = lora.sites(model, params, X)
    with pytest.raises(ValueError, match="'w' meets no input along its in axes"):
        lora.capture(model, {"w": sites["w"]})(params, X)


def test_a_leaf_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="no leaf at 'w'"):
        lora.capture(mlp, lora.sites(mlp, {"w": W, "v": V}, X))({"v": V}, X)


def test_the_other_side_of_a_weight_does_not_count():
    """Of a weight that is used transposed too, the inputs are those of its site."""
    params = {"w": normal(6, 3, seed=6)}

    def model(p, x):
        return x @ p["w"] @ p["w"].T

    captured = lora.capture(model, lora.sites(model, params, X))(params, X)
    assert error(captured, {"w": moments_of(X)}) < 1e-6
