"""Rows: examples in arrays, and the batches of a run, each a pure function of its step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.finetune.data.rendering import Example

NARROWEST = 32  # tokens: narrower programs are hardly faster
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of tokens, one after the other as they are, and padded when they are taken.

    Attributes:
      columns: What each token has, by name, [tokens]; "input_ids" among them.
      starts: Where each row begins in these, and where the last one ends, [N + 1].
      widths: The lengths, ascending, that batches are padded to: the first that holds the longest of their rows.
      pad: The token that fills rows up; other columns are filled up with 0.
      labels: The class of each row, int32 [N]; None where rows have none.
    """

    columns: Mapping[str, np.ndarray]
    starts: np.ndarray
    widths: tuple[int, ...]
    pad: int
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each row, [N]."""
        return np.diff(self.starts)

    def take(self, places: Sequence[int] | np.ndarray, size: int | None = None) -> Batch:
        """Rows as a batch.

        Args:
          places: Which.
          size: How many rows the batch is to have; further ones are empty, and nothing of them counts: their labels
            are -1. None: as many as places.

        Returns:
          The columns, each [size, width]; and where rows have labels, "labels" [size].
        """
        longest = int(max((self.starts[i + 1] - self.starts[i] for i in places), default=0))
        width = next(width for width in self.widths if width >= longest)
        batch = {}
        for name, column in self.columns.items():
            shape = (size or len(places), width)
            rows = np.full(shape, self.pad if name == "input_ids" else 0, column.dtype)
            for row, i in zip(rows, places, strict=False):
                part = column[self.starts[i] : self.starts[i + 1]]
                row[: len(part)] = part
            batch[name] = rows
        if self.labels is not None:
            empty = np.full((size or len(places)) - len(places), -1, np.int32)
            batch["labels"] = np.concatenate([self.labels[np.asarray(places, int)], empty])
        return batch

    def batches(self, size: int) -> Iterator[Batch]:
        """All rows once, in their order; the last batch is filled up with empty rows, of which nothing counts."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))), size)


def packed(examples: Sequence[Example], length: int, pad: int) -> Rows:
    """Several examples in a row, by best fit, the longest first: as few rows as that finds, all of one length.

    Columns are `input_ids` int32, `mask` bool, which tokens count, and `segment_ids` int32: from 1 on in each row, one
    for each example, as none sees another; 0 is padding.

    >>> examples = [Example(np.arange(n, dtype=np.int32), np.arange(n) > 0, "") for n in (2, 3, 1)]
    >>> packed(examples, 4, pad=9).take([0, 1])["segment_ids"]
    array([[1, 1, 1, 2],
           [1, 1, 0, 0]], dtype=int32)
    """
    bins = _best_fit([len(example.ids) for example in examples], length)
    order = [examples[i] for row in bins for i in row]
    segments = np.concatenate([np.arange(1, len(row) + 1) for row in bins])
    sizes = np.array([len(example.ids) for example in order])
    columns = {
        "input_ids": np.concatenate([example.ids for example in order]),
        "mask": np.concatenate([example.mask for example in order]),
        "segment_ids": np.repeat(segments, sizes).astype(np.int32),
    }
    ends = np.cumsum([len(row) for row in bins])
    starts = np.concatenate([[0], np.cumsum(sizes)[ends - 1]])
    return Rows(columns, starts, (length,), pad)


def padded(examples: Sequence[Example], length: int, pad: int, labels: Sequence[Any] | None = None) -> Rows:
    """One example in a row; batches are as wide as their longest needs, of 32, 64 and so on up to the length.

    Columns are `input_ids` int32 and `attention_mask` int32, 1 at tokens and 0 at padding. To predict tokens: `mask`
    bool, those that count, and `segment_ids`, as the attention mask. To classify pairs: `token_type_ids` int32.

    Args:
      examples: None longer than the length.
      length: Of the widest batch.
      pad: What fills rows up.
      labels: All classes, in order, where examples are to be classified.
    """
    ids = np.concatenate([example.ids for example in examples])
    ones = np.ones(len(ids), np.int32)
    columns, numbers = {"input_ids": ids, "attention_mask": ones}, None
    if labels is None:
        columns |= {"mask": np.concatenate([example.mask for example in examples]), "segment_ids": ones}
    else:
        if types := [example.types for example in examples if example.types is not None]:
            columns["token_type_ids"] = np.concatenate(types).astype(np.int32)
        number = {label: i for i, label in enumerate(labels)}
        numbers = np.array([number[example.label] for example in examples], np.int32)
    starts = np.concatenate([[0], np.cumsum([len(example.ids) for example in examples])])
    return Rows(columns, starts, _widths(length), pad, numbers)


class Batches:
    """The batches of a run, without end: pass after pass over the rows, each in an order of its own.

    It is an iterator that says and takes its place, and `batch(step)` is any of them: a pure function of the rows, the
    size, the seed and the step. Each row comes once in a pass; a batch may hold the end of one and the start of the
    next.

    Args:
      rows: What to draw from.
      size: How many rows a batch has.
      seed: Of the orders.
    """

    def __init__(self, rows: Rows, size: int, seed: int):
        self.rows, self.size, self.seed, self.step = rows, size, seed, 0
        self._order = functools.lru_cache(maxsize=2)(self._drawn)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        places = np.arange(step * self.size, (step + 1) * self.size)
        passes, places = np.divmod(places, len(self.rows))
        return self.rows.take([int(self._order(int(n))[i]) for n, i in zip(passes, places, strict=True)])

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        self.step += 1
        return self.batch(self.step - 1)

    def get_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.step}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As `get_state` gave it."""
        self.step = state["step"]

    def _drawn(self, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number]).permutation(len(self.rows))


def _widths(length: int) -> tuple[int, ...]:
    """
    >>> _widths(100), _widths(16)
    ((32, 64, 100), (16,))
    """
    powers = [NARROWEST << i for i in range(32)]
    return (*(width for width in powers if width < length), length)


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which examples share a row: the longest first, each in the fullest row that has room for it.

    >>> _best_fit([2, 5, 3, 6, 4], 8)
    [[3, 0], [1, 2], [4]]
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by how many tokens they have room for
    some = np.zeros(length + 1, bool)
    for i in np.argsort([-size for size in sizes], kind="stable").tolist():
        size = sizes[i]
        room = size + int(some[size:].argmax()) if size <= length else 0
        if some[room] and room >= size:
            row = with_room[room].pop()
            some[room] = bool(with_room[room])
            rows[row].append(i)
        else:
            row, room = len(rows), length
            rows.append([i])
        with_room[room - size].append(row)
        some[room - size] = room > size
    return rows
