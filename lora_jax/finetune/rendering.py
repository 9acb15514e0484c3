"""Rendering: a record becomes tokens, and which of them are to be predicted and count."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lora_jax.finetune.sources import Record
from lora_jax.finetune.tokenizer import Tokenizer


class Example(NamedTuple):
    """One example.

    Attributes:
      ids: Its tokens, int32 [n].
      mask: Which of them the loss predicts, bool [n]; never the first, which has none before it.
      where: The file and the line.
      label: Its class, where it has one.
    """

    ids: np.ndarray
    mask: np.ndarray
    where: str
    label: int | None = None


def render(record: Record, tokenizer: Tokenizer) -> Example:
    """An example of a record."""
    ids = tokenizer.fast.encode(record.fields["text"]).ids
    if tokenizer.eos is not None and ids[-1:] != [tokenizer.eos]:
        ids = [*ids, tokenizer.eos]
    mask = np.ones(len(ids), bool)
    mask[:1] = False
    return Example(np.array(ids, np.int32), mask, record.where)
