"""The laws, for every model of the zoo and every variant."""

from __future__ import annotations

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import all_adaptable, error, formed, randomized
from in_numpy import in_numpy
from zoo import ZOO, kinds

import lora_jax as lora
from lora_jax.factors import together

pytestmark = pytest.mark.standard_promotion

VARIANTS = {
    "LoRA": lora.LoRA(rank=2, alpha=4),
    "rank_stabilized": lora.LoRA(rank=3, alpha=2, scaling="rank_stabilized", init="uniform"),
    "rank_1": lora.LoRA(rank=1),
    "DoRA": lora.DoRA(rank=2, alpha=4),
    "DoRA_rank_stabilized": lora.DoRA(rank=3, scaling="rank_stabilized"),
    "IA3": lora.IA3(),
    "IA3_in": lora.IA3(side="in"),
    "VeRA": lora.VeRA(rank=6),
    "LoHa": lora.LoHa(rank=2, alpha=3),
    "LoKr": lora.LoKr(rank=2, alpha=3, decompose_both=True),
    "LoKr_whole": lora.LoKr(rank=6),
    "AdaLoRA": lora.AdaLoRA(rank=2, alpha=3),
    "LoRAFA": lora.LoRAFA(rank=2),
    "LoRAXS": lora.LoRAXS(rank=3, alpha=4),
}
FLOAT32 = [name for name in ZOO if name != "bfloat16"]
MODELS = {**ZOO, "kinds": kinds}
# Every model with one variant, every variant with leaves of all kinds, and those whose leaves have something in common,
# or that are not base + ΔW, with the model that uses its weights in most ways.
CASES = [(model, "LoRA") for model in ZOO] + [("kinds", variant) for variant in VARIANTS]
CASES += [("by_hand", "DoRA"), ("by_hand", "VeRA"), ("by_hand", "IA3"), ("linen", "DoRA")]
# Where ΔW is a product of more factors, they are drawn larger.
SCALES = {"VeRA": 0.5, "LoHa": 0.4, "AdaLoRA": 0.2}


@functools.cache
def prepared(model: str, variant: str):
    loss, params, batch = MODELS[model]()
    sites = lora.sites(loss, params, *batch)
    frozen, lora_params = lora.split(jax.random.key(3), params, all_adaptable(VARIANTS[variant]), sites=sites)
    return loss, params, batch, frozen, lora_params


def lifted_loss(loss, frozen, batch):
    return lambda lora_params: lora.lift(loss)(lora.attach(frozen, lora_params), *batch)


@functools.cache
def lifted_step(model: str, variant: str):
    """From adapters to the loss and its gradient: compiled once for all laws."""
    loss, _, batch, frozen, _ = prepared(model, variant)
    return jax.jit(jax.value_and_grad(lifted_loss(loss, frozen, batch)))


def merged_step(model: str, variant: str):
    loss, _, batch, frozen, _ = prepared(model, variant)
    return jax.value_and_grad(lambda lp: loss(lora.merge(frozen, lp), *batch))


@functools.cache
def base_value(model: str) -> float:
    loss, params, batch = MODELS[model]()
    return float(jax.jit(lambda: loss(params, *batch))())


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_starts_at_the_base(model, variant):
    *_, lora_params = prepared(model, variant)
    found, grads = lifted_step(model, variant)(lora_params)
    assert float(found) == pytest.approx(base_value(model), rel=1e-6)
    for path, adapter in together(grads).items():
        labels = adapter.variant.labels()
        assert any(x.any() for name, x in adapter.factors.items() if labels[name] != "frozen"), path
        assert not any(x.any() for name, x in adapter.factors.items() if labels[name] == "frozen"), path


@pytest.mark.parametrize(("model", "variant"), [case for case in CASES if case[0] != "bfloat16"])
def test_lifted_equals_merged(model, variant):
    lora_params = randomized(prepared(model, variant)[-1], SCALES.get(variant, 0.1))
    expected = in_numpy(merged_step(model, variant))(lora_params)
    assert error(lifted_step(model, variant)(lora_params), expected) < 1e-5


def test_lifted_equals_merged_without_jit():
    loss, _, batch, frozen, lora_params = prepared("equinox", "LoRA")
    lora_params = randomized(lora_params)
    found = jax.value_and_grad(lifted_loss(loss, frozen, batch))(lora_params)
    assert error(found, in_numpy(merged_step("equinox", "LoRA"))(lora_params)) < 1e-5


@pytest.mark.parametrize("variant", ["LoRA", "DoRA"])
def test_bfloat16_is_as_exact_as_merging(variant):
    """On the average of several draws: of one, either may be the better."""
    _, _, batch, frozen, lora_params = prepared("bfloat16", variant)
    exact_loss, *_ = ZOO["linen"]()
    wide = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), frozen)
    exact = jax.jit(jax.grad(lambda lp: exact_loss(lora.merge(wide, lp), *batch)))
    errors, steps = [], (lifted_step("bfloat16", variant), jax.jit(merged_step("bfloat16", variant)))
    for seed in range(8):
        drawn = randomized(lora_params, seed=seed)
        (_, lifted), (_, merged) = (step(drawn) for step in steps)
        assert {x.dtype for x in jax.tree.leaves(lifted)} == {np.dtype("float32")}
        errors.append((error(lifted, exact(drawn)), error(merged, exact(drawn))))
    lifted, merged = np.mean(errors, axis=0)
    assert lifted < 1.5 * merged
    assert lifted < 0.1


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_no_weight_is_formed(model, variant):
    *_, lora_params = prepared(model, variant)
    assert formed(jax.make_jaxpr(lifted_step(model, variant))(lora_params), lora_params) == []
    # And the check would see it: merging in the step forms every one of them.
    merging = jax.make_jaxpr(merged_step(model, variant))(lora_params)
    assert len(formed(merging, lora_params)) >= 2 * len(lora_params)


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_unmerge_undoes_merge(model, variant):
    _, _, _, frozen, lora_params = prepared(model, variant)
    lora_params = randomized(lora_params, SCALES.get(variant, 0.1))
    merged = eqx.filter_jit(lora.merge)(frozen, lora_params)
    if not VARIANTS[variant].invertible:
        with pytest.raises(ValueError, match="cannot be undone"):
            lora.unmerge(merged, lora_params)
        return
    restored = eqx.filter_jit(lora.unmerge)(merged, lora_params)
    arrays, merged_arrays, base = (
        [x for x in jax.tree.leaves(t) if isinstance(x, jax.Array)] for t in (restored, merged, frozen)
    )
    assert error(merged_arrays, base) > 1e-2
    assert error(arrays, base) < 2 * float(jnp.finfo(base[0].dtype).eps)
    assert [x.dtype for x in arrays] == [x.dtype for x in base]


@pytest.mark.parametrize("model", ["linen", "by_hand", "equinox"])
def test_a_step_compiles_once_and_adapters_swap(model):
    loss, _, batch, frozen, lora_params = prepared(model, "LoRA")
    traces = []

    def counted(params, *batch):
        traces.append(1)
        return loss(params, *batch)

    tx = lora.optimizer(optax.adamw(1e-2))
    arrays, static = [x if isinstance(x, jax.Array) else None for x in jax.tree.leaves(frozen)], frozen

    @jax.jit
    def step(lora_params, state, arrays):
        leaves, treedef = jax.tree.flatten(static)
        frozen = jax.tree.unflatten(treedef, [a if s is None else s for a, s in zip(leaves, arrays, strict=True)])
        value, grads = jax.value_and_grad(lifted_loss(counted, frozen, batch))(lora_params)
        updates, state = tx.update(grads, state, lora_params)
        return optax.apply_updates(lora_params, updates), state, value

    state, losses, trained = tx.init(lora_params), [], lora_params
    for _ in range(10):
        trained, state, value = step(trained, state, arrays)
        losses.append(float(value))
    assert len(traces) == 1
    assert losses[-1] < losses[0]
    step(randomized(lora_params), state, arrays)
    assert len(traces) == 1


@pytest.mark.parametrize(("model", "variant"), [("linen", "LoRA")] + [("kinds", variant) for variant in VARIANTS])
def test_factors_depend_on_key_and_path_alone(model, variant):
    loss, params, batch, _, lora_params = prepared(model, variant)
    sites = lora.sites(loss, params, *batch)
    path = sorted(p for p, adapter in lora_params.items() if adapter.site.kind == "linear")[-1]
    alone = lora.split(jax.random.key(3), params, lambda p, _: VARIANTS[variant] if p == path else None, sites=sites)[1]
    assert error(alone[path].factors, lora_params[path].factors) == 0
    drawn = [np.asarray(a.factors["A"]).ravel()[:5].tolist() for a in lora_params.values() if "A" in a.factors]
    assert len({tuple(x) for x in drawn}) == len(drawn)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_and_loaded_is_the_same_bits(variant, tmp_path):
    lora_params = randomized(prepared("kinds", variant)[-1])
    loaded = lora.load(lora.save(tmp_path / "adapter", lora_params))
    chex.assert_trees_all_equal(loaded, lora_params)
    assert jax.tree.structure(loaded) == jax.tree.structure(lora_params)


@pytest.mark.parametrize("model", FLOAT32)
def test_full_is_training_the_leaves_themselves(model):
    """Laws 1 and 2 for Full, on leaves of any shape; by its nature it forms W, and `unmerge` refuses it."""
    loss, params, batch = ZOO[model]()
    sites = lora.sites(loss, params, *batch)
    rules = {".*": lora.Full()} if model != "equinox" else {".*(weight|bias)": lora.Full()}
    frozen, lora_params = lora.split(jax.random.key(0), params, rules, sites=sites)
    trained, treedef = lora.tree.flatten(params)
    plain = {path: trained[path] for path in lora_params}

    def whole(plain):
        return loss(lora.tree.unflatten(treedef, {**trained, **plain}), *batch)

    value, grads = jax.jit(jax.value_and_grad(lifted_loss(loss, frozen, batch)))(lora_params)
    expected, plain_grads = jax.jit(jax.value_and_grad(whole))(plain)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert error({path: adapter.factors["weight"] for path, adapter in grads.items()}, plain_grads) < 1e-5
    assert not lora.Full.invertible


@pytest.mark.parametrize("variant", VARIANTS)
def test_leaves_of_all_kinds_are_adapted_but_for_those_that_a_variant_refuses(variant):
    missing = {"LoKr": {"embed"}, "LoKr_whole": {"embed"}, "IA3_in": {"kernel"}}.get(variant, set())
    assert kinds()[1].keys() - prepared("kinds", variant)[-1].keys() - missing == set()
    assert not missing & prepared("kinds", variant)[-1].keys()


def test_every_variant_is_held_to_the_laws():
    assert {type(variant).__name__ for variant in VARIANTS.values()} | {"Full"} == {
        name for name, cls in lora.Variant.registry.items() if cls.__module__.startswith("lora_jax.")
    }
