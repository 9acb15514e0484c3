"""Fitting: what becomes of examples that are longer than a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lora_jax.finetune.data.rendering import Example

TOO_LONG = ("error", "truncate", "drop")


class Fitted(NamedTuple):
    """Examples no longer than a row.

    Attributes:
      examples: They.
      cut: How many were longer, and are in pieces or lost their end.
      dropped: How many were longer, and are left out.
    """

    examples: list[Example]
    cut: int
    dropped: int


def fitted(examples: Iterable[Example], length: int, too_long: str, pieces: bool) -> Fitted:
    """Examples of at most `length` tokens.

    Args:
      examples: Of any length.
      length: Of a row.
      too_long: "error"; "truncate", to keep the beginning, as `render` does it of what is to be classified; "drop", to
        leave them out.
      pieces: Whether longer ones are cut into pieces of a row instead, as plain text is. Each piece begins with the
        last token of the one before, so that every token is predicted once.

    Raises:
      ValueError: One is longer, and `too_long` is "error"; nothing of one counts once it is truncated; or none is left.

    >>> import numpy as np
    >>> found = fitted([Example(np.arange(5), np.arange(5) > 0, "a.txt:1")], 3, "error", pieces=True)
    >>> [(example.ids.tolist(), example.mask.tolist()) for example in found.examples]
    [([0, 1, 2], [False, True, True]), ([2, 3, 4], [False, True, True])]
    """
    kept, cut, dropped, where = [], 0, 0, ""
    for example in examples:
        size = len(example.ids)
        if size <= length:
            cut += example.cut
            kept.append(example)
        elif pieces:
            cut += 1
            for start in range(0, size - 1, length - 1):
                mask = example.mask[start : start + length].copy()
                mask[0] = False
                if mask.any():
                    kept.append(example._replace(ids=example.ids[start : start + length], mask=mask))
        elif too_long == "truncate":
            cut += 1
            kept.append(_truncated(example, length))
        elif too_long == "drop":
            dropped += 1
            where = where or example.where
        else:
            remedy = f"raise --length to {size}, or give --too-long truncate or --too-long drop"
            raise ValueError(f"{example.where}: it has {size} tokens, and a row has {length}: {remedy}")
    if not kept:
        raise ValueError(
            f"{where} and on: each of the {dropped} examples is longer than {length} tokens: raise --length"
        )
    return Fitted(kept, cut, dropped)


def _truncated(example: Example, length: int) -> Example:
    ids, mask = example.ids[:length], example.mask[:length]
    if not mask.any():
        what = f"{example.where}: none of its first {length} tokens counts, as what is to be learned is after them"
        raise ValueError(f"{what}: raise --length to {len(example.ids)}, or give --too-long drop")
    return example._replace(ids=ids, mask=mask)
