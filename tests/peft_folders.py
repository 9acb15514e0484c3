"""PEFT's folders that `fixtures/make_peft_folders.py` made, the models that they are for, and their name maps."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft_reference
from peft_reference import recorded
from safetensors.numpy import load_file

from lora_jax import tree
from lora_jax.formats.layouts import restore
from lora_jax.formats.names import locate
from lora_jax.formats.peft import load
from lora_jax.models import gpt2, llama

FOLDER = Path(__file__).parent / "fixtures" / "peft_folders"
NAMES = {
    "llama": [
        (r"(.*_proj|lm_head)", r"\1", "linear"),
        (r"(.*norm)", r"\1", "vector"),
        (r"(model.embed_tokens)", r"\1=lm_head", "embedding"),
    ],
    "gpt2": [
        (r"(.*(?:attn|proj|fc))", r"\1", "conv1d"),
        (r"(.*ln_.)", r"\1", "vector"),
        (r"(transformer.wte)", r"\1=lm_head", "embedding"),
        (r"(transformer.wpe)", r"\1", "embedding"),
    ],
    "conv": [(r"(first|second|third)", r"\1", "conv"), (r"(classifier)", r"\1", "linear")],
    "moe": [
        (r"(router)", r"\1", "linear"),
        (r"experts\.(gate_up_proj)", r"experts.\1", "experts"),
        (r"experts\.(down_proj)", r"experts.\1", "experts"),
    ],
}
NAMES["tied"] = NAMES["llama"]


@functools.cache
def expected():
    with np.load(FOLDER / "expected.npz") as file:
        return dict(file)


def folders():
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def model_of(name):
    return name.split("-")[0]


@functools.cache
def model(name):
    """(logits of parameters, parameters by module and last name)."""
    if name == "moe":
        weights = {key.removeprefix("moe/"): x for key, x in expected().items() if key.startswith("moe/")}
        params = {"router.weight": weights["router.weight"].T}
        params |= {f"{key}.weight": x.transpose(0, 2, 1) for key, x in weights.items() if key != "router.weight"}
        return mixture, nested(params)
    result, params = peft_reference.model("llama" if name == "tied" else name)
    if name == "tied":
        params = {key: x for key, x in params.items() if key != "lm_head.weight"}

    def logits(params):
        flat = {f"{module}.{last}": x for module, own in params.items() for last, x in own.items()}
        if name == "tied":
            flat["lm_head.weight"] = flat["model.embed_tokens.weight"].T
        return result(flat)[0]

    return logits, nested(params)


def mixture(params):
    x, router = expected()["moe"], params["router"]["weight"]
    up, down = (params[f"experts.{name}"]["weight"] for name in ("gate_up_proj", "down_proj"))
    gate, up = jnp.split(jnp.einsum("bi,eio->beo", x, up), 2, -1)
    return jnp.einsum("beh,eho,be->bo", jax.nn.silu(gate) * up, down, jax.nn.softmax(x @ router))


def nested(params):
    found = {}
    for key, x in params.items():
        module, _, last = key.rpartition(".")
        found.setdefault(module, {})[last] = x
    return found


@functools.cache
def loaded(name):
    of = model_of(name)
    return load(FOLDER / name, model(of)[1], NAMES[of])


def files(folder):
    """A folder's config and tensors."""
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@functools.cache
def ours(name):
    """The library's own model, with its layers scanned: (loss of parameters, parameters, name map)."""
    file = recorded(name)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 16}
    if name == "llama":
        config = llama.Config(48, 24, **sizes, num_key_value_heads=2, mlp_bias=True)
        made, names = llama.Llama(config), llama.NAMES
    else:
        made, names = gpt2.GPT2(gpt2.Config(48, 24, **sizes)), gpt2.NAMES
    leaves, treedef = tree.flatten(jax.eval_shape(made.init, jax.random.key(0), file["tokens"]))
    params = {path: filled(place, file["weights"]) for path, place in locate(leaves, names).items()}
    params = tree.unflatten(treedef, {path: params[path] for path in leaves})
    return lambda params: made.apply(params, file["tokens"], method="loss"), params, names


def filled(place, weights):
    """A leaf, from their weights."""
    axes = [axis for axis in place.axes if axis not in place.stacked]
    parts = [restore(weights[name], place.groups, axes, place.sizes) for name in place.tensors.values()]
    return jnp.asarray(np.stack(parts) if place.stacked else parts[0])
