"""A checkpoint merged tensor by tensor is what `lora_jax.merge` makes of the loaded model, in little memory."""

from __future__ import annotations

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import all_adaptable, split_at_random

import lora_jax as lora
from lora_jax import models, tree
from lora_jax.algebra.summed import summed
from lora_jax.formats import huggingface
from lora_jax.formats.huggingface import merging, rounding, tensors
from lora_jax.models import bert, gpt2, llama

IDS = jnp.array([[1, 5, 9, 2], [3, 3, 7, 0]])
SIZES = {"num_key_value_heads": 2, "max_position_embeddings": 16}
# Of the same shapes where they can be, as what runs leaf by leaf is compiled for each shape.
MODELS = {
    "llama": llama.Llama(llama.Config(40, 16, 2, 4, 24, **SIZES)),
    "tied": llama.Llama(llama.Config(40, 16, 2, 4, 24, **SIZES, tie_word_embeddings=True)),
    "gpt2": gpt2.GPT2(gpt2.Config(40, 16, 2, 4, 24, max_position_embeddings=16)),
    "bert": bert.Bert(bert.Config(40, 16, 2, 4, 24)),
}
VARIANTS = {
    "LoRA": lora.LoRA(2, alpha=7),
    "LoRAFA": lora.LoRAFA(2),
    "DoRA": lora.DoRA(2, alpha=3),
    "VeRA": lora.VeRA(5),
    "LoHa": lora.LoHa(2, alpha=3),
    "LoKr": lora.LoKr(2),
    "LoKr of products": lora.LoKr(1, decompose_both=True, factor=4),
    "AdaLoRA": lora.AdaLoRA(2, alpha=3),
    "LoRAXS": lora.LoRAXS(2),
    "IA3": lora.IA3(),
    "IA3 of inputs": lora.IA3(side="in"),
}
# Every variant on layers that are stacked; then on Conv1D and fused parts, on tables that are heads too, and on BERT.
CASES = [("llama", variant) for variant in VARIANTS]
CASES += [("gpt2", "LoRA"), ("gpt2", "LoKr"), ("tied", "LoRA"), ("bert", "DoRA")]


@functools.cache
def shapes(name):
    return jax.eval_shape(MODELS[name].init, jax.random.key(0), IDS)


@functools.cache
def sites(name):
    return lora.sites(MODELS[name].apply, shapes(name), IDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of a model: its directory in shards, opened, and its parameters."""

    @functools.cache
    def of(name, dtype="float32"):
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(dtype), shapes(name))
        folder = tmp_path_factory.mktemp(name) / "base"
        models.save(folder, MODELS[name], params, max_shard_size=4000)
        stored = models.Stored.of(folder, *models.load(folder, abstract=True))
        return stored, models.load(folder)[1]

    return of


def adapted(name, params, variant):
    """Random adapters on leaves that a variant suits, of LoRA on all, and Full on norms and biases."""
    few, some = all_adaptable(variant), ("query", "qkv", "down", "head", "embedding")
    plain = variant == VARIANTS["LoRA"]

    def rule(path, site):
        if not plain and not any(word in path for word in some):
            return None
        return few(path, site) or (lora.Full() if site.kind == "other" else None)

    return split_at_random(params, rule, sites(name))[1]


def merged(stored, lora_params, folder, dtype=None, **options):
    """What is written, loaded."""
    found = huggingface.merge(stored.checkpoint, stored.params, lora_params, stored.names, dtype=dtype, **options)
    huggingface.write(folder, found, source=stored.checkpoint, dtype=dtype)
    return models.load(folder)[1]


def check_same(found, expected):
    for (path, a), b in zip(tree.flatten(found)[0].items(), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes(), path


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_bits_of_merge(base, tmp_path, name, variant):
    stored, params = base(name)
    lora_params = adapted(name, params, VARIANTS[variant])
    found = merged(stored, lora_params, tmp_path / "merged")
    check_same(found, lora.merge(params, lora_params))
    if (name, variant) == ("llama", "LoRA"):
        files = sorted(file.name for file in stored.checkpoint.directory.iterdir())
        assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == files
        lifted = jax.jit(lora.lift(MODELS[name].apply))(lora.attach(params, lora_params), IDS)
        np.testing.assert_allclose(jax.jit(MODELS[name].apply)(found, IDS), lifted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("name", "variant"), [("llama", "LoRA"), ("gpt2", "LoHa"), ("bert", "LoKr")])
def test_blocks_make_no_difference(base, tmp_path, monkeypatch, name, variant):
    """Some rows at a time, the last of them fewer: within a unit in the last place of the weights."""
    stored, params = base(name)
    lora_params = adapted(name, params, VARIANTS[variant])
    monkeypatch.setattr(merging, "BLOCK", 5 * 16)
    found = merged(stored, lora_params, tmp_path / "merged")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(lora.merge(params, lora_params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2.0**-22, atol=2.0**-22)


def test_what_is_not_adapted_stays(base, tmp_path):
    stored, params = base("llama", "bfloat16")
    lora_params = split_at_random(params, {".*/query/kernel": lora.LoRA(2)}, sites("llama"))[1]
    found = huggingface.merge(stored.checkpoint, stored.params, lora_params, stored.names)
    lazy = [name for name, x in found.items() if isinstance(x, huggingface.Lazy)]
    assert lazy == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    huggingface.write(tmp_path / "merged", found, source=stored.checkpoint)
    after = huggingface.open_checkpoint(tmp_path / "merged").tensors
    for name, x in stored.checkpoint.tensors.items():
        assert (name in lazy) != (np.asarray(x).tobytes() == np.asarray(after[name]).tobytes())
        assert (x.stored, x.file.name) == (after[name].stored, after[name].file.name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounded_once(base, tmp_path, dtype):
    """A base in bfloat16 is merged in float32, and what is written is nearest to that."""
    stored, params = base("llama", "bfloat16")
    lora_params = adapted("llama", params, VARIANTS["LoRA"])
    losses = {}
    found = merged(stored, lora_params, tmp_path / "m", dtype, report=lambda x: losses.__setitem__(x.name, x))
    wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype("float32")), params)
    exact = lora.merge(wide, lora_params)
    check_same(found, jax.tree.map(lambda x: np.asarray(x).astype(dtype), exact))
    name, path = "model.layers.1.mlp.up_proj.weight", ("params", "layers", "mlp", "up", "kernel")
    if dtype == "float32":
        assert not losses
        return
    leaves = (functools.reduce(lambda x, key: x[key], path, t) for t in (params, exact, found))
    w, e, r = (np.asarray(leaf)[1].astype("float32") for leaf in leaves)
    assert losses[name].update == pytest.approx(float(np.sum((e - w) ** 2)), rel=1e-4)
    assert losses[name].error == pytest.approx(float(np.sum((r - e) ** 2)), rel=1e-3)
    assert losses[name].stuck == int(np.sum((r == w) & (e != w))) and losses[name].moved == int(np.sum(e != w))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stochastic_rounding_has_no_bias(dtype):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 1, 64), rng.normal(0, 1e-6, 64), [0.0, -0.0, 1.0, -1.0, 60000.0]])
    x = x.astype(np.float32)
    kept = x.astype(dtype).astype(np.float32)
    assert rounding.stochastic(rng, kept, dtype).tobytes() == kept.astype(dtype).tobytes()  # exact where it can be
    draws = np.stack([rounding.stochastic(rng, x, dtype).astype(np.float64) for _ in range(2000)])
    below, above = draws.min(axis=0), draws.max(axis=0)
    assert ((below <= x) & (x <= above)).all()
    assert (np.nextafter(below.astype(dtype), np.asarray(np.inf, dtype)).astype(np.float64) >= above).all()  # neighbors
    unit = np.maximum(above - below, 1e-30)
    assert (np.abs(draws.mean(axis=0) - x) <= 5 * unit * 0.5 / 2000**0.5).all()  # five standard errors


def test_stochastic_rounding_depends_on_seed_and_name_alone(base, tmp_path, monkeypatch):
    stored, params = base("llama", "bfloat16")
    lora_params = adapted("llama", params, VARIANTS["LoRA"])

    def found(seed):
        return huggingface.merge(stored.checkpoint, stored.params, lora_params, stored.names, seed=seed)

    names = [name for name, x in found(0).items() if isinstance(x, huggingface.Lazy)]
    first = {name: np.asarray(found(0)[name]).tobytes() for name in names}
    monkeypatch.setattr(merging, "BLOCK", 5 * 16)
    assert first == {name: np.asarray(found(0)[name]).tobytes() for name in reversed(names)}
    assert first != {name: np.asarray(found(1)[name]).tobytes() for name in names}


def test_one_tensor_at_a_time(base, tmp_path, monkeypatch):
    """No more than one tensor is read, and none is as large as a leaf that is stacked of several."""
    stored, params = base("llama")
    lora_params = adapted("llama", params, VARIANTS["LoRA"])
    read, largest = [], max(int(np.prod(x.shape)) for x in stored.checkpoint.tensors.values())
    real = tensors.Tensor.rows
    monkeypatch.setattr(tensors.Tensor, "rows", lambda self, *span: read.append((self.name, span)) or real(self, *span))
    found = huggingface.merge(stored.checkpoint, stored.params, lora_params, stored.names)
    assert not read
    np.asarray(found["model.layers.1.mlp.up_proj.weight"])
    assert {name for name, _ in read} == {"model.layers.1.mlp.up_proj.weight"}
    made = []
    formed = merging._formed
    monkeypatch.setattr(merging, "_formed", lambda *args: made.append(formed(*args)) or made[-1])
    merged(stored, lora_params, tmp_path / "merged")
    assert max(x.size for x in made) <= largest < params["params"]["layers"]["mlp"]["up"]["kernel"].size * 2


def test_fingerprint_without_loading(base):
    for name in MODELS:
        stored, params = base(name)
        assert stored.fingerprint() == lora.fingerprint(params)
        cast = jax.tree.map(lambda x: np.asarray(x).astype("bfloat16"), params)
        assert stored.fingerprint("bfloat16") == lora.fingerprint(cast)
        deferred = jax.tree.map(np.asarray, stored.deferred(), is_leaf=lambda x: isinstance(x, huggingface.Lazy))
        check_same(deferred, params)


def test_several_adapters(base, tmp_path):
    stored, params = base("llama")
    one, two = (
        split_at_random(params, {rule: variant}, sites("llama"))[1]
        for rule, variant in ((".*/(query|up)/kernel", lora.LoRA(2)), (".*/(up|down)/kernel", lora.LoRA(3, alpha=1)))
    )
    weights = [0.5, -2.0]
    both = summed([one, two], weights)
    expected = lora.merge(lora.merge(params, lora.scale(one, 0.5)), lora.scale(two, -2.0))
    for a, b in zip(jax.tree.leaves(merged(stored, both, tmp_path / "m")), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    full = split_at_random(params, {".*/last_norm/scale": lora.Full()}, sites("llama"))[1]
    with pytest.raises(ValueError, match=r"'params/last_norm/scale' trains in Full in 2 of the adapters"):
        summed([full, full], weights)
    dora = split_at_random(params, {".*/up/kernel": lora.DoRA(2)}, sites("llama"))[1]
    assert summed([dora, full], [1, 1]).keys() == {*dora, *full}
    for adapters in ([dora, one], [dora]):
        with pytest.raises(ValueError, match="extract"):
            summed(adapters, weights[: len(adapters)])
    vera = split_at_random(params, {".*/up/kernel": lora.VeRA(3)}, sites("llama"))[1]
    check_same(merged(stored, summed([vera], [1]), tmp_path / "v"), lora.merge(params, vera))


def test_not_finite(base, tmp_path):
    stored, params = base("llama")
    lora_params = adapted("llama", params, VARIANTS["LoRA"])
    huge = jax.tree.map(lambda x: np.asarray(x) * np.float32(1e4), lora_params)
    broken = jax.tree.map(lambda x: np.where(np.arange(x.size).reshape(x.shape), x, np.float32(np.nan)), lora_params)
    for of, dtype, message in ((broken, None, "not finite, because the factors are not"), (huge, "float16", "float16")):
        with pytest.raises(ValueError, match=message):
            merged(stored, of, tmp_path / "merged", dtype)
        assert not [*tmp_path.iterdir()]


def test_no_space(base, tmp_path, monkeypatch):
    stored, params = base("llama")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    with pytest.raises(OSError, match=r"it takes 0\.0\d+ MB, and 0\.005 MB are free"):
        merged(stored, adapted("llama", params, VARIANTS["LoRA"]), tmp_path / "merged")
    assert not [*tmp_path.iterdir()]
