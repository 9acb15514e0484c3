"""Custom derivatives keep their author's rule; one that a weight enters gets the whole weight, if that is allowed.

Rules here multiply their gradient by a factor: by 1 it is the true derivative, by another it is not, so that a test can
tell the author's rule from JAX's own differentiation of what is inside.
"""

from __future__ import annotations

import functools
import linecache
import re

import checks
import jax
import jax.numpy as jnp
import optax
import pytest
from checks import all_adaptable, error, randomized
from in_numpy import in_numpy
from jax import lax

import lora_jax as lora

KEY, RANK_2 = jax.random.key(0), lora.LoRA(rank=2, alpha=4)


normal = functools.partial(checks.normal, scale=0.5)


X, W, STACK = normal(6, 8, seed=5), normal(8, 5, seed=6), normal(3, 8, 8, seed=7)
HEADS = {name: normal(8, 2, 4, seed=i) for i, name in enumerate(("query", "key", "value"))}


def lifted_and_merged(model, params, **options):
    """Two functions of (factors, x) that should be one, and random factors; all that can be adapted is."""
    sites = lora.sites(model, params, X)
    rules = all_adaptable(RANK_2)
    if not any(site.adaptable for site in sites.values()):  # a weight that is used whole: its axes are a choice
        rules = {".*": RANK_2.at(in_axes=-2, out_axes=-1, batch_axes=range(params["w"].ndim - 2))}
    frozen, lora_params = lora.split(KEY, params, rules, sites=sites)
    return (
        lambda lp, x: lora.lift(model, **options)(lora.attach(frozen, lp), x),
        lambda lp, x: model(lora.merge(frozen, lp), x),
        randomized(lora_params, 0.3),
    )


def step(fun, lora_params, run=jax.jit):
    """Gradients with respect to factors and inputs, and values."""

    def total(*args):
        y = fun(*args)
        return jnp.sin(y).sum(), y

    return run(jax.grad(total, argnums=(0, 1), has_aux=True))(lora_params, X)


def difference(model, params, **options):
    lifted, merged, lora_params = lifted_and_merged(model, params, **options)
    return error(step(lifted, lora_params), step(merged, lora_params, in_numpy))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def flash_attention(chunk, factor, q, k, v):
    """softmax(q·kᵀ)·v over chunks of keys, with a running maximum and sum; nothing of size tokens² is kept."""
    return forward(chunk, factor, q, k, v)[0]


def forward(chunk, factor, q, k, v):
    def one_chunk(carry, kv):
        (top, total, out), (k, v) = carry, kv
        scores = jnp.einsum("thd,shd->ths", q, k)
        new = jnp.maximum(top, scores.max(-1))
        p, shrink = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
        out = out * shrink[..., None] + jnp.einsum("ths,shd->thd", p, v)
        return (new, total * shrink + p.sum(-1), out), None

    start = (jnp.full(q.shape[:2], -jnp.inf), jnp.zeros(q.shape[:2]), jnp.zeros_like(q))
    chunks = jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), (k, v))
    (top, total, out), _ = lax.scan(one_chunk, start, chunks)
    out = out / total[..., None]
    return out, (q, k, v, out, top + jnp.log(total))


def backward(chunk, factor, residuals, g):
    q, k, v, out, log_total = residuals
    p = jnp.exp(jnp.einsum("thd,shd->ths", q, k) - log_total[..., None])
    ds = p * (jnp.einsum("thd,shd->ths", g, v) - (g * out).sum(-1, keepdims=True))
    grads = jnp.einsum("ths,shd->thd", ds, k), jnp.einsum("ths,thd->shd", ds, q), jnp.einsum("ths,thd->shd", p, g)
    return tuple(factor * grad for grad in grads)


flash_attention.defvjp(forward, backward)


def plain_attention(chunk, factor, q, k, v):
    return jnp.einsum("ths,shd->thd", jax.nn.softmax(jnp.einsum("thd,shd->ths", q, k)), v)


def attention(params, x, *, factor, core=flash_attention):
    q, k, v = (jnp.einsum("td,dhk->thk", x, params[name]) for name in ("query", "key", "value"))
    return x + core(2, factor, q, k, v).reshape(x.shape)


def sine(factor, f=jnp.sin, df=jnp.cos, **options):
    """sin, with a rule made by `custom_vjp` under the options of `defvjp`."""
    g = jax.custom_vjp(f)
    fwd = (lambda x: (f(x.value), x.value)) if options.get("symbolic_zeros") else (lambda x: (f(x), x))
    g.defvjp(fwd, lambda x, ct: (factor * ct * df(x),), **options)
    return g


def of_two(factor):
    """Only one operand moves, which a rule with symbolic zeros is told."""
    f = jax.custom_vjp(lambda x, y: x * y)

    def fwd(x, y):
        assert (x.perturbed, y.perturbed) == (True, False)
        return x.value * y.value, y.value

    f.defvjp(fwd, lambda y, g: (factor * g * y, None), symbolic_zeros=True)
    return lambda x: f(x, jnp.full_like(x, 2.0))


def cube_root(factor):
    """y with y³ + y = x, whose tangents the author solves for."""

    def newton(f, y):
        return lax.fori_loop(0, 30, lambda _, y: y - f(y) / (3 * y**2 + 1), y)

    def tangent(g, t):
        return factor * t / g(jnp.ones_like(t))

    return lambda x: lax.custom_root(lambda y: y**3 + y - x, jnp.zeros_like(x), newton, tangent)


def linear_solve(factor):
    return lambda x: lax.custom_linear_solve(lambda y: 3 * y, x, lambda _, b: b / 3, lambda _, b: factor * b / 3)


def linear_call(factor):
    double = functools.partial(jax.custom_derivatives.linear_call, lambda _, x: 2 * x, lambda _, g: 2 * factor * g)
    return lambda x: double((), x)


ELEMENTWISE = {
    "symbolic_zeros": functools.partial(sine, symbolic_zeros=True),
    "symbolic_zeros_of_one": of_two,
    "optimize_remat": functools.partial(sine, optimize_remat=True),
    "checkpoint_within": functools.partial(sine, f=jax.checkpoint(jnp.sin), df=jax.checkpoint(jnp.cos)),
    "custom_gradient": lambda c: jax.custom_gradient(lambda x: (jnp.sin(x), lambda g: (c * g * jnp.cos(x),))),
    "custom_root": cube_root,
    "custom_linear_solve": linear_solve,
    "linear_call": linear_call,
}
BLOCKS = {"flash_attention": (lambda factor: functools.partial(attention, factor=factor), HEADS)} | {
    name: (lambda factor, make=make: lambda params, x: make(factor)(x @ params["w"]), {"w": STACK[0]})
    for name, make in ELEMENTWISE.items()
}
# Where the custom derivative stands: functions of (block, params, x), with block(params, x) of x's shape.
PLACES = {
    "scan": lambda block, params, x: lax.scan(lambda x, _: (block(params, x), None), x, length=2)[0],
    "checkpoint": lambda block, params, x: jax.checkpoint(block)(params, x),
    "vmap": lambda block, params, x: jax.vmap(block, (None, 0))(params, jnp.stack([x, 2 * x])),
    "cond": lambda block, params, x: lax.cond(x[0, 0] > -9, block, lambda params, x: x, params, x),
}


@pytest.mark.parametrize(
    ("name", "place"),
    [("flash_attention", place) for place in PLACES] + [("optimize_remat", "scan"), ("optimize_remat", "checkpoint")],
)
def test_a_rule_that_no_weight_enters(name, place):
    make, params = BLOCKS[name]
    assert difference(functools.partial(PLACES[place], make(3.0)), params) < 1e-5


@pytest.mark.parametrize("name", BLOCKS)
def test_the_rule_is_its_author_s(name):
    """With a factor of 3 it is lifted as merged; with a factor of 1 values are the same and gradients are not."""
    make, params = BLOCKS[name]
    lifted, merged, lora_params = lifted_and_merged(make(3.0), params)
    grads, y = step(lifted, lora_params)
    assert error((grads, y), step(merged, lora_params)) < 1e-5
    true_grads, true_y = step(lifted_and_merged(make(1.0), params)[0], lora_params)
    assert error(y, true_y) < 1e-5
    assert error(grads, true_grads) > 0.1


def test_the_flash_attention_here_is_one():
    lifted, *_, lora_params = lifted_and_merged(functools.partial(attention, factor=1.0), HEADS)
    _, plain, _ = lifted_and_merged(functools.partial(attention, factor=1.0, core=plain_attention), HEADS)
    assert error(step(lifted, lora_params), step(plain, lora_params)) < 1e-5


def test_attention_of_jax():
    def core(chunk, factor, q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    assert difference(functools.partial(attention, factor=1.0, core=core), HEADS) < 1e-5


LABELS = jnp.array([0, 3, 1, 4, 2, 2])
LOSSES = {
    "cross_entropy": lambda y: optax.softmax_cross_entropy_with_integer_labels(y, LABELS),
    "binary": lambda y: optax.sigmoid_binary_cross_entropy(y, jax.nn.one_hot(LABELS, 5)),
    "cosine": lambda y: optax.cosine_distance(y, jnp.ones_like(y)),
    "ctc": lambda y: optax.ctc_loss(y[None], jnp.zeros((1, 6)), LABELS[None, :3], jnp.zeros((1, 3))),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_optax(name):
    assert difference(lambda params, x: LOSSES[name](x @ params["w"]), {"w": W}) < 1e-5


def quantized(w):
    """Rounded to 8 bits, with one scale for each column."""
    scale = jnp.abs(w).max(-2, keepdims=True) / 127
    return jnp.round(w / scale) * scale


def product_rule(**options):
    """x·W with W rounded, and straight through to W, three times over so that it shows."""
    f = jax.custom_vjp(lambda w, x: x @ quantized(w))

    def fwd(w, x):
        w, x = (w.value, x.value) if options.get("symbolic_zeros") else (w, x)
        return x @ quantized(w), (w, x)

    f.defvjp(fwd, lambda wx, g: (3.0 * wx[1].T @ g, g @ quantized(wx[0]).T), **options)
    return f


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def product_times(factor, w, name, x):
    return factor * (x @ w)


product_times.defvjp(
    lambda factor, w, name, x: (factor * (x @ w), (w, x)),
    lambda factor, name, wx, g: (3.0 * factor * wx[1].T @ g, factor * g @ wx[0].T),
)
product = product_rule()
product_gradient = jax.custom_gradient(lambda w, x: (x @ w, lambda g: (3.0 * x.T @ g, g @ w.T)))
# name: function of (weight, x), weight; each has a custom_vjp that the weight, or a view of it, enters
ENTERED = {
    "bare": (lambda w, x: product(w, x), W),
    "view": (lambda w, x: product(w.T, x), W.T),
    "symbolic_zeros": (lambda w, x: product_rule(symbolic_zeros=True)(w, x), W),
    "optimize_remat": (lambda w, x: product_rule(optimize_remat=True)(w, x), W),
    "nondiff_argnums": (lambda w, x: product_times(2.0, w, "a name", x), W),
    "custom_gradient": (lambda w, x: product_gradient(w, x), W),
    "jit": (lambda w, x: jax.jit(product)(w, x), W),
    "checkpoint": (lambda w, x: jax.checkpoint(product)(w, x), W),
    "scan": (lambda w, x: lax.scan(lambda x, w: (product(w, x), None), x, w)[0], STACK),
    "vmap": (lambda w, x: jax.vmap(product, (0, None))(w, x), STACK),
    "cond": (lambda w, x: lax.cond(x[0, 0] > -9, product, lambda w, x: x @ w, w, x), W),
}


@pytest.mark.parametrize("name", ENTERED)
def test_a_rule_that_a_weight_enters(name):
    """An error at the user's line; or, where allowed, the formed weight and the author's gradient."""
    fun, weight = ENTERED[name]

    def model(params, x):
        return fun(params["w"], x)

    with pytest.raises(lora.MaterializeError) as caught:
        difference(model, {"w": weight})
    where = re.match(r"'w' \(.*\) reaches 'custom_vjp_call' at test_custom_vjp\.py:(\d+) ", str(caught.value))
    assert where, caught.value
    assert "product" in linecache.getline(__file__, int(where[1])), caught.value
    assert difference(model, {"w": weight}, materialize="allow") < 1e-5


def test_the_gradient_that_a_rule_gives_goes_on_into_the_factors():
    """The chain rule by hand: dA = s·G·Bᵀ and dB = s·Aᵀ·G, for the G that the rule returns."""
    lifted, _, lora_params = lifted_and_merged(lambda p, x: product(p["w"], x), {"w": W}, materialize="allow")
    (a, b), s, g = (lora_params["w"].factors[name] for name in "AB"), 2.0, 3.0 * X.T @ jnp.ones((6, 5))
    found = jax.grad(lambda lp: lifted(lp, X).sum())(lora_params)["w"].factors
    assert error(found, {"A": s * g @ b.T, "B": s * a.T @ g}) < 1e-5


def test_a_rule_is_told_that_a_frozen_weight_does_not_move():
    moved = []
    f = jax.custom_vjp(lambda w, x: x @ w)

    def fwd(w, x):
        moved.append((w.perturbed, x.perturbed))
        return x.value @ w.value, w.value

    f.defvjp(fwd, lambda w, g: (None, g @ w.T), symbolic_zeros=True)
    lifted, _, lora_params = lifted_and_merged(lambda p, x: f(p["w"], x), {"w": W}, materialize="allow")
    jax.grad(lambda x: lifted(lora_params, x).sum())(X)
    jax.grad(lambda lp: lifted(lp, X).sum())(lora_params)
    assert moved == [(False, True), (True, False)]


@pytest.mark.parametrize("rule", ["forward", "backward"])
def test_a_weight_that_a_rule_closes_over(rule):
    """JAX refuses to differentiate it; lifted, it is refused too, and no gradient is lost in silence."""

    def model(params, x):
        inside = params["w"] if rule == "forward" else W
        f = jax.custom_vjp(lambda x: x @ inside)
        f.defvjp(lambda x: (x @ inside, None), lambda _, g: (g @ params["w"].T,))
        return f(x @ params["first"])

    params, refusals = {"w": W, "first": STACK[0]}, "closed-over value|unexpected tracer"
    frozen, lora_params = lora.split(KEY, params, {".*": RANK_2})
    lifted = lora.lift(model, materialize="allow", unused="allow")
    for fun, join in ((model, lora.merge), (lifted, lora.attach)):
        with pytest.raises(Exception, match=refusals):
            jax.grad(lambda lp, fun=fun, join=join: fun(join(frozen, lp), X).sum())(lora_params)
    if rule == "forward":
        with pytest.raises(lora.MaterializeError, match="'w' .* reaches 'custom_vjp_call' at test_custom_vjp.py"):
            lora.lift(model)(lora.attach(frozen, lora_params), X)


def test_a_custom_batching_rule_stays_its_author_s():
    """It has no reverse mode in JAX, so values alone are compared."""

    def model(params, x):
        f = jax.custom_batching.custom_vmap(jnp.sin)
        f.def_vmap(lambda size, batched, x: (3.0 * jnp.sin(x), True))
        return jax.vmap(lambda x: f(x @ params["w"]))(x)

    lifted, _, lora_params = lifted_and_merged(model, {"w": W})
    _, plain, _ = lifted_and_merged(lambda params, x: jnp.sin(x @ params["w"]), {"w": W})
    assert error(lifted(lora_params, X), 3.0 * plain(lora_params, X)) < 1e-5


def test_a_custom_derivative_around_a_lifted_function():
    lifted, _, lora_params = lifted_and_merged(lambda params, x: jnp.sin(x @ params["w"]).sum(), {"w": W})
    f = jax.custom_vjp(lambda lp: lifted(lp, X))
    f.defvjp(lambda lp: (f(lp), lp), lambda lp, g: (jax.tree.map(lambda x: 3.0 * g * x, lp),))
    assert error(jax.grad(f)(lora_params), jax.tree.map(lambda x: 3.0 * x, lora_params)) < 1e-6


def test_an_implicit_layer_whose_equation_has_the_weight():
    """y = tanh(0.3·y·W + x) by fixed-point iteration, with gradients by the implicit function theorem."""

    def layer(w, x):
        return lax.custom_root(
            lambda y: y - jnp.tanh(0.3 * (y @ w) + x),
            x,
            lambda f, y: lax.fori_loop(0, 60, lambda _, y: y - f(y), y),
            lambda g, t: jnp.linalg.solve(jax.jacobian(g)(jnp.zeros_like(t)), t),
        )

    def model(params, x):
        return jax.vmap(layer, (None, 0))(params["w"], x)

    assert difference(model, {"w": STACK[0]}, materialize="allow") < 1e-5
