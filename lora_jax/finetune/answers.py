"""Answers: what a model and its adapters make of the same prompts, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import models
from lora_jax.finetune import prompts
from lora_jax.finetune.base import for_adapter, known_labels
from lora_jax.finetune.prompts import Prompt
from lora_jax.finetune.tokenizer import Tokenizer
from lora_jax.formats import adapter as adapters
from lora_jax.formats import huggingface
from lora_jax.models.classifier import Classifier
from lora_jax.models.decoder import Decoder

ROWS = 16  # prompts that are answered at a time, so that a long file of them takes no more memory
BASE = "base"


@dataclasses.dataclass(frozen=True)
class Options:
    """How answers are written; without temperature, top_k and top_p the likeliest token is taken at each place.

    Attributes:
      max_new_tokens: How many tokens an answer may have.
      temperature: See `lora_jax.models.generate`, and so for the others.
      top_k: One of so many likeliest tokens is drawn.
      top_p: One of the likeliest is drawn, as few as are so probable together.
      seed: Of what is drawn.
      dtype: Of the base and of activations; None: as the weights are stored.
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: str | None = None

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn."""
        return not self.temperature is self.top_k is self.top_p is None


class Answer(NamedTuple):
    """What one model makes of a prompt.

    Attributes:
      text: What it writes; of a classifier the likeliest label.
      tokens: How many tokens that is.
      ended: Whether it ended itself.
      probabilities: Of a classifier, that of each label; else None.
    """

    text: str
    tokens: int = 0
    ended: bool = True
    probabilities: dict[str, float] | None = None


def answers(
    directory: Path, names: Sequence[str], given: Sequence[Prompt], options: Options
) -> Iterator[tuple[str, list[Answer]]]:
    """What the base makes of prompts, and then each of its adapters, without merging any.

    Args:
      directory: Of the base.
      names: Of the adapters, as `lora_jax.formats.adapter.load` takes them.
      given: The prompts.
      options: How.

    Yields:
      "base" or the adapter's name, and its answers in the order of the prompts. Of a base that has no head to classify
      with there are none.

    Raises:
      FileNotFoundError: A directory, a file or an adapter is missing.
      ValueError: One of them is damaged or does not fit, or a prompt is too long.
    """
    model, shapes = for_adapter(directory, names[0] if names else None, abstract=True)
    if not isinstance(model, Decoder | Classifier):
        kind = type(model).__name__
        raise ValueError(f"'{directory}': {kind} is an encoder and writes nothing: give --adapter, one that classifies")
    tokenizer = Tokenizer.of(directory, model.config.vocab_size)
    ids = prompts.encode(given, tokenizer)
    new = options.max_new_tokens if isinstance(model, Decoder) else 1
    _check_length(model.config.max_position_embeddings, ids, given, new)
    loaded = [(name, *_read(directory, name, options.dtype)) for name in names]  # mistakes first, before it takes long
    model, params = for_adapter(directory, None, dtype=options.dtype)
    bare = params
    if isinstance(model, Decoder | Classifier):
        yield BASE, _answered(model, params, {}, ids, directory, tokenizer, options)
    for name, own, lora_params in loaded:
        if type(own) is not type(model):  # a classifier on an encoder
            model, params = own, for_adapter(directory, name, dtype=options.dtype)[1]
        elif isinstance(own, Classifier) and own != model:
            model, params = own, for_adapter(directory, name, dtype=options.dtype)[1]
        yield name, _answered(model, params, lora_params, ids, directory, tokenizer, options)
    del bare
