"""Rules made from data: EVA, CorDA and LoRA-GA on a plain network, beside PEFT, and where they do not apply."""

from __future__ import annotations

import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import all_adaptable, error, normal
from jax import lax
from zoo import ZOO

import lora_jax as lora
from lora_jax.matrices import to_matrices

PEFT = np.load(Path(__file__).parent / "fixtures" / "initial_peft.npz")  # how: make_initial_reference.py
WEIGHTS = {f"w{i}": jnp.asarray(PEFT[f"w{i}"]) for i in range(4)}
VARIANT = lora.LoRA(rank=3, alpha=6)
RULES = {"w.": VARIANT}
KEY = jax.random.key(0)


def network(params, x):
    for i in range(4):
        x = jnp.tanh(x @ params[f"w{i}"])
    return x


def delta(lora_params, path):
    adapter = lora_params[path]
    return lora.merge({path: jnp.zeros(adapter.site.shape)}, {path: adapter})[path]


@pytest.mark.parametrize("rho", [1, 2])
def test_eva_begins_as_in_peft(rho):
    """The same ranks, the same directions (but for their signs), and the same scale."""
    rules = lora.eva(network, WEIGHTS, [PEFT["x"]], RULES, rho=rho)
    frozen, lora_params = lora.split(KEY, WEIGHTS, rules)
    assert all(frozen[path] is WEIGHTS[path] for path in WEIGHTS)
    for i, path in enumerate(WEIGHTS):
        expected, adapter = PEFT[f"eva_{rho}_{i}"], lora_params[path]
        assert adapter.variant.rank == expected.shape[1]
        assert adapter.variant.scale == pytest.approx(2.0)
        assert adapter.variant.init == "eva"
        assert not adapter.factors["B"].any()
        # PEFT's decomposition is an approximate one, by four rounds of iteration.
        assert error(jnp.abs(adapter.factors["A"].T @ expected), jnp.eye(expected.shape[1])) < 1e-2
    assert sum(adapter.variant.rank for adapter in lora_params.values()) == 4 * 3


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_begins_as_in_peft(mode):
    rules = lora.corda(network, WEIGHTS, [PEFT["x"]], RULES, mode=mode)
    frozen, lora_params = lora.split(KEY, WEIGHTS, rules)
    for i, path in enumerate(WEIGHTS):
        assert error(delta(lora_params, path), PEFT[f"{mode}_{i}"]) < 1e-3
        a, b = lora_params[path].factors["A"], lora_params[path].factors["B"]
        assert error(frozen[path] + 2 * a @ b, WEIGHTS[path]) < 1e-6


def test_batches_add_up():
    batches = jnp.split(PEFT["x"], 4)
    rules = [lora.eva(network, WEIGHTS, data, RULES) for data in ([PEFT["x"]], iter(batches))]
    one, several = (lora.split(KEY, WEIGHTS, rule)[1] for rule in rules)
    assert jax.tree.structure(one) == jax.tree.structure(several)
    assert error(jax.tree.map(jnp.abs, several), jax.tree.map(jnp.abs, one)) < 1e-3


def test_eva_of_a_stack_has_one_rank_and_directions_for_each_layer():
    stack = normal(3, 24, 24, seed=1, scale=0.2)
    params = {"stack": stack, "head": normal(24, 4, seed=2)}

    def scanned(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0] @ params["head"]

    def unrolled(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params[f"layer{i}"])
        return x @ params["head"]

    x, variant = PEFT["x"], lora.LoRA(rank=3)
    sites = lora.sites(scanned, params, x)
    _, together = lora.split(KEY, params, lora.eva(scanned, params, [x], {".*": variant}, sites=sites), sites=sites)
    rank = together["stack"].variant.rank
    assert 3 * rank + together["head"].variant.rank <= 3 * 3 + 3
    assert 3 * (rank + 1) + together["head"].variant.rank > 3 * 3 + 3

    apart = {**{f"layer{i}": layer for i, layer in enumerate(stack)}, "head": params["head"]}
    rules = lora.eva(unrolled, apart, [x], {".*": lora.LoRA(rank=rank)}, rho=1)
    _, alone = lora.split(KEY, apart, rules)
    found = jnp.abs(jnp.stack([alone[f"layer{i}"].factors["A"] for i in range(3)]))
    assert error(jnp.abs(together["stack"].factors["A"]), found) < 1e-3


def test_a_leaf_that_explains_least_is_left_out():
    """Inputs of two dimensions beside inputs of many; and what is under another variant stays as ruled."""
    params = {"few": normal(12, 8), "many": normal(12, 8, seed=1), "bias": jnp.zeros(8)}
    few, many = normal(64, 12, seed=2).at[:, 2:].set(0.0), normal(64, 12, seed=3)

    def model(params, inputs):
        return inputs[0] @ params["few"] + inputs[1] @ params["many"] + params["bias"]

    rules = {"few|many": lora.LoRA(rank=1, alpha=2, scaling="rank_stabilized"), "bias": lora.Full()}
    _, lora_params = lora.split(KEY, params, lora.eva(model, params, [(few, many)], rules))
    assert {*lora_params} == {"few", "bias"}
    assert (lora_params["few"].variant.rank, lora_params["few"].variant.scale) == (2, pytest.approx(2.0))
    assert not jnp.abs(lora_params["few"].factors["A"][2:] > 1e-6).any()
    assert type(lora_params["bias"].variant) is lora.Full


def cross_entropy(params, batch):
    x, y = batch
    logits = network(params, x) * 3
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, y[:, None], 1)[:, 0])


LABELS = np.random.default_rng(0).integers(8, size=64, dtype=np.int32)
BATCH = jnp.asarray(PEFT["x"]), LABELS


def test_lora_ga_s_first_step_is_the_best_that_twice_its_rank_can_do():
    rules = lora.lora_ga(cross_entropy, WEIGHTS, [BATCH], RULES, gamma=64)
    frozen, lora_params = lora.split(KEY, WEIGHTS, rules)
    for path in WEIGHTS:
        a, b = lora_params[path].factors["A"], lora_params[path].factors["B"]
        assert error(frozen[path] + 2 * a @ b, WEIGHTS[path]) < 1e-6
    full = jax.jit(jax.grad(cross_entropy))(WEIGHTS, BATCH)
    grads = jax.jit(jax.grad(lambda lp: lora.lift(cross_entropy)(lora.attach(frozen, lp), BATCH)))(lora_params)
    for path, grad in full.items():
        a, b = lora_params[path].factors["A"], lora_params[path].factors["B"]
        da, db = grads[path].factors["A"], grads[path].factors["B"]
        u, s, vt = np.linalg.svd(np.asarray(grad, np.float64), full_matrices=False)
        c_squared = grad.shape[1] ** 0.5 / 64
        moved = 2 * (da @ b + a @ db) / (4 * c_squared)
        assert error(moved, (u[:, :6] * s[:6]) @ vt[:6]) < 1e-4


def test_lora_ga_averages_over_batches():
    x, y = BATCH
    halves = [(x[:32], y[:32]), (x[32:], y[32:])]
    found, expected = (
        lora.split(KEY, WEIGHTS, lora.lora_ga(cross_entropy, WEIGHTS, data, RULES))[1] for data in (halves, [BATCH])
    )
    assert error([delta(found, p) for p in WEIGHTS], [delta(expected, p) for p in WEIGHTS]) < 1e-3


@pytest.mark.parametrize(("model", "method"), [("by_hand", "lora_ga"), ("linen", "eva"), ("equinox", "corda")])
def test_a_function_starts_as_it_is(model, method):
    """Stacked, tied, transposed and embedded leaves; leaves that are functions."""
    loss, params, batch = ZOO[model]()
    sites = lora.sites(loss, params, *batch)
    wanted = all_adaptable(lora.LoRA(rank=2, alpha=4))
    rules = wanted if method == "lora_ga" else lambda path, site: wanted(path, site) if site.kind == "linear" else None
    made = getattr(lora, method)(loss, params, batch, rules, sites=sites)
    frozen, lora_params = lora.split(jax.random.key(3), params, made, sites=sites)
    assert {adapter.variant.init for adapter in lora_params.values()} == {method}
    found = jax.jit(lambda lp: lora.lift(loss)(lora.attach(frozen, lp), *batch))(lora_params)
    assert float(found) == pytest.approx(float(eqx.filter_jit(loss)(params, *batch)), rel=1e-5)


def test_corda_s_parts_are_of_a_stack_s_own_layers():
    stack = normal(2, 24, 24, seed=1, scale=0.2)

    def unrolled(params, x):
        for layer in params["w"]:
            x = jnp.tanh(x @ layer)
        return x

    sites = lora.sites(unrolled, {"w": stack}, PEFT["x"])
    rules = lora.corda(unrolled, {"w": stack}, [PEFT["x"]], {"w": lora.LoRA(rank=4)}, sites=sites)
    _, lora_params = lora.split(KEY, {"w": stack}, rules, sites=sites)
    found = to_matrices(delta(lora_params, "w"), lora_params["w"].site)
    x = np.asarray(PEFT["x"], np.float64)
    for layer, part in zip(np.asarray(stack, np.float64), found, strict=True):
        c = x.T @ x
        c += 0.01 * np.diag(c).mean() * np.eye(24)
        u, s, vt = np.linalg.svd(c @ layer)
        assert error(part, np.linalg.inv(c) @ (u[:, :4] * s[:4]) @ vt[:4]) < 1e-3
        x = np.tanh(x @ layer)


def embedded(params, tokens):
    return params["embed"][tokens] @ params["w"]


EMBEDDED = {"embed": normal(9, 6), "w": normal(6, 4)}


@pytest.mark.parametrize("method", [lora.eva, lora.corda])
def test_what_has_no_inputs_is_refused(method):
    tokens = jnp.arange(5)
    sites = lora.sites(embedded, EMBEDDED, tokens)
    with pytest.raises(ValueError, match=r"'embed' \(9, 6\) is embedding"):
        method(embedded, EMBEDDED, [tokens], {".*": lora.LoRA(rank=2)}, sites=sites)
    frozen, lora_params = lora.split(
        KEY, EMBEDDED, method(embedded, EMBEDDED, [tokens], {"w": lora.LoRA(rank=2)}, sites=sites), sites=sites
    )
    assert list(lora_params) == ["w"]


def stopped(params, x):
    return lax.stop_gradient(x @ params["w0"]) @ params["w1"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lora.eva(stopped, WEIGHTS, [PEFT["x"]], {"w0": VARIANT}), "'w0' has no input that could be captured"),
        (lambda: lora.corda(stopped, WEIGHTS, [PEFT["x"]], {"w0": VARIANT}), "'w0' has no input"),
        (
            lambda: lora.eva(network, WEIGHTS, [jnp.full((2, 24), jnp.nan)], RULES),
            "'w0' has inputs that are not finite",
        ),
        (lambda: lora.eva(network, WEIGHTS, [], RULES), "no batches"),
        (lambda: lora.eva(network, WEIGHTS, [PEFT["x"]], {"w9": VARIANT}), "matches no path"),
        (lambda: lora.eva(network, WEIGHTS, [PEFT["x"]], {"w0": lora.Full()}), "LoRA to no leaf"),
        (lambda: lora.eva(network, WEIGHTS, [PEFT["x"]], RULES, rho=0.5), "1 or more"),
        (lambda: lora.eva(network, jax.eval_shape(lambda: WEIGHTS), [PEFT["x"]], RULES), "'w0' has no values"),
        (lambda: lora.corda(network, WEIGHTS, [PEFT["x"]], RULES, mode="abc"), "'ipm' or 'kpm'"),
        (lambda: lora.corda(network, WEIGHTS, [PEFT["x"]], RULES, damping=0.0), "above 0"),
        (lambda: lora.lora_ga(cross_entropy, WEIGHTS, [BATCH], {"w3": lora.LoRA(rank=5)}), "'w3'.*no more than 8"),
        (lambda: lora.lora_ga(cross_entropy, WEIGHTS, [BATCH], RULES, gamma=0.0), "above 0"),
        (
            lambda: lora.lora_ga(lambda p, x: jnp.sum(stopped(p, x)), WEIGHTS, [PEFT["x"]], {"w0": VARIANT}),
            "is zero or",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rules_are_for_the_tree_that_they_were_made_for():
    rules = lora.eva(network, WEIGHTS, [PEFT["x"]], RULES)
    wider = {**WEIGHTS, "w0": normal(25, 32)}
    with pytest.raises(ValueError, match=r"'w0'.*init='eva'.*\(24, "):
        lora.split(KEY, wider, rules)


def test_an_adapter_holds_no_data():
    """What the rules hold goes with the rules: the variant in an adapter knows a name alone."""
    makers = functools.partial(lora.eva, network), functools.partial(lora.corda, network)
    for maker in makers:
        _, lora_params = lora.split(KEY, WEIGHTS, maker(WEIGHTS, [PEFT["x"]], RULES))
        assert all(isinstance(adapter.variant.init, str) for adapter in lora_params.values())


def test_other_variants_keep_a_convolution_s_window():
    """LoKr splits the channels alone, also where a rule made of a rule, or the user, gives the axes."""
    params, x = {"k": normal(3, 3, 4, 8), "w": normal(8, 5)}, normal(2, 6, 6, 4)

    def model(params, x):
        x = lax.conv_general_dilated(x, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x.mean((1, 2)) @ params["w"]

    sites = lora.sites(model, params, x)
    rules = {"k": lora.LoKr(2), "w": VARIANT}
    placed = {**rules, "k": lora.LoKr(2).at(in_axes=(0, 1, 2), out_axes=-1)}
    expected = lora.split(KEY, params, rules, sites=sites)[1]["k"]
    for given in (placed, lora.eva(model, params, [x], rules, sites=sites)):
        found = lora.split(KEY, params, given, sites=sites)[1]["k"]
        assert found.site == expected.site
        assert jax.tree.map(jnp.shape, found.factors) == jax.tree.map(jnp.shape, expected.factors)
