"""Preview: an example as the model meets it, in which what counts can be told from what does not."""

from __future__ import annotations

import itertools
import re
import textwrap
import unicodedata
from collections.abc import Sequence

import numpy as np

from lora_jax.finetune.data.rendering import Example
from lora_jax.finetune.data.tokenizer import Tokenizer

WIDTH = 80  # columns of a terminal
OPEN, CLOSE = "⟦", "⟧"
CONTROLS: dict[int, int | str] = {
    i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"
}  # as pictures, which move no cursor
CONTROLS |= {i: f"\\x{i:02x}" for i in range(0x7F, 0xA0)} | {i: f"\\u{i:x}" for i in (0x2028, 0x2029)}


def shown(example: Example, tokenizer: Tokenizer, labels: Sequence[str] = (), lines: int = 30) -> str:
    """An example as text, at most 80 columns wide: where it is from, how many tokens count, and its text.

    Args:
      example: As of `render`.
      tokenizer: What made it.
      labels: The classes, where it has one.
      lines: The most lines of text; what is between its beginning and its end is left out.

    Returns:
      Lines. What counts is in ⟦ ⟧; `⏎` is a line break, which is followed by one.
    """
    count = f"{len(example.ids)} tokens"
    if example.label is not None:
        places = f" of {', '.join(labels)}" if labels else ""
        head, body = f"{example.where}: {count}, label {example.label}{places}", tokenizer.text(example.ids)
    else:
        head = f"{example.where}: {count}, {int(example.mask.sum())} of them predicted, in {OPEN} {CLOSE}"
        edges = [0, *(np.flatnonzero(np.diff(example.mask)) + 1).tolist(), len(example.ids)]
        body = ""
        for start, end in itertools.pairwise(edges):
            # Decoders take off the space that a text begins with, so what is before goes with it.
            before, text = tokenizer.text(example.ids[:start]), tokenizer.text(example.ids[:end])
            text = text[len(before) :] if text.startswith(before) else tokenizer.text(example.ids[start:end])
            body += OPEN + text + CLOSE if example.mask[start] else text
    visible = body.translate(CONTROLS).expandtabs().removesuffix("\n").replace("\n", "⏎\n")
    wrapped = [line for paragraph in visible.split("\n") for line in _wrapped(paragraph, WIDTH - 2)]
    if len(wrapped) > lines:
        half = (lines - 1) // 2
        wrapped = [*wrapped[: lines - 1 - half], f"... {len(wrapped) - lines + 1} lines ...", *wrapped[-half:]]
    return "\n".join([*textwrap.wrap(head, WIDTH), *("  " + line.rstrip() for line in wrapped)])


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of whole words where they fit, by the places that characters take: two of Chinese ones, none of accents.

    >>> _wrapped("a bc 日本語", 5), _wrapped("abcdefg", 5)
    (['a bc ', '日本', '語'], ['abcde', 'fg'])
    """
    lines, used = [""], 0
    for word in re.findall(r"\S+\s*|\s+", text):
        if used + _places(word.rstrip()) > width and used:
            lines.append("")
            used = 0
        for character in word:
            wide = _places(character)
            if used + wide > width:
                lines.append("")
                used = 0
            lines[-1] += character
            used += wide
    return lines


def _places(text: str) -> int:
    return sum(0 if unicodedata.combining(x) else 1 + (unicodedata.east_asian_width(x) in "WF") for x in text)
