"""Dataset: the files of a run as rows to train on and rows to evaluate on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.finetune.data.fitting import TOO_LONG, fitted
from lora_jax.finetune.data.holding import held_out, parted, without
from lora_jax.finetune.data.kinds import KINDS, Kind, typed
from lora_jax.finetune.data.rendering import Example, render
from lora_jax.finetune.data.rows import Rows, packed, padded
from lora_jax.finetune.data.sources import Record, read
from lora_jax.finetune.data.tokenizer import Tokenizer
from lora_jax.finetune.settings import Settings

MANY = 100  # classes: with fewer examples each may be one's only one


class Counts(NamedTuple):
    """What a part of the data comes to.

    Attributes:
      examples: How many, of those in its rows; pieces of one text count as many.
      tokens: Tokens in its rows, without padding.
      counted: Tokens that the loss predicts; 0 where examples are classified.
      rows: How many rows.
      padding: The share of the places in its rows that is padding, were each row a batch.
      cut: Examples that were longer than a row, and are in pieces or lost their end.
      dropped: Examples that were longer, and are left out.
      shared: Examples that are left out as they are among those to evaluate on.
    """

    examples: int
    tokens: int
    counted: int
    rows: int
    padding: float
    cut: int
    dropped: int
    shared: int


class Dataset(NamedTuple):
    """What a run trains on.

    Attributes:
      kind: "text", "completion", "chat" or "classification".
      length: Tokens of the longest row.
      train: Rows to train on.
      test: Rows to evaluate on; None for none.
      labels: The classes by name, in the order of their numbers; none where none are predicted.
      first: An example of those to train on, to look at.
      counts: What there is to train on.
      test_counts: What there is to evaluate on; None for none.
    """

    kind: str
    length: int
    train: Rows
    test: Rows | None
    labels: tuple[str, ...]
    first: Example
    counts: Counts
    test_counts: Counts | None


def of(
    settings: Settings, tokenizer: Tokenizer, task: str = "lm", *, positions: int, classes: Sequence[str] = ()
) -> Dataset:
    """Reads the files of a run, renders them, holds a part out, and fits all into rows.

    Args:
      settings: Of the run.
      tokenizer: The model's.
      task: "lm" or "classification".
      positions: The most tokens that the model takes, its max_position_embeddings.
      classes: Of a model that has some, in their order: labels are among them, or their numbers. None: all that occur.

    Raises:
      OSError: A file is missing.
      ModuleNotFoundError: A file is .parquet, and pyarrow is not installed.
      ValueError: A setting or a record is wrong; the message has the file and the line.
    """
    length = _length(settings, task, positions)
    kind, records = typed(_read(settings.data), task, settings.columns)
    others: list[Record] = []
    if settings.eval_data:
        other, others = typed(_read(settings.eval_data), task, settings.columns)
        if other != kind:
            what = f"{others[0].where}: its columns are those of {other.name}, and --data is {kind.name}"
            raise ValueError(f"{what}: evaluate on data of its kind, with its columns")
    document = kind.name == "text" and len(records) == 1 and settings.eval_share > 0 and not others
    if document:
        records, others = ([part] for part in parted(records[0], settings.eval_share))
    truncate = length if settings.too_long == "truncate" else None
    examples, tests = (list(render(kind, part, tokenizer, truncate)) for part in (records, others))
    order, names = _classes(examples, tests, classes) if task == "classification" else (None, ())
    shared = 0
    if settings.eval_data:
        every, examples = len(examples), without(examples, tests)
        shared = every - len(examples)
    elif settings.eval_share > 0 and not document:
        examples, tests = held_out(examples, settings.eval_share, settings.seed)
    train, counts = _fit(examples, settings, kind, length, tokenizer.pad, order)
    test, test_counts = _fit(tests, settings, kind, length, tokenizer.pad, order) if tests else (None, None)
    return Dataset(kind.name, length, train, test, names, examples[0], counts._replace(shared=shared), test_counts)


def _fit(
    examples: Sequence[Example], settings: Settings, kind: Kind, length: int, pad: int, labels: Sequence[Any] | None
) -> tuple[Rows, Counts]:
    """A part of the data in rows, and what it comes to."""
    fit = fitted(examples, length, settings.too_long, pieces=kind.name == "text")
    packing = labels is None if settings.packing is None else settings.packing
    rows = packed(fit.examples, length, pad) if packing else padded(fit.examples, length, pad, labels)
    counted = sum(int(example.mask.sum()) for example in fit.examples)
    tokens, places = int(rows.sizes.sum()), int(np.take(rows.widths, np.searchsorted(rows.widths, rows.sizes)).sum())
    padding = 1 - tokens / places
    return rows, Counts(len(fit.examples), tokens, counted, len(rows), padding, fit.cut, fit.dropped, 0)


def _read(files: Iterable[str]) -> Iterable[Record]:
    return (record for file in files for record in read(file))


def _length(settings: Settings, task: str, positions: int) -> int:
    """Tokens of a row, once the settings of the data are found right."""
    if task not in KINDS:
        raise ValueError(f"--task {task}: no task: known are {', '.join(KINDS)}")
    if settings.too_long not in TOO_LONG:
        raise ValueError(f"--too-long {settings.too_long}: known are {', '.join(TOO_LONG)}")
    if not 0 <= settings.eval_share < 1:
        raise ValueError(f"--eval-share {settings.eval_share}: give a share of the data from 0 to below 1, as 0.05")
    if settings.packing and task == "classification":
        raise ValueError("--packing: what is to be classified has a row of its own: leave --packing out")
    if settings.length is None:
        return min(512, positions)
    if not 2 <= settings.length <= positions:
        raise ValueError(f"--length {settings.length}: the model has {positions} positions: give 2 to {positions}")
    return settings.length


def _classes(
    examples: Sequence[Example], tests: Sequence[Example], known: Sequence[str]
) -> tuple[list[Any], tuple[str, ...]]:
    """All labels in the order of their classes, and the names of these."""
    first = examples[0]
    for example in (*examples, *tests):
        if type(example.label) is not type(first.label):
            what = f"{example.where}: its label is {example.label!r}, and that of {first.where} is {first.label!r}"
            raise ValueError(f"{what}: write all as whole numbers, or all as strings")
    bare: dict[Any, Example] = {}
    for example in (*examples, *tests):
        other = bare.setdefault(str(example.label).strip(), example)
        if other.label != example.label:
            what = f"{example.where}: its label {example.label!r} and {other.label!r} of {other.where} differ by spaces"
            raise ValueError(f"{what}: write them alike")
    found: set[Any] = {example.label for example in examples}
    numbers = all(str(label).isdecimal() for label in found)  # also those of .csv, which are strings
    order = sorted(found, key=(lambda label: (int(label), str(label))) if numbers else str)
    names = tuple(map(str, order))
    if known:
        by_number = numbers and not found <= {*known}
        kind: Any = type(first.label)
        order, names = [kind(i) for i in range(len(known))] if by_number else [*known], tuple(known)
    elif len(order) < 2:
        raise ValueError(f"{first.where}: all labels are {first.label!r}: there is nothing to tell apart; add others")
    elif len(order) == len(examples) > MANY:
        what = f"{first.where}: each of {len(order)} examples has a label of its own, as {first.label!r}"
        raise ValueError(f"{what}: name the column that has labels, as --columns label=NAME")
    every = {*order}
    for example in (*examples, *tests):
        if example.label not in every:
            whose = "the model's" if known else "those of --data"
            few = ", ".join(map(repr, order[:5])) + (" ..." if len(order) > 5 else "")
            what = f"{example.where}: its label is {example.label!r}, which is none of {whose}: {few}"
            raise ValueError(f"{what}; correct it, or leave it out")
    return order, names
