"""Writing: a model and its variables as a Hugging Face directory, which transformers and `load` read."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from flax import linen as nn

from lora_jax.formats import huggingface
from lora_jax.formats.huggingface.directory import CONFIG, read_json
from lora_jax.formats.names import Names
from lora_jax.models.bert import Bert
from lora_jax.models.classifier import Classifier, described
from lora_jax.models.families import FAMILIES, FIXED
from lora_jax.models.gpt2 import WORDS

# The file of each model_type, and the class of transformers that a model without further heads is.
MODULES = {"bert": "bert", "gpt2": "gpt2", **dict.fromkeys(FAMILIES, "llama")}
CLASSES = {
    "bert": "BertModel",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def save(directory: str | Path, model: nn.Module, params: Any, **options: Any) -> Path:
    """Save a model, such as one that was merged or made from scratch, as a Hugging Face directory.

    Args:
      directory: It must not be there yet, or be empty.
      model: One of the models here.
      params: Its variables, {"params": ...}.
      **options: Of `lora_jax.formats.huggingface.write`: `source`, the directory the model came from, whose config and
        tokenizer are then taken over; `dtype`, `max_shard_size`. Without a source, config.json is made of the model's.

    Returns:
      The directory.

    Raises:
      ValueError: No model_type says what the model's config says; or see `lora_jax.formats.huggingface.write`.
      OSError: See there.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> from lora_jax import models
    >>> from lora_jax.models.llama import Config, Llama
    >>> model = Llama(Config(100, 8, 1, 2, 16))
    >>> params = model.init(jax.random.key(0), jnp.array([[1]]))
    >>> models.load(models.save(f"{tempfile.mkdtemp()}/tiny", model, params))[0].config == model.config
    True
    """
    source = options.get("source")
    if options.get("config") is None and (source is None or isinstance(model, Classifier)):
        options["config"] = config_of(model)
        if source is not None:  # which may be that of the encoder alone
            folder = source.directory if isinstance(source, huggingface.Checkpoint) else Path(source)
            options["config"] = {**read_json(folder / CONFIG), **described(model.labels)}
    return huggingface.save(directory, params, names(model), **options)


def names(model: nn.Module) -> Names:
    """A model's name map, by which `huggingface` and `peft` know its leaves.

    >>> from lora_jax.models.gpt2 import GPT2, Config
    >>> names(GPT2(Config(100, 8, 1, 2)))[-1]
    ('.*/head', 'lm_head', 'linear')
    """
    return importlib.import_module(type(model).__module__).NAMES


def config_of(model: Any) -> dict[str, Any]:
    """What a config.json says of a model.

    Raises:
      ValueError: No model_type says it.

    >>> from lora_jax.models.gpt2 import GPT2, Config
    >>> [config_of(GPT2(Config(100, 8, 1, 2)))[name] for name in ("model_type", "n_embd")]
    ['gpt2', 8]
    """
    if isinstance(model, Classifier):
        if not model.config.pooler:
            raise ValueError(
                "transformers has no classifier of the mean over tokens: make one with models.load(labels=...)"
            )
        return {**config_of(Bert(model.config)), **described(model.labels)}
    file = type(model).__module__.rpartition(".")[2]
    for kind in (kind for kind, name in MODULES.items() if name == file):
        content = {"model_type": kind, "architectures": [CLASSES[kind]], **_fields(model.config, kind)}
        try:
            again = type(model.config).from_huggingface(content)
        except ValueError:
            continue
        if again in (model.config, dataclasses.replace(model.config, **({"pooler": True} if kind == "bert" else {}))):
            return content
    raise ValueError(f"no model_type of Hugging Face's says what {model.config} says: give config= to save it by")


def _fields(config: Any, kind: str) -> dict[str, Any]:
    """The config's fields in the words of a model_type, but for those that it cannot but have."""
    content = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    content.pop("pooler", None)
    if kind == "gpt2":
        theirs = {ours: theirs for theirs, ours in WORDS.items()}
        return {theirs.get(name, name): value for name, value in content.items()}
    if kind not in FAMILIES:
        return content
    defaults, own = FAMILIES[kind]
    fixed = {name for name in FIXED if name not in defaults} | own.keys()
    content = {name: value for name, value in content.items() if name not in fixed}
    if (scaling := config.rope_scaling) is not None:
        given = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
        content["rope_scaling"] = {"rope_type": "linear" if len(given) == 1 else "llama3", **given}
    if "hidden_activation" in defaults:
        content["hidden_activation"] = content.pop("hidden_act")
    if "use_sliding_window" in defaults:
        content["use_sliding_window"] = config.sliding_window is not None
    return {**content, "layer_types": [*config.layer_types]}
