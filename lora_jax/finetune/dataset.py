"""Dataset: the files of a run as rows to train on and rows to evaluate on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lora_jax.finetune.rendering import Example, render
from lora_jax.finetune.rows import Rows, packed
from lora_jax.finetune.settings import Settings
from lora_jax.finetune.sources import read
from lora_jax.finetune.tokenizer import Tokenizer


class Dataset(NamedTuple):
    """What a run trains on.

    Attributes:
      train: Rows to train on.
      test: Rows to evaluate on; None for none.
      first: An example, to look at.
    """

    train: Rows
    test: Rows
    first: Example


def of(settings: Settings, tokenizer: Tokenizer) -> Dataset:
    """Reads, renders and packs."""
    examples = [render(record, tokenizer) for file in settings.data for record in read(file)]
    rows = packed(examples, settings.length, tokenizer.pad)
    held = max(1, int(len(rows["input_ids"]) * settings.eval_share))
    train, test = ({name: x[part] for name, x in rows.items()} for part in (np.s_[:-held], np.s_[-held:]))
    return Dataset(train, test, examples[0])
