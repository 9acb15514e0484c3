"""The demo's data: sentences of Python's own documentation, half of them with two neighboring words swapped.

Judging whether a sentence is well formed is the task of CoLA (Warstadt et al. 2018, arXiv:1805.12471), in GLUE. Here
the sentences come from the docstrings of the standard library and the texts of `help()`, so every Python has them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHORTEST, LONGEST = 6, 30  # words in a sentence
TEST_SHARE = 0.2  # of the files, more or less of the sentences
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # folders that hold no library code

WORD = re.compile(r"[A-Za-z][a-z]*(?:['-][a-z]+)*[,;:.]?")  # no names of code, no quotes, no brackets
PLAIN = re.compile(r"[a-z]+")  # what is swapped: neither a capital nor punctuation gives the place away
END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


class Example(NamedTuple):
    """A sentence as it was written, as the model sees it, and the file that it is from."""

    original: str
    text: str
    file: str

    @property
    def swapped(self) -> bool:
        """The label: whether two neighboring words have changed places."""
        return self.text != self.original


def load(seed: int, limit: int | None = None) -> tuple[list[Example], list[Example]]:
    """Sentences to train on and sentences to test on; no file has sentences in both, and half of each are swapped.

    Args:
      seed: Chooses which sentences are swapped, and where. Which sentences there are depends on the Python alone.
      limit: The most sentences to return, in both together; None for all.

    Returns:
      Training and test examples. The same seed, limit and Python give the same ones.

    Raises:
      ValueError: This Python comes without the source of its standard library.
    """
    rng = np.random.default_rng(seed)
    pairs = collect()
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    train = [(sentence, file) for sentence, file in pairs if not is_test(file)]
    test = [(sentence, file) for sentence, file in pairs if is_test(file)]
    if limit is not None:
        train, test = train[: round(limit * (1 - TEST_SHARE))], test[: round(limit * TEST_SHARE)]
    return half_swapped(rng, train), half_swapped(rng, test)


@functools.cache
def collect() -> tuple[tuple[str, str], ...]:
    """Every sentence once, with the first file that has it."""
    found: dict[str, tuple[str, str]] = {}
    for file, text in documents():
        for sentence in sentences(text):
            found.setdefault(sentence.lower(), (sentence, file))
    if len(found) < 1000:
        raise ValueError(
            f"only {len(found)} sentences in {sysconfig.get_path('stdlib')}: the demo reads the docstrings of the "
            "standard library, so take a Python that comes with its .py files"
        )
    return tuple(found.values())


def documents() -> Iterator[tuple[str, str]]:
    """Each docstring of the standard library, and each topic of `help()`, with the name of its file."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        if SKIPPED.isdisjoint(file.parts):
            for text in docstrings(path.read_bytes()):
                yield file.as_posix(), text
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield "pydoc_data/topics.py", topics[name]


def docstrings(source: bytes | str) -> list[str]:
    """The docstrings of a module, of its classes and of its functions; none where the source does not parse.

    >>> docstrings("def f():\\n  '''Return nothing.'''")
    ['Return nothing.']
    """
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in other people's strings
            nodes: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError):  # templates, and samples of what must not parse
        return []
    for node in nodes:  # which grows by what is in them; an expression has none within
        nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
    return [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text that are prose, 6 to 30 words long, and have two words that could be swapped.

    >>> list(sentences("Return the\\n  sum of all of the numbers. It is fast.\\n\\n>>> sum([1])"))
    ['Return the sum of all of the numbers.']
    """
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in END.split(" ".join(paragraph.split())):
            words = sentence.split()
            if (
                SHORTEST <= len(words) <= LONGEST
                and sentence[0].isupper()
                and sentence[-1] == "."
                and all(WORD.fullmatch(word) for word in words)
                and places(words)
            ):
                yield sentence


def places(words: Sequence[str]) -> list[int]:
    """Where a word and the next can be swapped: both are plain, and they differ.

    >>> places("Close the file, then the the socket.".split())
    [3]
    """
    plain = [PLAIN.fullmatch(word) is not None for word in words]
    return [i for i in range(len(words) - 1) if plain[i] and plain[i + 1] and words[i] != words[i + 1]]


def swap(rng: np.random.Generator, sentence: str) -> str:
    """The sentence with two neighboring words swapped, at a place drawn from those possible.

    >>> swap(np.random.default_rng(0), "Close the file, then the socket.")
    'Close the file, the then socket.'
    """
    words = sentence.split()
    i = rng.choice(places(words))
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def half_swapped(rng: np.random.Generator, pairs: Iterable[tuple[str, str]]) -> list[Example]:
    """Examples of (sentence, file) pairs, every second one swapped; of an odd number the last is left out.

    >>> pairs = [("It will be a list.", "a.py"), ("It must be a tuple.", "b.py")]
    >>> [example.text for example in half_swapped(np.random.default_rng(0), pairs)]
    ['It will be a list.', 'It must a be tuple.']
    """
    pairs = list(pairs)
    pairs = pairs[: len(pairs) // 2 * 2]
    return [Example(s, swap(rng, s) if i % 2 else s, file) for i, (s, file) in enumerate(pairs)]


def is_test(file: str) -> bool:
    """Whether a file's sentences are held out, decided by its name: in every Python the same."""
    return hashlib.sha256(file.encode()).digest()[0] < 256 * TEST_SHARE
