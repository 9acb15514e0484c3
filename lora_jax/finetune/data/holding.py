"""Holding out: a part of the data that is not trained on, and shares no example with what is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lora_jax.finetune.data.rendering import Example
from lora_jax.finetune.data.sources import Record

REMEDY = "give a file as --eval-data, or --eval-share 0 to train without an evaluation"


def held_out(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and examples to evaluate on, each in their order; those of like tokens are on one side.

    Args:
      examples: Two different ones, or more.
      share: How many to hold out, of 1: drawn one by one until it is reached, and at least one.
      seed: Of the draw.

    Raises:
      ValueError: A side would be empty.

    >>> examples = [Example(np.array([i // 2]), np.array([True]), f"a.jsonl:{i}") for i in range(8)]
    >>> [[example.where for example in part] for part in held_out(examples, 0.25, seed=0)]
    [['a.jsonl:0', 'a.jsonl:1', 'a.jsonl:2', 'a.jsonl:3', 'a.jsonl:6', 'a.jsonl:7'], ['a.jsonl:4', 'a.jsonl:5']]
    """
    groups: dict[bytes, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(_digest(example), []).append(i)
    if len(groups) < 2:
        what = f"{len(examples)} examples, all alike," if len(examples) > 1 else "1 example"
        raise ValueError(f"{examples[0].where}: {what} cannot be parted into training and evaluation: {REMEDY}")
    wanted, members, held = max(1, round(share * len(examples))), [*groups.values()], set()
    for group in np.random.default_rng(seed).permutation(len(members)).tolist():
        if len(held) + len(members[group]) < len(examples) and (not held or len(held) + len(members[group]) <= wanted):
            held.update(members[group])
    train = [example for i, example in enumerate(examples) if i not in held]
    return train, [examples[i] for i in sorted(held)]


def without(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """Examples whose tokens are those of no other.

    Raises:
      ValueError: None is left.
    """
    seen = {_digest(example) for example in others}
    kept = [example for example in examples if _digest(example) not in seen]
    if not kept:
        raise ValueError("each example of --data is in --eval-data too: give other files to evaluate on")
    return kept


def parted(record: Record, share: float) -> tuple[Record, Record]:
    """A document in two, at the end of a paragraph, or else of a line, nearest to where its last `share` begins.

    Raises:
      ValueError: It has but one line.

    >>> [part.fields["text"] for part in parted(Record({"text": "One.\\n\\nTwo.\\n\\nThree."}, "a.txt", 1), 0.3)]
    ['One.\\n\\nTwo.\\n\\n', 'Three.']
    """
    text = record.fields["text"]
    target = round((1 - share) * len(text))
    for mark in ("\n\n", "\n"):
        before, after = text.rfind(mark, 0, target), text.find(mark, target)
        places = [place + len(mark) for place in (before, after) if place >= 0]
        # Of several empty lines, all go with what is before them.
        places = [len(text) - len(text[place:].lstrip("\n")) for place in places]
        places = [place for place in places if text[:place].strip() and text[place:].strip()]
        if places:
            cut = min(places, key=lambda place: abs(place - target))
            line = record.line + text.count("\n", 0, cut)
            return record._replace(fields={"text": text[:cut]}), record._replace(fields={"text": text[cut:]}, line=line)
    what = f"{record.where}: one document of one line cannot be parted into training and evaluation"
    raise ValueError(f"{what}: {REMEDY}")


def _digest(example: Example) -> bytes:
    return hashlib.blake2b(example.ids.tobytes(), digest_size=16).digest()
