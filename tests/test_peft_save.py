"""Our adapters as PEFT's folders: read back they are the same, and what PEFT cannot say is an error.

That PEFT computes with them what we do is in `experiments/peft_exports`, since it takes PyTorch.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import randomized
from peft_folders import files
from test_peft_folders import assert_same

import lora_jax as lora
from lora_jax.formats.peft import load, save
from lora_jax.models import gpt2, llama

KERNELS, TABLES = r".*/(query|up|down)/kernel", r".*/embeddings/embedding"
NAMES = {
    "llama": llama.NAMES,
    "gpt2": gpt2.NAMES,
    "toy": [
        ("gate", "experts.gate_up_proj[0]", "experts"),
        ("up", "experts.gate_up_proj[1]", "experts"),
        ("down", "experts.down_proj", "transposed_experts"),
        ("(q)", "qkv_proj[0]", "linear: in heads width -> (heads width) in"),
        ("(k)", "qkv_proj[1]", "linear"),
        ("parts", "{part:a,b,c}", "linear: in part out -> out in"),
        ("conv", "conv", "conv: width in out -> out in width"),
    ],
}
EACH, HEADS = {"in_axes": 1, "out_axes": 2, "batch_axes": 0}, {"in_axes": 0, "out_axes": (1, 2)}


@functools.cache
def base(name):
    """A model's parameters, and its sites."""
    if name == "toy":
        shapes = {"gate": (3, 6, 5), "up": (3, 6, 5), "down": (3, 5, 7), "q": (6, 2, 4), "k": (6, 3)}
        shapes |= {"parts": (6, 3, 4), "conv": (3, 4, 8)}
        rng = np.random.default_rng(0)
        return {key: {"kernel": rng.normal(size=shape).astype("f")} for key, shape in shapes.items()}, None
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "gpt2":
        model = gpt2.GPT2(gpt2.Config(**sizes))
    else:
        config = llama.Config(**sizes, intermediate_size=12, tie_word_embeddings=name == "tied")
        model = llama.Llama(config, scan=name != "unscanned")
    ids = jnp.zeros((1, 4), int)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    sites = lora.sites(model.apply, params, ids)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), params), sites


def adapters(name, rules):
    params, sites = base(name)
    shapes = jax.eval_shape(lambda: lora.split(jax.random.key(0), params, rules, sites=sites)[1])
    return randomized(shapes)


CASES = {
    "LoRA": ("llama", {r".*/kernel": lora.LoRA(4, 6, dropout=0.1), TABLES: lora.LoRA(2, 3, dropout=0.1)}),
    "rsLoRA": ("unscanned", {r".*/layers_1/.*/kernel": lora.LoRA(4, 6, "rank_stabilized"), TABLES: lora.LoRA(2)}),
    "DoRA": ("gpt2", {r".*/kernel": lora.DoRA(4, 6, "rank_stabilized", dtype="bfloat16")}),
    "VeRA": ("llama", {KERNELS: lora.VeRA(6)}),
    "LoHa": ("llama", {r".*/down/kernel": lora.LoHa(2, 3), KERNELS: lora.LoHa(3)}),
    "LoKr": ("llama", {KERNELS: lora.LoKr(1, 2, decompose_both=True)}),
    "AdaLoRA": ("llama", {KERNELS: lora.AdaLoRA(4, 7)}),
    "IA3": ("llama", {r".*/(key|value)/kernel": lora.IA3(), r".*/down/kernel": lora.IA3("in")}),
    "tied": ("tied", {TABLES: lora.LoRA(4, 6), r".*/query/kernel": lora.LoRA(4, 6)}),
    "Full": ("llama", {r".*norm/scale|.*/head/kernel": lora.Full(), KERNELS: lora.LoRA(4)}),
    "Full alone": ("gpt2", {r".*/last_norm/.*": lora.Full()}),
    "biases": ("gpt2", {r".*/(qkv|up|mlp_norm)/bias": lora.Full(), r".*/qkv/kernel": lora.LoRA(4)}),
    "experts": ("toy", {"(gate|up|down)/kernel": lora.LoRA(2, 3).at(**EACH)}),
    "fused": (
        "toy",
        {
            "q/kernel": lora.LoRA(2, 3).at(**HEADS),
            "k/kernel": lora.LoRA(3, 4.5),
            "parts/kernel": lora.LoRA(5, 7.5).at(**HEADS),
        },
    ),
    "convolution": ("toy", {"conv/kernel": lora.LoRA(2, 3).at(in_axes=(0, 1), out_axes=2)}),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    name, rules = CASES[case]
    lora_params, params, names = adapters(name, rules), base(name)[0], NAMES.get(name, llama.NAMES)
    if case == "rsLoRA":  # which a config has for all or none: the other's scale is in its alpha
        lora_params = {path: x for path, x in lora_params.items() if x.variant.scaling == "rank_stabilized"}
    if case == "convolution":  # which `sites` would see
        site = dataclasses.replace(lora_params["conv/kernel"].site, kind="conv", window_axes=(0,))
        lora_params["conv/kernel"] = dataclasses.replace(lora_params["conv/kernel"], site=site)
    save(tmp_path / "first", lora_params, names, base=params)
    assert_same(load(tmp_path / "first", params, names), lora_params)
    save(tmp_path / "second", dict(reversed(lora_params.items())), names, base=params)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_of_both_scalings_and_of_others_the_product_stays(tmp_path):
    params, _ = base("llama")
    rules = {r".*/query/kernel": lora.LoRA(4, 6, "rank_stabilized"), r".*/up/kernel": lora.LoRAFA(2, 5)}
    for i, own in enumerate((rules, {KERNELS: lora.LoRAXS(3, 2)})):
        lora_params = adapters("llama", own)
        found = load(save(tmp_path / str(i), lora_params, llama.NAMES, base=params), params, llama.NAMES)
        assert {type(x.variant) for x in found.values()} == {lora.LoRA}
        for a, b in zip(*(jax.tree.leaves(lora.merge(params, x)) for x in (found, lora_params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_portable_is_of_one_rank_and_one_scale(tmp_path):
    params, _ = base("llama")
    rules = {r".*/query/kernel": lora.LoRA(4, 6, "rank_stabilized"), r".*/up/kernel": lora.LoRA(2, 5)}
    lora_params = adapters("llama", rules)
    config, tensors = files(save(tmp_path / "new", lora_params, llama.NAMES, base=params, portable=True))
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["target_modules"] == ["q_proj", "up_proj"] and config["r"] == 4
    assert {min(x.shape) for x in tensors.values()} == {4}
    found = load(tmp_path / "new", params, llama.NAMES)
    for a, b in zip(*(jax.tree.leaves(lora.merge(params, x)) for x in (found, lora_params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_modules_that_end_alike_are_named_in_full(tmp_path):
    names = [(r"(\w+)", r"\1.proj", "linear"), ("x/(a)", r"x.\1.proj", "linear")]
    params = {
        "a": {"kernel": jnp.ones((4, 4))},
        "b": {"kernel": jnp.ones((4, 4))},
        "x": {"a": {"kernel": jnp.ones((4, 4))}},
    }
    for rules, expected in (
        ({"b/kernel": lora.LoRA(2)}, ["b.proj"]),
        ({"x/a/kernel": lora.LoRA(2)}, ["x.a.proj"]),
        ({"a/kernel": lora.LoRA(2)}, r"(a\.proj)"),
    ):
        _, lora_params = lora.split(jax.random.key(0), params, rules)
        config, _ = files(save(tmp_path / "new", lora_params, names, base=params))
        assert config["target_modules"] == expected
        assert load(tmp_path / "new", params, names).keys() == lora_params.keys()
        config, _ = files(save(tmp_path / "new", lora_params, names))
        assert config["target_modules"] == [re.sub("/kernel", ".proj", *lora_params).replace("/", ".")]


@dataclasses.dataclass(frozen=True)
class OneOfAUsersOwn(lora.LoRA):
    pass


ERRORS = {
    "relative_to": ("llama", {KERNELS: lora.LoRA(4, init="pissa")}, {}),
    "nothing to save": ("llama", None, {}),
    "no OneOfAUsersOwn": ("llama", {KERNELS: OneOfAUsersOwn(4)}, {}),
    "save each kind by itself": ("llama", {r".*/up/kernel": lora.LoRA(4), r".*/query/kernel": lora.DoRA(4)}, {}),
    "save each by itself": ("llama", {r".*/up/kernel": lora.LoRA(4), r".*/query/kernel": lora.LoHa(4)}, {}),
    "has one rank for all": ("llama", {r".*/up/kernel": lora.VeRA(4), r".*/query/kernel": lora.VeRA(5)}, {}),
    "LOHA has no LoHa of a module of kind embedding": ("llama", {TABLES: lora.LoHa(4)}, {}),
    "also the head has no|no DoRA of a module of kind embedding that is also": ("tied", {TABLES: lora.DoRA(4)}, {}),
    "has no biases": ("gpt2", {r".*/up/bias": lora.Full(), r".*/up/kernel": lora.IA3("in")}, {}),
    "scales '.*c_fc.bias' along": ("gpt2", {r".*/up/kernel": lora.IA3()}, {}),
    "to tell whether": ("gpt2", {r".*/up/kernel": lora.IA3()}, {"base": None}),
    "give base=": ("gpt2", {r".*/up/kernel": lora.Full()}, {"base": "shapes"}),
    "adapt its parts alike": (
        "toy",
        {"q/kernel": lora.LoRA(2).at(**HEADS), "k/kernel": lora.Full()},
        {},
    ),
    "DoRA of all": ("toy", {"k/kernel": lora.DoRA(2)}, {}),
    "correct the names": ("toy", {"k/kernel": lora.LoRA(2).at(in_axes=1, out_axes=0)}, {}),
    "another order|none of each": ("toy", {"parts/kernel": lora.VeRA(2).at(**HEADS)}, {}),
    "servers read LoRA alone: `merge`": ("llama", {KERNELS: lora.DoRA(4)}, {"portable": True}),
    "there is Full": ("llama", {KERNELS: lora.LoRA(4), ".*norm/scale": lora.Full()}, {"portable": True}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_has_no_form_in_peft(message, tmp_path):
    name, rules, options = ERRORS[message]
    params, sites = base(name)
    options = {"base": params, **options}
    if options["base"] == "shapes":
        options["base"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    lora_params = randomized(lora.split(jax.random.key(0), params, rules, sites=sites)[1]) if rules else {}
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "new", lora_params, NAMES.get(name, llama.NAMES), **options)
    assert not list(tmp_path.iterdir())


def test_what_relative_to_returns_is_saved(tmp_path):
    params = {"w": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)}}
    frozen, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(2, init="pissa")})
    relative = lora.relative_to(params, frozen, lora_params)
    found = load(save(tmp_path / "new", relative, [("w", "w", "linear")]), params, [("w", "w", "linear")])
    np.testing.assert_allclose(lora.merge(params, found)["w"]["kernel"], params["w"]["kernel"], atol=1e-5)


def test_layers_that_differ_go_into_a_model_that_is_not_scanned(tmp_path):
    params, _ = base("unscanned")
    for i, rules in enumerate(
        (
            {r".*/layers_1/.*/up/kernel": lora.LoRA(2)},
            {r".*/layers_1/.*/up/kernel": lora.LoRA(2), r".*/up/kernel": lora.LoRA(3)},
        )
    ):
        save(tmp_path / str(i), adapters("unscanned", rules), llama.NAMES, base=params)
        with pytest.raises(ValueError, match="not stacked"):
            load(tmp_path / str(i), base("llama")[0], llama.NAMES)


def test_parts_with_factors_of_their_own_are_a_batch(tmp_path):
    names = [("parts", "{part:a,b,c}", "linear: in part out -> out in")]
    apart = [(r"parts/(\w)", r"\1", "linear")]
    whole, params = base("toy")[0]["parts"]["kernel"], {"parts": {}}
    for i, name in enumerate("abc"):
        params["parts"][name] = {"kernel": whole[:, i]}
    _, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(2)})
    lora_params = randomized(lora_params)
    fused = {"parts": {"kernel": whole}}
    found = load(save(tmp_path / "new", lora_params, apart), fused, names)
    x = jnp.ones((2, 6))
    y = lora.lift(lambda p: jnp.einsum("bi,ipo->bpo", x, p["parts"]["kernel"]))(lora.attach(fused, found))
    merged = lora.merge(params, lora_params)["parts"]
    for i, name in enumerate("abc"):
        np.testing.assert_allclose(y[:, i], x @ merged[name]["kernel"], rtol=1e-5)


def test_a_folder_is_whole_or_as_it_was(tmp_path, monkeypatch):
    params, _ = base("llama")
    first, second = (adapters("llama", {KERNELS: lora.LoRA(rank)}) for rank in (2, 3))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes").write_text("mine")
    save(tmp_path / "new", first, llama.NAMES, base=params)
    save(tmp_path / "new", second, llama.NAMES, base=params)
    assert_same(load(tmp_path / "new", params, llama.NAMES), second)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes",
    ]

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for directory in ("new", "other"):
        with pytest.raises(OSError, match="free some space"):
            save(tmp_path / directory, first, llama.NAMES, base=params)
    monkeypatch.undo()
    assert_same(load(tmp_path / "new", params, llama.NAMES), second)
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and len(list((tmp_path / "new").iterdir())) == 3
