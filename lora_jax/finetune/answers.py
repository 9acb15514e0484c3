"""Answers: what a model and its adapters make of the same prompts, side by side, with nothing merged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import models
from lora_jax.factors import LoraParams
from lora_jax.finetune import prompts
from lora_jax.finetune.base import for_adapter
from lora_jax.finetune.data.tokenizer import Tokenizer
from lora_jax.finetune.prompts import Prompt, Tokens
from lora_jax.formats import adapter, huggingface
from lora_jax.models.classifier import Classifier
from lora_jax.models.decoder import Decoder

ROWS = 16  # prompts that are answered at a time, so that more of them take no more memory
BASE = "base"


@dataclasses.dataclass(frozen=True)
class Options:
    """How answers are made; without temperature, top_k and top_p of the likeliest token at each place.

    Attributes:
      max_new_tokens: How many tokens an answer may have.
      temperature: As in `lora_jax.models.generate`, and so are the next two.
      top_k: One of so many likeliest tokens is drawn.
      top_p: One of the likeliest is drawn, as few as are so probable together.
      seed: Of what is drawn.
      dtype: Of the base and of activations; None: as the weights are stored.
      chat_template: A file, instead of the directory's own.
    """

    max_new_tokens: int = 64
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    dtype: str | None = None
    chat_template: str | None = None

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn."""
        return not (self.temperature is None and self.top_k is None and self.top_p is None)


class Answer(NamedTuple):
    """What a model makes of a prompt.

    Attributes:
      text: What it writes; of a classifier the likeliest label.
      tokens: How many tokens it wrote.
      ended: Whether it came to an end by itself.
      probabilities: Of a classifier, that of each label.
    """

    text: str
    tokens: int = 0
    ended: bool = True
    probabilities: Mapping[str, float] | None = None


def answers(
    directory: Path, adapters: Sequence[str], given: Sequence[Prompt], options: Options
) -> Iterator[tuple[str, list[Answer]]]:
    """What the base makes of prompts, and then each adapter on it.

    Args:
      directory: Of the base.
      adapters: As `lora_jax.formats.adapter.load` takes them.
      given: The prompts.
      options: How.

    Yields:
      "base", or an adapter as it was given, with its answers in the order of the prompts. The base has none where it is
      an encoder, whose head is in the adapter.

    Raises:
      OSError: A directory, a file or an adapter is missing.
      ValueError: One of them is damaged or does not fit, or a prompt does not.
    """
    found = [(name, *_opened(directory, name, options.dtype)) for name in (None, *adapters)]
    found = [(name, model, own) for name, model, own in found if isinstance(model, Decoder | Classifier)]
    if not found:
        raise ValueError(f"'{directory}' is an encoder, which says nothing by itself: give --adapter, a classifier's")
    first = found[0][1]
    tokenizer = Tokenizer.of(directory, first.config.vocab_size, options.chat_template)
    tokens = prompts.encode(given, tokenizer, classify=isinstance(first, Classifier))
    _check_lengths(given, tokens, first, options)
    held = params = None
    for name, model, lora_params in found:
        if model != held:  # of classifiers each may tell other classes apart
            params = None
            params = for_adapter(directory, name, dtype=options.dtype)[1]
            held = model
        attached, adapted = lora.attach(params, lora_params), bool(lora_params)
        yield BASE if name is None else name, _made(model, attached, adapted, tokens, tokenizer, directory, options)


def _opened(directory: Path, name: str | None, dtype: str | None) -> tuple[Any, LoraParams]:
    """The model that an adapter is for, and the adapter; of the base by itself none."""
    model, shapes = for_adapter(directory, name, abstract=True, dtype=dtype)
    if name is None:
        return model, LoraParams()
    own, checkpoint = models.names(model), models.opened(model, directory)
    params = huggingface.deferred(shapes, checkpoint, own)
    base = functools.partial(huggingface.fingerprint, shapes, checkpoint, own)
    lora_params = adapter.load(name, params, own, base=base)
    for path, factors in ((path, one.factors) for path, one in lora_params.items()):
        if odd := [factor for factor, x in factors.items() if not jnp.isfinite(x).all()]:
            raise ValueError(f"{name}: '{path}' has {odd[0]} not finite: take an adapter from before training diverged")
    return model, lora_params


def _check_lengths(given: Sequence[Prompt], tokens: Sequence[Tokens], model: Any, options: Options) -> None:
    longest, new = model.config.max_position_embeddings, options.max_new_tokens
    room = longest if isinstance(model, Classifier) else longest - new + 1
    if room < 1:
        raise ValueError(f"--max-new-tokens {new}: the model has {longest} positions: take fewer")
    for prompt, own in zip(given, tokens, strict=True):
        if len(own.ids) > room:
            remedy = "shorten it" + ("" if isinstance(model, Classifier) else ", or take a smaller --max-new-tokens")
            rest = "" if isinstance(model, Classifier) else f" for it and {new} new ones"
            raise ValueError(
                f"{prompt.where}: {len(own.ids)} tokens, and the model has {longest} positions{rest}: {remedy}"
            )


def _made(
    model: Any,
    params: Any,
    adapted: bool,
    tokens: Sequence[Tokens],
    tokenizer: Tokenizer,
    directory: Path,
    options: Options,
) -> list[Answer]:
    """All answers of one model, some prompts at a time, in batches of one shape."""
    length, rows = max(len(own.ids) for own in tokens), min(ROWS, len(tokens))
    make: Callable[..., list[Answer]]
    if isinstance(model, Classifier):
        apply = jax.jit(lora.lift(model.apply) if adapted else model.apply)
        make = functools.partial(_classified, model, apply, params)
    else:
        stops = prompts.ends(directory, tokenizer)
        write = functools.partial(_write, model, options, stops, tokenizer.pad)
        write = jax.jit(lora.lift(write)) if adapted else write
        make = functools.partial(_written, write, params, stops, tokenizer, options)
    found: list[Answer] = []
    for start in range(0, len(tokens), rows):
        part = [*tokens[start : start + rows]]
        part += part[-1:] * (rows - len(part))
        left = not isinstance(model, Classifier)
        ids = prompts.padded([own.ids for own in part], tokenizer.pad, length, left=left)
        mask = prompts.padded([np.ones(len(own.ids)) for own in part], 0, length, left=left)
        types = [np.zeros_like(own.ids) if own.types is None else own.types for own in part]
        found += make(ids, mask, prompts.padded(types, 0, length, left=left), start)
    return found[: len(tokens)]


def _classified(model: Classifier, apply: Any, params: Any, ids: Any, mask: Any, types: Any, _: int) -> list[Answer]:
    logits = apply(params, ids, mask, types)
    found = np.asarray(jax.nn.softmax(jnp.float32(logits)))
    return [
        Answer(model.labels[int(row.argmax())], probabilities=dict(zip(model.labels, row.tolist(), strict=True)))
        for row in found
    ]


def _write(model: Any, options: Options, stops: tuple[int, ...], pad: int, params: Any, ids: Any, mask: Any, key: Any):
    return models.generate(
        model,
        params,
        ids,
        mask,
        max_new_tokens=options.max_new_tokens,
        key=key if options.draws else None,
        temperature=options.temperature or 1.0,
        top_k=options.top_k,
        top_p=options.top_p,
        eos=stops or None,
        pad=pad,
    )


def _written(
    write: Any,
    params: Any,
    stops: tuple[int, ...],
    tokenizer: Tokenizer,
    options: Options,
    ids: Any,
    mask: Any,
    _: Any,
    start: int,
) -> list[Answer]:
    new = np.asarray(write(params, ids, mask, jax.random.fold_in(jax.random.key(options.seed), start)))
    return [
        _read(tokenizer, row[own > 0].tolist(), made.tolist(), stops)
        for row, own, made in zip(ids, mask, new, strict=True)
    ]


def _read(tokenizer: Tokenizer, prompt: list[int], made: list[int], stops: tuple[int, ...]) -> Answer:
    """New tokens as text, as they follow the prompt: a tokenizer may begin each text of its own without a space."""
    stop = next((i for i, token in enumerate(made) if token in stops), None)
    kept = made[:stop]
    before, whole = (tokenizer.fast.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *kept]))
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.fast.decode(kept, skip_special_tokens=True)
    return Answer(text, len(made if stop is None else made[: stop + 1]), stop is not None)
