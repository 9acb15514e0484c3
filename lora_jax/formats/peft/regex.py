"""Regex: whether a stranger's regular expression matches a name, in bounded time.

Python's `re` tries one way after another, of which a pattern may have exponentially many, and knows no time limit. Here
a part of a pattern takes all positions at once where a match of it may begin, to all where one may end, each a bit of
one number; and every such step is counted. The language is Python's, but for what has no such meaning: back references,
conditions, flags, atomic groups and possessive repetitions.

Source: Thompson 1968, "Regular expression search algorithm", https://doi.org/10.1145/363347.363387.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any

STEPS = 10_000_000  # for one folder; a name takes some dozens
LONGEST, DEEPEST = 2**15, 50
Node = tuple[Any, ...]

_TOKENS = re.compile(
    r"""(?P<open>\((?:\?(?:P<\w+>|<?[=!]|:))?) | (?P<close>\)) | (?P<or>\|)
      | (?P<repeat>[*+?]|\{(?=[\d,])\d*,?\d*\})(?P<how>[?+]?)
      | (?P<at>\\[AZb]|[\^$])
      | (?P<one>\[\^?\]?(?:\\.|[^\]\\])*\] | \\[dDwWsS] | \\[^A-Za-z0-9] | [^\\])""",
    re.VERBOSE | re.DOTALL,
)
_TIMES = {"*": (0, None), "+": (1, None), "?": (0, 1)}


def steps() -> Iterator[int]:
    """The steps that matching for one folder may take: what `matches` counts by."""
    return iter(range(STEPS))


def spend(steps: Iterator[int]) -> None:
    """Takes a step, where one is left.

    Raises:
      ValueError: None is.
    """
    if next(steps, None) is None:
        raise ValueError("the configuration's patterns take too long to match: give names instead")


def parse(pattern: str) -> Node:
    """A pattern as a tree, for `matches`.

    Raises:
      ValueError: It is no regular expression, is longer or deeper than any in earnest, or cannot be matched by sets.

    >>> parse("a|b*")
    ('or', (('and', (('one', 'a'),)), ('and', (('repeat', ('one', 'b'), 0, None),))))
    """
    try:
        if len(pattern) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST} characters")
        re.compile(pattern)
        return _parsed(pattern)
    except (ValueError, re.error, RecursionError, OverflowError, FutureWarning) as error:
        shown = pattern if len(pattern) < 80 else f"{pattern[:80]}..."
        raise ValueError(f"the pattern {shown!r}: {error}; give names instead, or a simpler pattern") from error


def matches(tree: Node, name: str, steps: Iterator[int], *, whole: bool = True) -> bool:
    """Whether a pattern matches a name, in full or from its start, as `re.fullmatch` and `re.match` tell.

    Raises:
      ValueError: The steps are used up.

    >>> matches(parse(r".*\\.(q|v)_proj"), "layers.0.q_proj", steps())
    True
    """
    ends = _Text(name, steps).ends(tree, 1)
    return bool(ends >> len(name)) if whole else bool(ends)


def _parsed(pattern: str) -> Node:
    stack: list[tuple[str, list[list[Node]]]] = [("", [[]])]
    position = 0
    while position < len(pattern):
        token = _TOKENS.match(pattern, position)
        kind = token and token.lastgroup
        if token is None or (kind == "open" and pattern.startswith("(?", position) and len(token[0]) == 1):
            raise ValueError(f"{pattern[position : position + 4]!r} at {position} is not supported")
        position = token.end()
        group, alternatives = stack[-1]
        if kind == "open":
            stack.append((token[0], [[]]))
            if len(stack) > DEEPEST:
                raise ValueError(f"its groups are more than {DEEPEST} deep")
        elif kind == "close":
            stack.pop()
            node = _group(group, alternatives)
            stack[-1][1][-1].append(node)
        elif kind == "or":
            alternatives.append([])
        elif token["repeat"]:
            if token["how"] == "+":
                raise ValueError(f"{token[0]!r} at {token.start()} is not supported")
            least, most = _TIMES.get(token["repeat"]) or _bounds(token["repeat"])
            alternatives[-1].append(("repeat", alternatives[-1].pop(), least, most))
        elif kind == "at":
            alternatives[-1].append(("at", token[0]))
        else:
            if token[0][0] == "[" and re.search(r"\[|--|&&|\|\||~~", token[0][1:]):
                raise ValueError(f"{token[0]!r} may come to mean something else: escape it")
            alternatives[-1].append(("one", token[0]))
    return _group("", stack[0][1])


def _group(opening: str, alternatives: list[list[Node]]) -> Node:
    parts = tuple(("and", tuple(parts)) for parts in alternatives)
    node = parts[0] if len(parts) == 1 else ("or", parts)
    look = opening.removeprefix("(?")
    return ("look", node, "<" in look, "!" in look) if look in ("=", "!", "<=", "<!") else node


def _bounds(text: str) -> tuple[int, int | None]:
    least, comma, most = text[1:-1].partition(",")
    return int(least or 0), (int(most) if most else None) if comma else int(least)


@functools.lru_cache(maxsize=2**14)
def _fits(one: str, character: str) -> bool:
    return re.fullmatch(one, character) is not None


class _Text:
    """A name that is matched: position i is bit i of a set of them."""

    def __init__(self, name: str, steps: Iterator[int]):
        self.name, self.steps = name, steps
        self.all = (2 << len(name)) - 1
        self.where: dict[str, int] = {}
        for i, character in enumerate(name):
            self.where[character] = self.where.get(character, 0) | 1 << i
        self.kinds: dict[str, int] = {}

    def ends(self, node: Node, starts: int) -> int:
        """Where matches end that begin at any of these."""
        spend(self.steps)
        kind, first, *rest = node
        if not starts:
            return 0
        if kind == "one":
            if first not in self.kinds:
                self.kinds[first] = sum(at for character, at in self.where.items() if _fits(first, character))
            return (starts & self.kinds[first]) << 1
        if kind == "and":
            return functools.reduce(lambda found, part: self.ends(part, found), first, starts)
        if kind == "or":
            return functools.reduce(lambda found, part: found | self.ends(part, starts), first, 0)
        if kind == "at":
            return self.at(first, starts)
        least, most = rest
        return self.looked(first, least, most, starts) if kind == "look" else self.repeated(first, least, most, starts)

    def repeated(self, node: Node, least: int, most: int | None, starts: int) -> int:
        """As `ends`, of a part that occurs from `least` to `most` times."""
        for _ in range(least):
            before, starts = starts, self.ends(node, starts)
            if starts == before:  # and so after any more; no name takes more rounds than it has characters
                break
        found = new = starts
        for _ in itertools.count() if most is None else range(most - least):
            new = self.ends(node, new) & ~found
            if not new:
                break
            found |= new
        return found

    def looked(self, node: Node, behind: bool, negated: bool, starts: int) -> int:
        """Those of the positions before or behind which a part matches, or does not."""
        if behind:
            holds = self.ends(node, self.all)
        else:
            holds = sum(1 << i for i in range(starts.bit_length()) if starts >> i & 1 and self.ends(node, 1 << i))
        return starts & (self.all & ~holds if negated else holds)

    def at(self, anchor: str, starts: int) -> int:
        """Those of the positions that are a start, an end, or a boundary of a word."""
        end = 1 << len(self.name)
        if anchor in ("^", r"\A"):
            return starts & 1
        if anchor in ("$", r"\Z"):
            return starts & (end | (end >> 1 if anchor == "$" and self.name.endswith("\n") else 0))
        words = sum(at for character, at in self.where.items() if _fits(r"\w", character))
        return starts & (words ^ words << 1)
