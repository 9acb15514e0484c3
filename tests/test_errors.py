"""What is wrong is said: the path, the cause, the remedy."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

KEY = jax.random.key(0)
PARAMS = {
    "dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)},
    "heads": {"kernel": jnp.ones((6, 2, 3))},
    "steps": jnp.zeros((3, 3), jnp.int32),
}
RANK_2 = lora.LoRA(rank=2)


def model(params, x):
    return x @ params["dense"]["kernel"] + params["dense"]["bias"]


def adapted(params=PARAMS, rules=None):
    return lora.split(KEY, params, rules or {"dense/kernel": RANK_2})


SPLIT = {
    "nothing matches, a close name": (
        {"dense/kernl": RANK_2},
        r"'dense/kernl' matches no path \(a rule matches whole paths\); close matches: dense/kernel",
    ),
    "a part matches": ({"kernel": RANK_2}, r"'kernel' matches no path .*part of 'dense/kernel': try '\.\*kernel\.\*'"),
    "nothing is near": ({"xyzzy": RANK_2}, r"'xyzzy' matches no path .*the paths are dense/bias, dense/kernel"),
    "shadowed": (
        {".*/kernel": None, "dense/kernel": RANK_2},
        r"'dense/kernel' matches 'dense/kernel', but '\.\*/kernel' comes first",
    ),
    "not a regular expression": ({"(": RANK_2}, r"'\(' is no regular expression"),
    "not a variant": ({"dense/kernel": 8}, r"rule for 'dense/kernel' gives 8, which is no variant"),
    "no axes": (
        {"heads/kernel": RANK_2},
        r"'heads/kernel' has shape \(6, 2, 3\), and only a matrix is \(in, out\) by itself: pass sites=.*in_axes",
    ),
    "a vector": ({"dense/bias": RANK_2}, r"'dense/bias' has shape \(4,\)"),
    "incomplete axes": (
        {"heads/kernel": RANK_2.at(in_axes=0, out_axes=1)},
        r"'heads/kernel' has shape \(6, 2, 3\), but the rule's axes are batch \(\), in \(0,\), out \(1,\)",
    ),
    "rank above": ({"dense/kernel": lora.LoRA(rank=5)}, r"'dense/kernel' \(6, 4\) .*rank 5 is above 4"),
    "integers": ({"steps": RANK_2}, r"'steps' is int32\[3, 3\], and only floating-point leaves train"),
    "unknown init": ({"dense/kernel": lora.LoRA(rank=2, init="zero")}, r"init='zero' is none of normal, uniform"),
    "an init of another shape": (
        {"dense/kernel": lora.LoRA(rank=2, init=lambda key, shape, dtype: jnp.ones(3))},
        r"'dense/kernel' .*init returned an array of shape \(3,\) for A, which is \(6, 2\)",
    ),
    "a variant alone": (RANK_2, r"rules are a mapping from pattern to variant, or a callable \(path, site\), not LoRA"),
    "a compiled pattern": ({re.compile("kernel"): RANK_2}, r"matches a part of 'dense/kernel': try '\.\*kernel\.\*'"),
    "nothing adapted": (lambda path, site: None, r"adapt no leaf, so nothing would train"),
}


@pytest.mark.parametrize("case", SPLIT)
def test_split_refuses(case):
    rules, message = SPLIT[case]
    with pytest.raises(ValueError, match=message):
        lora.split(KEY, PARAMS, rules)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank is a whole number, 1 or more"),
        ({"rank": 1.5}, "rank is a whole number, 1 or more"),
        ({"rank": 2, "alpha": 0}, "alpha is a finite number other than 0"),
        ({"rank": 2, "alpha": float("nan")}, "alpha is a finite number other than 0"),
        ({"rank": 2, "scaling": "rslora"}, "scaling is 'standard' or 'rank_stabilized'"),
    ],
)
def test_a_variant_that_makes_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        lora.LoRA(**fields)


def test_a_target_the_function_does_not_read():
    sites = lora.sites(model, PARAMS, jnp.ones((1, 6)))
    assert sites["heads/kernel"].kind == "unused"
    with pytest.raises(ValueError, match=r"'heads/kernel': the traced function does not read it"):
        lora.split(KEY, PARAMS, {"heads/kernel": RANK_2}, sites=sites)
    frozen, lora_params = adapted(rules={"heads/kernel": RANK_2.at(in_axes=0, out_axes=(1, 2))})
    attached = lora.attach(frozen, lora_params)
    with pytest.raises(lora.UnusedError, match=r"does not read 'heads/kernel', so the factors there would not train"):
        lora.lift(model)(attached, jnp.ones((1, 6)))
    assert lora.lift(model, unused="allow")(attached, jnp.ones((1, 6))).shape == (1, 4)


def test_a_target_used_whole():
    sites = lora.sites(model, PARAMS, jnp.ones((1, 6)))
    with pytest.raises(
        ValueError, match=r"'dense/bias' \(4,\) is used whole, by 'add' at test_errors.py:\d+ \(model\)"
    ):
        lora.split(KEY, PARAMS, {"dense/bias": RANK_2}, sites=sites)


def test_sites_of_another_tree():
    sites = lora.sites(model, PARAMS, jnp.ones((1, 6)))
    with pytest.raises(ValueError, match=r"'kernel' has shape \(6, 4\), but sites has nothing there"):
        lora.split(KEY, PARAMS["dense"], {"kernel": RANK_2}, sites=sites)


def test_the_same_path_twice():
    with pytest.raises(ValueError, match="same path 'a/b'"):
        lora.split(KEY, {"a": {"b": jnp.ones((2, 2))}, "a/b": jnp.ones((2, 2))}, {"a/b": RANK_2})


def test_a_shape_that_no_longer_fits():
    _, lora_params = adapted()
    with pytest.raises(ValueError, match=r"'dense/kernel': .*shape \(6, 4\), but the tree has \(6, 5\) there"):
        lora.attach({"dense": {"kernel": jnp.ones((6, 5))}}, lora_params)


def test_a_factor_of_another_shape():
    frozen, lora_params = adapted()
    stacked = jax.tree.map(lambda x: x[None], lora_params)
    with pytest.raises(ValueError, match=r"'dense/kernel' .*factor of shape \(1, 6, 2\) does not fit"):
        lora.attach(frozen, stacked)


def test_adapters_of_another_model():
    _, lora_params = adapted()
    with pytest.raises(ValueError, match=r"'dense/kernel' first: .*another model; close matches: Dense_0/kernel"):
        lora.merge({"Dense_0": {"kernel": jnp.ones((6, 4))}}, lora_params)


def test_adapters_that_are_none():
    with pytest.raises(ValueError, match="lora_params has 3 at 'dense/kernel', which is no Adapter"):
        lora.attach(PARAMS, {"dense/kernel": 3})


def test_a_plan_cannot_be_copied():
    with pytest.raises(ValueError, match=r"'w' .*Full copies the leaf, and this one has no values"):
        lora.split(KEY, {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, {"w": lora.Full()})


def test_splitting_what_is_attached():
    with pytest.raises(ValueError, match="'dense/kernel' is attached already: use the frozen tree, or merge first"):
        lora.split(KEY, lora.attach(*adapted()), {"dense/kernel": RANK_2})


def test_attached_twice():
    frozen, lora_params = adapted()
    with pytest.raises(ValueError, match="'dense/kernel' is attached already"):
        lora.attach(lora.attach(frozen, lora_params), lora_params)


@pytest.mark.parametrize("name", ["A", "B"])
def test_nan_at_merge(name):
    frozen, lora_params = adapted()
    factors = dict(lora_params["dense/kernel"].factors)
    factors[name] = factors[name].at[0, 0].set(jnp.nan)
    broken = {"dense/kernel": lora.Adapter(factors, RANK_2, lora_params["dense/kernel"].site)}
    before = np.asarray(frozen["dense"]["kernel"])
    with pytest.raises(
        ValueError, match=r"'dense/kernel': \d+ of 24 merged weights are not finite, because the factors"
    ):
        lora.merge(frozen, broken)
    np.testing.assert_array_equal(frozen["dense"]["kernel"], before)


def test_infinity_in_the_base():
    frozen, lora_params = adapted()
    frozen["dense"]["kernel"] = frozen["dense"]["kernel"].at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match=r"'dense/kernel': 1 of 24 .* because the base is not"):
        lora.merge(frozen, lora_params)


def test_unmerging_what_was_replaced():
    frozen, lora_params = adapted(rules={"dense/bias": lora.Full()})
    with pytest.raises(ValueError, match="'dense/bias': merging Full loses the leaf's own value"):
        lora.unmerge(lora.merge(frozen, lora_params), lora_params)


def test_a_primitive_that_needs_the_whole_matrix():
    frozen, lora_params = adapted()
    attached = lora.attach(frozen, lora_params)

    def sorted_weights(params):
        return jnp.sort(params["dense"]["kernel"])

    message = (
        r"'dense/kernel' \(6, 4\) reaches 'sort' at test_errors.py:\d+ \(.*sorted_weights\), .*materialize=\"allow\""
    )
    with pytest.raises(lora.MaterializeError, match=message):
        lora.lift(sorted_weights)(attached)
    allowed = lora.lift(sorted_weights, materialize="allow")(attached)
    np.testing.assert_array_equal(allowed, sorted_weights(lora.merge(frozen, lora_params)))


def test_an_option_that_lift_does_not_have():
    with pytest.raises(ValueError, match="materialize='yes' is neither 'error' nor 'allow'"):
        lora.lift(model, materialize="yes")


OUTSIDE = {
    "jnp": lambda w: jnp.sum(w),
    "product": lambda w: jnp.ones((1, 6)) @ w,
    "sum": lambda w: w + 1.0,
    "numpy": lambda w: np.asarray(w),
    "index": lambda w: w[0],
    "method": lambda w: w.astype(jnp.bfloat16),
    "transpose": lambda w: w.T,
    "closed over": lambda w: lora.lift(lambda x: x @ w)(jnp.ones((1, 6))),
    "jit": lambda w: jax.jit(lambda w: jnp.sin(w))(w),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_factored_leaf_outside_lift(case):
    kernel = lora.attach(*adapted())["dense"]["kernel"]
    with pytest.raises(lora.FactoredError, match=r"'dense/kernel' \(6, 4\) holds W and ΔW apart and is no array: pass"):
        OUTSIDE[case](kernel)


def test_an_optimizer_without_adapters():
    import optax

    with pytest.raises(ValueError, match="holds no Adapter, so nothing would train"):
        lora.optimizer(optax.sgd(0.1)).init(PARAMS)
    _, lora_params = adapted()
    with pytest.raises(ValueError, match="the label 'frozen' is that of what does not train"):
        lora.optimizer({"frozen": optax.sgd(0.1)})
    with pytest.raises(ValueError, match=r"LoRA has factors labelled \['B'\], for which there is no transform among"):
        lora.optimizer({"A": optax.sgd(0.1)}).init(lora_params)


def test_a_variant_that_is_not_whole():
    class Halfway(lora.Variant):
        def labels(self):
            return {}

    del lora.Variant.registry["Halfway"]
    with pytest.raises(TypeError, match=r"abstract class Halfway .*delta.*initial"):
        Halfway()
