"""The bundled maps: each leaf of other libraries' models has its tensor in PyTorch's, by name and shape.

The paths and shapes are those of real models, which `experiments/name_maps/run.py` wrote; there the maps are held to
the models' logits, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lora_jax.formats import huggingface
from lora_jax.formats.maps import transformers, tunix
from lora_jax.formats.names import locate

MODELS = json.loads((Path(__file__).parent / "fixtures" / "name_maps.json").read_text())
MAPS = {"transformers": transformers, "tunix": tunix}


def named(model):
    library, _, name = MODELS[model]["map"].partition(".")
    return getattr(MAPS[library], name)


@pytest.mark.parametrize("model", MODELS)
def test_each_leaf_has_its_tensor(model):
    shapes = MODELS[model]["ours"]
    theirs = {name: tuple(shape) for name, shape in MODELS[model]["theirs"].items()}
    prefixes = ("", "params/") if model.startswith("Flax") else ("", "model/")
    for prefix in prefixes:
        ours = {prefix + path: SimpleNamespace(shape=tuple(shape)) for path, shape in shapes.items()}
        places = locate(ours, named(model))
        assert places.keys() == ours.keys()
        found = {name: place.theirs for place in places.values() for name in place.tensors.values()}
        assert found.items() <= theirs.items()
        # What no leaf has is the copy of one that is tied.
        tied = {f"{place.tied}.{role}" for place in places.values() if place.tied for role in ("weight", "bias")}
        copies = (
            {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"} if "T5" in model else {*()}
        )
        assert theirs.keys() - found.keys() <= tied | copies


def test_all_maps_are_held_to_a_model():
    lists = {
        f"{name}.{own}" for name, module in MAPS.items() for own in vars(module) if own.isupper() and own[0] != "_"
    }
    assert lists == {entry["map"] for entry in MODELS.values()}


def test_weights_go_out_and_come_back(tmp_path):
    """Through a checkpoint: kernels with heads, stacked experts, convolutions, tensors of no module, a scalar."""
    for model in ("FlaxCLIP", "FlaxGPT2", "Tunix Qwen 3, experts", "Tunix Gemma 2, as many heads"):
        rng = np.random.default_rng(0)
        params = {path: np.asarray(rng.normal(size=s), "float32") for path, s in MODELS[model]["ours"].items()}
        huggingface.write(tmp_path / model, huggingface.export(params, named(model)), config={})
        back = huggingface.fill(params, huggingface.open_checkpoint(tmp_path / model), named(model))
        jax.tree.map(np.testing.assert_array_equal, back, params)
