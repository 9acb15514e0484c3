"""Sentences as arrays: tokenized, put into buckets of like length, and drawn from them in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer

from lora_jax.demo.corpus import Example

Batch = dict[str, Any]  # arrays by name, with examples along their first axis


class Bucket(NamedTuple):
    """Examples padded to one length: where each stands in the list that was encoded, and their arrays."""

    places: np.ndarray
    arrays: Batch


def encode(tokenizer: Tokenizer, examples: Sequence[Example], lengths: Sequence[int]) -> list[Bucket]:
    """Token ids [N, L], attention mask [N, L] and labels [N] of examples, a bucket for each length L in use.

    Args:
      tokenizer: Makes tokens of text.
      examples: Sentences; one with more tokens than the largest length loses its last.
      lengths: In tokens, ascending.
    """
    tokenizer.no_padding()
    tokenizer.enable_truncation(lengths[-1])
    tokens = [encoding.ids for encoding in tokenizer.encode_batch([example.text for example in examples])]
    bucket_of = np.searchsorted(lengths, [len(ids) for ids in tokens])
    buckets = []
    for bucket, length in enumerate(lengths):
        places = np.flatnonzero(bucket_of == bucket)
        ids = np.zeros((len(places), length), np.int32)
        mask = np.zeros_like(ids)
        for row, place in enumerate(places):
            ids[row, : len(tokens[place])] = tokens[place]
            mask[row, : len(tokens[place])] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels(examples)[places]}
        buckets.append(Bucket(places, batch))
    return [bucket for bucket in buckets if len(bucket.places)]


def labels(examples: Sequence[Example]) -> np.ndarray:
    """1 for a swapped sentence, 0 for one as written, [N]."""
    return np.array([example.swapped for example in examples], np.int32)


def draw(rng: np.random.Generator, buckets: Iterable[Bucket], size: int, steps: int) -> list[Batch]:
    """As many batches as there are steps: every example once, in random order, then every example again ...

    Each batch is drawn from one bucket; what remains of a bucket sits out the round.

    Raises:
      ValueError: No bucket has as many examples as a batch.

    >>> bucket = Bucket(np.arange(5), {"labels": np.arange(5)})
    >>> [len(set(batch["labels"])) for batch in draw(np.random.default_rng(0), [bucket], size=2, steps=3)]
    [2, 2, 2]
    """
    batches: list[Batch] = []
    while len(batches) < steps:
        picks = []
        for bucket in buckets:
            order = rng.permutation(len(bucket.places))
            picks += [(bucket, order[end - size : end]) for end in range(size, len(order) + 1, size)]
        if not picks:
            raise ValueError(f"no bucket has {size} examples, a batch: take smaller batches or more sentences")
        for i in rng.permutation(len(picks)):
            bucket, rows = picks[i]
            batches.append({name: array[rows] for name, array in bucket.arrays.items()})
    return batches[:steps]


def apply(fun: Callable[[Any, Batch], jax.Array], params: Any, buckets: Iterable[Bucket], size: int = 64) -> np.ndarray:
    """What a jitted `fun(params, batch)` gives for each example, in the order of the list that was encoded.

    >>> fun = jax.jit(lambda params, batch: params * batch["labels"])
    >>> apply(
    ...     fun,
    ...     2,
    ...     [Bucket(np.array([2, 0]), {"labels": np.array([7, 5])}), Bucket(np.array([1]), {"labels": np.array([6])})],
    ... )
    array([10, 12, 14], dtype=int32)
    """
    places, results = [], []
    for bucket in buckets:
        count = len(bucket.places)
        places.append(bucket.places)
        for start in range(0, count, size):
            rows = np.arange(start, start + size) % count  # the last batch is filled up, so that it compiles no anew
            batch = {name: array[rows] for name, array in bucket.arrays.items()}
            results.append(np.asarray(fun(params, batch))[: count - start])
    return np.concatenate(results)[np.argsort(np.concatenate(places))]
