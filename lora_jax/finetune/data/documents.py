"""Documents: long text to the tokens that it has at once, encoded a part at a time, by all cores, in little memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers

PART, SHARED = 1 << 17, 1 << 11  # characters: of a part, and of what it has in common with the next
TOGETHER = 16  # parts that are encoded at a time
ALIKE = 8  # tokens on either side of a seam by which two parts agree


def encode(fast: tokenizers.Tokenizer, text: str, part: int = PART, shared: int = SHARED) -> np.ndarray:
    """The tokens of a text, int32, with those that the tokenizer sets around it.

    A tokenizer looks but a little way around a token, so two parts that have some text in common agree on the tokens in
    its middle. There they are joined.

    Args:
      fast: A tokenizer that neither pads nor truncates.
      text: Of any length.
      part: Characters that are encoded as one.
      shared: How many of them the next part has too.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> fast = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "Ġ": 3}, [("a", "b")]))
    >>> fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> text = "ab a b ba" * 20
    >>> encode(fast, text, part=64, shared=32).tolist() == fast.encode(text).ids
    True
    """
    if len(text) <= part:
        return np.array(fast.encode(text).ids, np.int32)
    around = fast.encode(text[:shared])
    outside = np.array(around.special_tokens_mask, bool)
    inside = np.flatnonzero(~outside)
    ids = np.array(around.ids, np.int32)
    joined = [ids[: inside[0]] if len(inside) else ids[:0]]
    at, before = 0, None  # the token of the part before from which on its tokens are not yet taken
    for tokens, starts in _parts(fast, text, part, shared):
        first = 0
        if before is not None:
            end, first = _seam(before, (tokens, starts), shared)
            joined.append(before[0][at:end])
        at, before = first, (tokens, starts)
    assert before is not None
    joined += [before[0][at:], ids[inside[-1] + 1 :] if len(inside) else ids[:0]]
    return np.concatenate(joined)


Part = tuple[np.ndarray, np.ndarray]  # tokens, and where each begins in the text


def _parts(fast: tokenizers.Tokenizer, text: str, part: int, shared: int) -> Iterator[Part]:
    places = range(0, len(text) - shared, part - shared)
    for i in range(0, len(places), TOGETHER):
        some = places[i : i + TOGETHER]
        found = fast.encode_batch([text[place : place + part] for place in some], add_special_tokens=False)
        for place, encoding in zip(some, found, strict=True):
            starts = np.array(encoding.offsets, np.int64).reshape(-1, 2)[:, 0] + place
            yield np.array(encoding.ids, np.int32), starts


def _seam(left: Part, right: Part, shared: int) -> tuple[int, int]:
    """How many tokens of the left part come first, and the token of the right part that follows them."""
    begin = int(right[1][0]) if len(right[1]) else 0
    middle = begin + shared // 2
    common: Sequence[int] = np.intersect1d(left[1][left[1] >= begin], right[1]).tolist()
    for place in sorted(common, key=lambda place: abs(place - middle)):
        i, j = (int(np.searchsorted(starts, place)) for _, starts in (left, right))
        if i >= ALIKE <= j and np.array_equal(left[0][i - ALIKE : i + ALIKE], right[0][j - ALIKE : j + ALIKE]):
            return i, j
    return int(np.searchsorted(left[1], middle)), int(np.searchsorted(right[1], middle))  # one token longer than all
