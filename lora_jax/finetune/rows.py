"""Rows: examples in arrays of one length, and the batches of a run, each a pure function of its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.finetune.rendering import Example

Rows = Mapping[str, np.ndarray]  # each [N, length], or [N]


def packed(examples: Sequence[Example], length: int, pad: int) -> dict[str, np.ndarray]:
    """Examples one after the other in rows: input_ids, mask and segment_ids, each [N, length]; segment 0 is padding.

    Longer ones are cut where a row ends.
    """
    ids, mask, segments = [], [], []
    for number, example in enumerate(examples):
        ids.append(example.ids)
        mask.append(example.mask)
        segments.append(np.full(len(example.ids), number))
    flat_ids, flat_mask, flat_segments = map(np.concatenate, (ids, mask, segments))
    rest = -len(flat_ids) % length
    rows = np.pad(flat_ids, (0, rest), constant_values=pad).reshape(-1, length).astype(np.int32)
    counts = np.pad(flat_mask, (0, rest)).reshape(-1, length)
    numbers = np.pad(flat_segments + 1, (0, rest)).reshape(-1, length)
    first = np.where(numbers > 0, numbers, numbers.max() + 1).min(axis=1, keepdims=True)
    numbers = np.where(numbers > 0, numbers - first + 1, 0).astype(np.int32)
    counts[:, 0] = False  # what is before it is in another row
    return {"input_ids": rows, "mask": counts, "segment_ids": numbers}


class Batches:
    """The batches of a run, without end: pass after pass over the rows, each in an order of its own.

    It is an iterator that says and takes its place, and `batch(step)` is any of them.
    """

    def __init__(self, rows: Rows, size: int, seed: int):
        self.rows, self.size, self.seed, self.step = rows, size, seed, 0
        self.number = len(next(iter(rows.values())))

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, counted from 0."""
        places = range(step * self.size, (step + 1) * self.size)
        chosen = [self._order(place // self.number)[place % self.number] for place in places]
        return {name: x[chosen] for name, x in self.rows.items()}

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self.step += 1
        return self.batch(self.step - 1)

    def get_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.step}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As `get_state` gave it."""
        self.step = state["step"]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.number)
