"""Ragged products: lifted equals merged, values and gradients, and no expert's matrix is formed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from checks import equations, error, formed, normal, split_at_random
from in_numpy import in_numpy
from jax import lax

import lora_jax as lora
from lora_jax.axes import Axis
from lora_jax.factored import Factored
from lora_jax.materialize import materialize
from lora_jax.network import Network
from lora_jax.sites import Site

SIZES = jnp.array([4, 0, 5])  # of ten rows: one group is empty, and one row is of none
W = normal(3, 7, 5, seed=1)  # 3 groups, 7 in, 5 out
X = normal(10, 7, seed=2)


def ragged(x, w, sizes, summed=((1,), (1,)), batch=((), ()), rows=0, group=(0,), **options):
    numbers = lax.RaggedDotDimensionNumbers((summed, batch), (rows,), group)
    return lax.ragged_dot_general(x, w, sizes, numbers, **options)


def mixture(w, x):
    """Each token goes to one expert and comes back to its place."""
    expert = jnp.argmax(x[:, :3], -1)
    sort = jax.nn.one_hot(jnp.argsort(expert), len(x))
    return sort.T @ lax.ragged_dot(sort @ x, w, jax.nn.one_hot(expert, 3, dtype=int).sum(0))


def layers(w, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(lax.ragged_dot(x, w, SIZES)), None)), x, w)[0]


GIO, GOI, STACKED = ((0,), (1,), (2,)), ((0,), (2,), (1,)), ((0, 1), (2,), (3,))

# name: function of (weight, x), weight, x, and the weight's batch, in and out axes
PROGRAMS = {
    "experts": (lambda w, x: lax.ragged_dot(x, w, SIZES), W, X, GIO),
    "precise": (lambda w, x: lax.ragged_dot(x, w, SIZES, precision="highest"), W, X, GIO),
    "wide_accumulator": (lambda w, x: lax.ragged_dot(x, w, SIZES, preferred_element_type=jnp.float32), W, X, GIO),
    "one_group": (lambda w, x: lax.ragged_dot(x, w, SIZES[:1]), W[:1], X, GIO),
    "swapped": (lambda w, x: lax.ragged_dot(x, w.swapaxes(1, 2), SIZES), normal(3, 5, 7), X, GOI),
    "outputs_first": (lambda w, x: ragged(x, w, SIZES, ((1,), (2,))), normal(3, 5, 7), X, GOI),
    "groups_last": (lambda w, x: ragged(x, w, SIZES, ((1,), (0,)), group=(2,)), normal(7, 5, 3), X, ((2,), (0,), (1,))),
    "groups_of_two_axes": (
        lambda w, x: lax.ragged_dot(x, w.reshape(6, 7, 5), jnp.array([1, 2, 0, 3, 2, 1])),
        normal(2, 3, 7, 5),
        X,
        STACKED,
    ),
    "heads": (
        lambda w, x: ragged(x, w, SIZES, ((1, 2), (2, 1))),
        normal(3, 4, 7, 3, 3),
        normal(10, 7, 4),
        ((0,), (1, 2), (3, 4)),
    ),
    "rows_of_two_dimensions": (lambda w, x: ragged(x, w, SIZES, ((2,), (1,))), W, normal(10, 2, 7), GIO),
    "rows_within_rows": (
        lambda w, x: ragged(x, w, jnp.stack([SIZES, SIZES[::-1]]), ((2,), (1,)), rows=1),
        W,
        normal(2, 10, 7),
        GIO,
    ),
    "same_rows_within_rows": (lambda w, x: ragged(x, w, SIZES, ((2,), (1,)), rows=1), W, normal(2, 10, 7), GIO),
    "vmap": (
        lambda w, x: jax.vmap(lax.ragged_dot)(x, w, jnp.stack([SIZES, SIZES[::-1]])),
        normal(2, 3, 7, 5),
        normal(2, 10, 7),
        STACKED,
    ),
    "gradient_of_input": (
        lambda w, y: jax.linear_transpose(lambda x: lax.ragged_dot(x, w, SIZES), X)(y)[0],
        W,
        normal(10, 5),
        GOI,
    ),
    "jitted": (lambda w, x: jax.jit(lax.ragged_dot)(x, w, SIZES), W, X, GIO),
    "scaled": (lambda w, x: lax.ragged_dot(x, w * jnp.arange(1.0, 6.0), SIZES), W, X, GIO),
    "mixture": (mixture, W, X, GIO),
    "layers": (layers, normal(2, 3, 7, 7), X, STACKED),
}
RANKS = [(name, 2) for name in PROGRAMS] + [(name, 1) for name in ("experts", "vmap", "gradient_of_input")]


def with_gradients(fun):
    """The value, and the gradients of the sum of its sine in all arguments."""

    def total(*args):
        y = fun(*args)
        return jnp.sin(y).sum(), y

    return lambda *args: jax.grad(total, tuple(range(len(args))), has_aux=True)(*args)


@pytest.mark.parametrize(("name", "rank"), RANKS)
def test_lifted_equals_merged(name, rank):
    fun, weight, x, axes = PROGRAMS[name]
    params = {"w": weight}

    def model(params, x):
        return fun(params["w"], x)

    sites = lora.sites(model, params, x)
    assert (sites["w"].kind, sites["w"].batch_axes, sites["w"].in_axes, sites["w"].out_axes) == ("linear", *axes)
    frozen, lora_params = split_at_random(params, {"w": lora.LoRA(rank)}, sites=sites)
    lifted = with_gradients(lambda lp, x: lora.lift(model)(lora.attach(frozen, lp), x))
    merged = with_gradients(lambda lp, x: model(lora.merge(frozen, lp), x))
    traced = jax.jit(lifted).trace(lora_params, x)
    assert error(traced.lower().compile()(lora_params, x), in_numpy(merged)(lora_params, x)) < 1e-5
    assert formed(traced.jaxpr, lora_params) == []


GROUP, IN, OUT, R, S = Axis("0", 3), Axis("1", 7), Axis("2", 5), Axis("rank", 2), Axis("other rank", 4)

# name: the axes of each operand of a network over W's axes
NETWORKS = {
    "shared": [(IN, R), (R, OUT)],
    "shared_inputs": [(IN, R), (GROUP, R, OUT)],
    "shared_outputs": [(GROUP, IN, R), (R, OUT)],
    "between_the_factors": [(IN, R), (GROUP, R), (R, OUT), (GROUP, OUT)],
    "scaled_by_expert": [(GROUP,), (IN, R), (R, OUT)],
    "element_by_element": [(GROUP, IN, R), (GROUP, R, OUT), (IN, S), (GROUP, S, OUT)],
    "core": [(IN, R), (GROUP, R, S), (S, OUT)],
    "outputs_alone": [(GROUP, OUT)],
    "inputs_alone": [(GROUP, IN)],
    "groups_alone": [(GROUP,)],
    "a_number": [()],
}
USES = {
    "experts": (lambda w, x: lax.ragged_dot(x, w, SIZES), X),
    "backward": (lambda w, y: jax.linear_transpose(lambda x: lax.ragged_dot(x, w, SIZES), X)(y)[0], normal(10, 5)),
    "rows_within_rows": (PROGRAMS["rows_within_rows"][0], normal(2, 10, 7)),
}


def drawn(named):
    """A network of random operands over these axes."""
    return Network(tuple(normal(*(a.size for a in axes), seed=i) for i, axes in enumerate(named)), tuple(named), 0.5)


def assert_lifted_equals_merged(fun, value, x):
    """The same of a value whose networks are made by hand, for every array in it but the base."""
    scales, deltas = value.base.operands[1:], [delta.operands for delta in value.deltas]

    def attached(scales, deltas):
        networks = [Network(new, delta.axes, delta.scale) for new, delta in zip(deltas, value.deltas, strict=True)]
        base = Network((value.base.operands[0], *scales), value.base.axes)
        return Factored(base, tuple(networks), value.dims, value.dtype, value.paths)

    lifted = with_gradients(lambda *args: lora.lift(fun)(attached(*args[:2]), args[2]))
    merged = with_gradients(lambda *args: fun(materialize(attached(*args[:2])), args[2]))
    args = scales, deltas, x
    traced = jax.jit(lifted).trace(*args)
    found, expected = traced.lower().compile()(*args), in_numpy(merged)(*args)
    assert error(found, expected) < 1e-4  # of a number, it is that of a long sum
    weight = lora.Adapter({}, lora.LoRA(1), Site(W.shape, "linear", (0,), (1,), (2,)))
    assert formed(traced.jaxpr, {"w": weight}) == []


@pytest.mark.parametrize("use", USES)
def test_any_network(use):
    """All at once: the gradients of the operands of each are compared."""
    value = functools.reduce(Factored.add, map(drawn, NETWORKS.values()), Factored.of(W, "w"))
    assert_lifted_equals_merged(USES[use][0], value, USES[use][1])


def test_a_weight_and_its_network_scaled():
    """As a magnitude for each output does: the base too is more than one array then, and not formed."""
    value = Factored.of(W, "w").add(drawn([(GROUP, IN, R), (GROUP, R, OUT)]))
    for axes in ((), (OUT,), (IN,), (GROUP,), (GROUP, OUT)):
        value = value.times(*drawn([axes]).operands, axes)
    assert_lifted_equals_merged(USES["experts"][0], value, X)


def test_a_weight_that_trains():
    trained = Factored.of(W, "w").add(drawn([(GROUP, IN, OUT)]))
    assert error(lora.lift(lax.ragged_dot)(X, trained, SIZES), lax.ragged_dot(X, materialize(trained), SIZES)) < 1e-5


def test_half_precision_stays():
    """No product is computed in float32, forward or backward."""

    def model(params, x):
        return lax.ragged_dot(x, params["w"].astype(jnp.bfloat16), SIZES)

    params, x = {"w": W}, X.astype(jnp.bfloat16)
    frozen, lora_params = split_at_random(params, {"w": lora.LoRA(2)}, sites=lora.sites(model, params, x))
    step = with_gradients(lambda lp, x: lora.lift(model)(lora.attach(frozen, lp), x))
    products = ("ragged_dot_general", "dot_general")
    made = [eqn for eqn in equations(jax.make_jaxpr(step)(lora_params, x)) if eqn.primitive.name in products]
    assert {eqn.outvars[0].aval.dtype for eqn in made} == {jnp.dtype("bfloat16")}
    expected = with_gradients(lambda lp, x: model(lora.merge(frozen, lp), x))(lora_params, x)
    assert error(step(lora_params, x), expected) < 3e-2


def test_each_product_is_ragged():
    """Of each expert's own A and B, rows meet those of their own expert alone: (x·A)·B, and their three gradients."""
    site = Site(W.shape, "linear", (0,), (1,), (2,))
    frozen, lora_params = lora.split(jax.random.key(0), {"w": W}, {"w": lora.LoRA(2)}, sites={"w": site})

    def loss(lora_params, x):
        return lora.lift(lambda params, x: lax.ragged_dot(x, params["w"], SIZES))(
            lora.attach(frozen, lora_params), x
        ).sum()

    step = jax.make_jaxpr(jax.grad(loss, (0, 1)))(lora_params, X)
    made = [eqn.primitive.name for eqn in equations(step) if "dot_general" in eqn.primitive.name]
    assert made == ["ragged_dot_general"] * 8  # x·W, x·A and ·B; their gradients of x, and those of A and B


ERRORS = {
    "as_the_rows": (lambda w, x: lax.ragged_dot(w[0], x, SIZES), normal(3, 5, 4)),
    "ragged_inputs": (lambda w, x: ragged(x, w[0], SIZES, ((1,), (0,)), rows=1, group=()), X),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_needs_the_whole_weight_says_so(name):
    """A weight whose rows are in groups, or whose inputs are: neither is one matrix for each group."""
    fun, x = ERRORS[name]
    value = Factored.of(W, "w").add(drawn([(GROUP, IN, R), (GROUP, R, OUT)]))
    with pytest.raises(lora.MaterializeError, match=r"'w' \(.*\) reaches 'ragged_dot_general' at test_ragged.py:\d+"):
        lora.lift(fun)(value, x)
    found = lora.lift(fun, materialize="allow")(value, x)
    assert error(found, fun(materialize(value), x)) < 1e-5
