"""Convolutions of every kind: lifted equals merged, values and gradients, and no kernel is formed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from checks import equations, error, flops, formed, normal, split_at_random
from in_numpy import in_numpy
from jax import lax

import lora_jax as lora
from lora_jax.axes import Axis
from lora_jax.factored import Factored
from lora_jax.materialize import materialize
from lora_jax.network import Network
from lora_jax.sites import Site

NHWC = ("NHWC", "HWIO", "NHWC")


def conv(x, w, strides=(1, 1), padding="SAME", numbers=NHWC, **options):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **options)


def gradient_of_input(shape, **options):
    """The gradient of a convolution's input, given that of its result: the kernel's two sides change places."""
    return lambda w, y: jax.linear_transpose(lambda x: conv(x, w, **options), jnp.zeros(shape))(y)[0]


def tied(w, x):
    """Encoded and decoded by one kernel."""
    return lax.conv_transpose(jnp.tanh(conv(x, w, (2, 2))), w, (2, 2), "SAME", None, NHWC, transpose_kernel=True)


def stacked(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(conv(x, w)), None), x, w)[0]


def depthwise(x, w, **options):
    return conv(x, w, feature_group_count=x.shape[-1], **options)


W = normal(3, 2, 4, 6, seed=1)  # a window of 3 x 2, 4 channels in, 6 out
X = normal(2, 8, 7, 4, seed=2)
GROUPED = normal(3, 2, 3, 10, seed=3)  # of 6 channels in, in 2 groups
WIDE = normal(5, 3, 1, 6, seed=4)  # depthwise, of 6 channels
X6 = normal(2, 8, 7, 6, seed=5)

HWIO, HWOI, OIHW = ((), (0, 1, 2), (3,)), ((), (0, 1, 3), (2,)), ((), (1, 2, 3), (0,))
STACKED = ((0,), (1, 2, 3), (4,))

# name: function of (kernel, x), kernel, x, and the kernel's batch, in and out axes
PROGRAMS = {
    "nhwc": (lambda w, x: conv(x, w), W, X, HWIO),
    "nchw": (lambda w, x: lax.conv(x, w, (1, 2), "VALID"), normal(6, 4, 3, 2), normal(2, 4, 8, 7), OIHW),
    "any_layout": (
        lambda w, x: conv(x, w, numbers=("WNCH", "OWHI", "HCWN")),
        normal(6, 2, 3, 4),
        normal(7, 2, 4, 8),
        OIHW,
    ),
    "one_dimension": (
        lambda w, x: conv(x, w, (2,), numbers=("NHC", "HIO", "NHC")),
        normal(3, 4, 6),
        normal(2, 15, 4),
        ((), (0, 1), (2,)),
    ),
    "three_dimensions": (
        lambda w, x: conv(x, w, (1, 2, 1), numbers=("NDHWC", "DHWIO", "NDHWC")),
        normal(2, 3, 2, 3, 5),
        normal(2, 4, 5, 4, 3),
        ((), (0, 1, 2, 3), (4,)),
    ),
    "strided_and_padded": (lambda w, x: conv(x, w, (2, 3), [(1, 2), (-1, 0)]), W, X, HWIO),
    "dilated_window": (lambda w, x: conv(x, w, rhs_dilation=(2, 3)), W, X, HWIO),
    "dilated_input": (lambda w, x: conv(x, w, padding=[(1, 0), (2, 1)], lhs_dilation=(2, 1)), W, X, HWIO),
    "deconvolution": (lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=NHWC), W, X, HWIO),
    "deconvolution_by_the_transpose": (
        lambda w, x: lax.conv_transpose(x, w, (2, 1), "SAME", dimension_numbers=NHWC, transpose_kernel=True),
        W,
        X6,
        HWOI,
    ),
    "one_by_one": (lambda w, x: conv(x, w), normal(1, 1, 4, 6), X, HWIO),
    "one_by_one_strided": (lambda w, x: conv(x, w, (2, 2)), normal(1, 1, 4, 6), X, HWIO),
    "linear_as_convolution": (lambda w, x: conv(x, w[None, None]), normal(4, 6), X, ((), (0,), (1,))),
    "reshaped": (lambda w, x: conv(x, w.reshape(3, 2, 4, 6)), normal(6, 4, 6), X, ((), (0, 1), (2,))),
    "merged_channels": (
        lambda w, x: conv(x, w.reshape(3, 2, 4, 6)),
        normal(3, 2, 2, 2, 6),
        X,
        ((), (0, 1, 2, 3), (4,)),
    ),
    "scaled": (lambda w, x: conv(x, 2.0 * w * jnp.arange(6.0)), W, X, HWIO),
    "scaled_inputs": (lambda w, x: conv(x, w * jnp.arange(4.0)[:, None]), W, X, HWIO),
    "accumulated_wide": (lambda w, x: conv(x, w, preferred_element_type=jnp.float32), W, X, HWIO),
    "grouped": (lambda w, x: conv(x, w, feature_group_count=2), GROUPED, X6, HWIO),
    "grouped_nchw": (
        lambda w, x: lax.conv_general_dilated(x, w, (2, 2), "SAME", feature_group_count=2),
        normal(6, 2, 3, 3),
        normal(2, 4, 8, 8),
        OIHW,
    ),
    "groups_with_kernels_of_their_own": (
        lambda w, x: conv(x, w.reshape(3, 2, 3, 10), feature_group_count=2),
        normal(3, 2, 3, 2, 5),
        X6,
        ((3,), (0, 1, 2), (4,)),
    ),
    "depthwise": (lambda w, x: depthwise(x, w), WIDE, X6, HWIO),
    "depthwise_strided": (lambda w, x: depthwise(x, w, strides=(2, 1), padding="VALID"), WIDE, X6, HWIO),
    "depthwise_multiplied": (lambda w, x: depthwise(x, w), normal(3, 3, 1, 12), X6, HWIO),
    "depthwise_one_dimension": (
        lambda w, x: depthwise(x, w, strides=(1,), padding=[(3, 0)], numbers=("NHC", "HIO", "NHC")),
        normal(4, 1, 6),
        normal(2, 9, 6),
        ((), (0, 1), (2,)),
    ),
    "batch_grouped": (lambda w, x: conv(x, w, batch_group_count=2), W, normal(4, 8, 7, 4), HWIO),
    "vmap_of_inputs": (lambda w, x: jax.vmap(lambda x: conv(x, w))(x), W, normal(5, 2, 8, 7, 4), HWIO),
    "vmap_of_kernels": (
        lambda w, x: jax.vmap(lambda w: conv(x, w))(w),
        normal(4, 3, 2, 4, 6),
        X,
        ((), (1, 2, 3), (0, 4)),
    ),
    "vmap_of_both": (jax.vmap(lambda w, x: conv(x, w)), normal(4, 3, 2, 4, 6), normal(4, 2, 8, 7, 4), STACKED),
    "vmap_of_both_grouped": (
        jax.vmap(lambda w, x: conv(x, w, feature_group_count=2)),
        normal(4, 3, 3, 2, 6),
        normal(4, 2, 8, 7, 4),
        STACKED,
    ),
    "vmap_of_both_depthwise": (
        jax.vmap(lambda w, x: depthwise(x, w)),
        normal(4, 5, 3, 1, 6),
        normal(4, 2, 8, 7, 6),
        ((0, 3), (1, 2), (4,)),
    ),
    "vmap_of_kernels_grouped": (
        lambda w, x: jax.vmap(lambda w: conv(x, w, feature_group_count=2))(w),
        normal(4, 3, 3, 2, 6),
        X,
        ((), (1, 2, 3), (0, 4)),
    ),
    "vmap_of_both_batch_grouped": (
        jax.vmap(lambda w, x: conv(x, w, batch_group_count=2)),
        normal(4, 3, 2, 4, 6),
        normal(4, 4, 8, 7, 4),
        STACKED,
    ),
    "stacked": (stacked, normal(3, 3, 2, 4, 4), X, STACKED),
    "tied": (tied, W, X, HWIO),
    "gradient_of_input": (gradient_of_input((2, 8, 7, 4)), W, X6, HWOI),
    "gradient_of_input_strided": (gradient_of_input((2, 8, 7, 4), strides=(2, 1)), W, normal(2, 4, 7, 6), HWOI),
    "gradient_of_input_grouped": (
        gradient_of_input((2, 8, 7, 6), feature_group_count=2),
        GROUPED,
        normal(2, 8, 7, 10),
        HWOI,
    ),
    "gradient_of_input_depthwise": (
        gradient_of_input((2, 8, 7, 6), feature_group_count=6),
        WIDE,
        X6,
        ((2,), (0, 1), (3,)),
    ),
}


def with_gradients(fun):
    """The value, and the gradients of the sum of its sine in all arguments."""

    def total(*args):
        y = fun(*args)
        return jnp.sin(y).sum(), y

    return lambda *args: jax.grad(total, tuple(range(len(args))), has_aux=True)(*args)


CASES = [(name, lora.LoRA(2)) for name in PROGRAMS]
CASES += [(name, lora.LoRA(1)) for name in ("nhwc", "one_by_one", "grouped", "depthwise", "vmap_of_both", "tied")]
CASES += [(name, lora.LoKr(1)) for name in ("nchw", "one_dimension", "grouped", "vmap_of_both_depthwise", "stacked")]


@pytest.mark.parametrize(("name", "variant"), CASES, ids=[f"{name}-{type(v).__name__}-{v.rank}" for name, v in CASES])
def test_lifted_equals_merged(name, variant):
    fun, kernel, x, axes = PROGRAMS[name]
    params = {"w": kernel}

    def model(params, x):
        return fun(params["w"], x)

    sites = lora.sites(model, params, x)
    assert (sites["w"].kind, sites["w"].batch_axes, sites["w"].in_axes, sites["w"].out_axes) == ("conv", *axes)
    frozen, lora_params = split_at_random(params, {"w": variant}, sites=sites)
    lifted = with_gradients(lambda lp, x: lora.lift(model)(lora.attach(frozen, lp), x))
    merged = with_gradients(lambda lp, x: model(lora.merge(frozen, lp), x))
    traced = jax.jit(lifted).trace(lora_params, x)
    assert error(traced.lower().compile()(lora_params, x), in_numpy(merged)(lora_params, x)) < 1e-5
    assert formed(traced.jaxpr, lora_params) == []


H, V, IN, OUT = (Axis(str(d), size) for d, size in enumerate((3, 2, 4, 6)))
IN0, IN1, OUT0, OUT1 = *IN.split(2), *OUT.split(3)
R, S = Axis("rank", 3), Axis("other rank", 5)

# name: the axes of each operand of a network over W's axes
NETWORKS = {
    "factors": [(H, V, IN, R), (R, OUT)],
    "between_the_factors": [(H, V, IN, R), (R,), (R, OUT), (OUT,)],
    "element_by_element": [(H, V, IN, R), (R, OUT), (H, V, IN, S), (S, OUT)],
    "small_core": [(IN, R), (H, V, R, S), (S, OUT)],
    "window_among_the_outputs": [(IN, R), (R, H, V, OUT)],
    "window_apart": [(H, V, R), (IN, R), (R, OUT)],
    "kronecker": [(IN0, OUT0), (H, V, IN1, OUT1)],
    "kronecker_low_rank": [(IN0, OUT0), (H, V, IN1, R), (R, OUT1)],
    "outputs_alone": [(OUT,)],
    "inputs_alone": [(IN,)],
    "window_alone": [(H, V)],
    "one_side_of_the_window": [(V, IN, R), (R, OUT)],
    "no_window": [(IN, R), (R, OUT)],
    "no_inputs": [(H, R), (R, OUT)],
    "a_number": [()],
    "a_number_times_factors": [(), (H, V, IN, R), (R, OUT)],
}
# name: function of (kernel like W, x), x
USES = {
    "forward": (lambda w, x: conv(x, w, (2, 1)), X),
    "backward": (gradient_of_input((2, 8, 7, 4), strides=(2, 1)), normal(2, 4, 7, 6)),
    "groups": (lambda w, x: conv(x, w, feature_group_count=3), normal(2, 8, 7, 12)),
    "three_groups_backward": (gradient_of_input((2, 8, 7, 12), feature_group_count=3), X6),
    "batch_groups": (lambda w, x: conv(x, w, batch_group_count=6), normal(12, 8, 7, 4)),
    "channels_of_two_axes": (
        lambda w, x: conv(x, w.reshape(3, 2, 2, 2, 3, 2)[:, :, 0].reshape(3, 2, 2, 6)),
        X[..., :2],
    ),
}


def assert_lifted_equals_merged(fun, value, x):
    """The same of a value whose networks are made by hand, for every array in it but the base."""
    base, operands = value.base.operands[0], [value.base.operands[1:], *(delta.operands for delta in value.deltas)]

    def attached(operands):
        scales, *deltas = operands
        networks = [Network(new, delta.axes, delta.scale) for new, delta in zip(deltas, value.deltas, strict=True)]
        return Factored(
            Network((base, *scales), value.base.axes), tuple(networks), value.dims, value.dtype, value.paths
        )

    lifted = with_gradients(lambda operands, x: lora.lift(fun)(attached(operands), x))
    merged = with_gradients(lambda operands, x: fun(materialize(attached(operands)), x))
    traced = jax.jit(lifted).trace(operands, x)
    found, expected = traced.lower().compile()(operands, x), in_numpy(merged)(operands, x)
    assert error(found, expected) < 1e-4  # of a number, it is that of a long sum
    kernel = lora.Adapter({}, lora.LoRA(1), Site(W.shape, "conv", (), (0, 1, 2), (3,)))
    assert formed(traced.jaxpr, {"w": kernel}) == []


def drawn(named):
    """A network of random operands over these axes."""
    shapes = [tuple(axis.size for axis in axes) for axes in named]
    return Network(tuple(normal(*shape, seed=i) for i, shape in enumerate(shapes)), tuple(named), 0.5)


def weight(names):
    """W plus networks, at once: the gradients of the operands of each are compared."""
    value, named = Factored.of(W, "w"), [NETWORKS[name] for name in names]
    for axis in (IN, OUT) if IN0 in [axis for network in named for axes in network for axis in axes] else ():
        value = value.split(axis, axis.size // 2)
    return functools.reduce(Factored.add, map(drawn, named), value)


KRONECKER = [name for name in NETWORKS if "kronecker" in name]
OTHERS = [name for name in NETWORKS if name not in KRONECKER]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("networks", [OTHERS, KRONECKER], ids=["others", "kronecker"])
def test_any_network(networks, use):
    assert_lifted_equals_merged(USES[use][0], weight(networks), USES[use][1])


@pytest.mark.parametrize("use", ["forward", "three_groups_backward"])
def test_a_weight_and_its_network_scaled(use):
    """As a magnitude for each output does: the base too is more than one array then, and not formed."""
    value = weight(["factors"])
    for axes in ((OUT,), (IN,), ()):
        value = value.times(*drawn([axes]).operands, axes)
    assert_lifted_equals_merged(USES[use][0], value, USES[use][1])


def test_a_kernel_that_trains():
    trained = Factored.of(W, "w").add(drawn([(H, V, IN, OUT)]))
    fun, x = USES["groups"]
    assert error(lora.lift(fun)(trained, x), fun(materialize(trained), x)) < 1e-5


def cost_of_step(loss, params, lora_params, x):
    """The FLOPs of a training step that computes the gradient of x too, as every layer but the first does."""
    return flops(jax.value_and_grad(lambda lp, x: lora.lift(loss)(lora.attach(params, lp), x), (0, 1)), lora_params, x)


@pytest.mark.parametrize(("strides", "options"), [((1, 1), {}), ((2, 2), {}), ((1, 1), {"feature_group_count": 4})])
def test_flops_are_the_closed_form(strides, options):
    """Forward with the base, and its gradient of x: 4nkcd, for n positions, a window of k, c channels in and d out, as
    each output sees k·c inputs. With the factors 6n(kcr + rd): forward, and the gradients of both sides.

    With groups c is the inputs of one group, and A is applied to each group: 6n(kcrg + rd).
    """
    groups, channels, out, rank = options.get("feature_group_count", 1), 32, 64, 8
    x, w = jnp.ones((4, 34, 34, channels)), jnp.ones((3, 3, channels // groups, out))

    def loss(params, x):
        return conv(x, params["w"], strides, "VALID", **options).sum()

    frozen, lora_params = lora.split(
        jax.random.key(0), {"w": w}, {"w": lora.LoRA(rank)}, sites=lora.sites(loss, {"w": w}, x)
    )
    n, seen = 4 * (32 // strides[0]) ** 2, 9 * channels // groups
    expected = 4 * n * seen * out + 6 * n * (seen * rank * groups + rank * out)
    assert cost_of_step(loss, frozen, lora_params, x) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("groups", [1, 2])
def test_half_precision_stays(groups):
    """No product is computed in float32, forward or backward."""

    def model(params, x):
        return conv(x, params["w"].astype(jnp.bfloat16), feature_group_count=groups)

    params, x = {"w": normal(3, 2, 4 // groups, 6)}, X.astype(jnp.bfloat16)
    frozen, lora_params = split_at_random(params, {"w": lora.LoRA(2)}, sites=lora.sites(model, params, x))
    step = with_gradients(lambda lp, x: lora.lift(model)(lora.attach(frozen, lp), x))
    products = ("conv_general_dilated", "dot_general")
    made = [eqn for eqn in equations(jax.make_jaxpr(step)(lora_params, x)) if eqn.primitive.name in products]
    assert {eqn.outvars[0].aval.dtype for eqn in made} == {jnp.dtype("bfloat16")}
    expected = jax.jit(with_gradients(lambda lp, x: model(lora.merge(frozen, lp), x)))(lora_params, x)
    assert error(jax.jit(step)(lora_params, x), expected) < 3e-2


PER_TAP = [(H, V, IN, R), (H, V, R, OUT)]
ERRORS = {
    "as_the_image": (lambda w, x: conv(w, x, numbers=("HWNC", "HWIO", "NHWC")), [(R,)], normal(2, 2, 6, 3)),
    "groups_across_axes": (
        lambda w, x: conv(x, w.transpose(0, 1, 3, 2).reshape(3, 2, 1, 24), feature_group_count=4),
        [(R,)],
        X,
    ),
    "factors_for_each_tap": (lambda w, x: conv(x, w), PER_TAP, X),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_needs_the_whole_kernel_says_so(name):
    fun, network, x = ERRORS[name]
    value = Factored.of(W, "w").add(drawn(network))
    with pytest.raises(lora.MaterializeError, match=r"'w' \(.*\) reaches 'conv_general_dilated' at test_conv.py:\d+"):
        lora.lift(fun)(value, x)
    found = lora.lift(fun, materialize="allow")(value, x)
    assert error(found, fun(materialize(value), x)) < 1e-5
