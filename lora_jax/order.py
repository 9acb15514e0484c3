"""The cheapest order to multiply a tensor network in that never forms a whole weight, and what it costs."""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Sequence, Set

from lora_jax.axes import Axes, Axis, size_of

Order = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a contraction costs, forward.

    Attributes:
      base: FLOPs with a weight's base, two for each multiplication and addition.
      low_rank: FLOPs with its factors.
      order: The order of the products, such as "(x·A)·B"; sums of several contractions are joined by " + ".
    """

    base: int = 0
    low_rank: int = 0
    order: str = ""

    def times(self, n: int) -> Cost:
        """The cost of `n` such contractions.

        >>> Cost(10, 2, "x·A").times(3)
        Cost(base=30, low_rank=6, order='x·A')
        """
        return dataclasses.replace(self, base=n * self.base, low_rank=n * self.low_rank)


def letters(n: int) -> tuple[str, ...]:
    """What the factors of a network are called in an expression.

    >>> letters(3), letters(28)[-2:]
    (('A', 'B', 'C'), ('A1', 'B1'))
    """
    return tuple(string.ascii_uppercase[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(n))


def order(
    operands: tuple[Axes, ...],
    out: frozenset[Axis],
    whole: frozenset[Axis] = frozenset(),
    frozen: frozenset[int] = frozenset(),
    lead: bool = True,
) -> Order:
    """The cheapest sequence of pairs i < j to multiply, each product taking the place of its left operand.

    The cost is the number of multiplications of a training step: those of each product, and again those of the
    gradient of each of the two that has one, as all operands do but the `frozen`. No product of factors alone may carry
    all of `whole`; the first operand is no factor if it is a `lead`, that is an activation.

    >>> n, d, r, k = Axis("n", 64), Axis("d", 512), Axis("r", 8), Axis("k", 512)
    >>> order(((n, d), (d, r), (r, k)), frozenset({n, k}))  # (x·A)·B, not x·(A·B)
    ((0, 1), (0, 1))
    >>> operands = (n, d), (d, r), (r, k), (k,)
    >>> order(operands, frozenset({n, k}), frozen=frozenset({1, 2}))  # ((x·A)·B)·b, not (x·A)·(B·b)
    ((0, 1), (0, 1), (0, 1))
    """
    return _search(operands, out, whole, frozen, lead)[1]


def work(
    operands: Sequence[Axes],
    out: Axes,
    names: Sequence[str],
    whole: Set[Axis] = frozenset(),
    frozen: Set[int] = frozenset(),
    order: Callable[..., Order] = order,
) -> tuple[int, str]:
    """The FLOPs of `contract`, and its order as an expression over `names`, one for each operand.

    >>> n, d, r, k = Axis("n", 64), Axis("d", 512), Axis("r", 8), Axis("k", 512)
    >>> work([(n, d), (d, r), (r, k)], (n, k), "xAB")
    (1048576, '(x·A)·B')
    """
    return _work(tuple(operands), tuple(out), tuple(names), frozenset(whole), frozenset(frozen), order)


@functools.lru_cache(maxsize=4096)
def _work(
    operands: tuple[Axes, ...],
    out: Axes,
    names: tuple[str, ...],
    whole: frozenset[Axis],
    frozen: frozenset[int],
    order: Callable[..., Order],
) -> tuple[int, str]:
    live = [tuple(a for a in axes if a in kept) for axes, kept in zip(operands, needed(operands, out), strict=True)]
    words, flops = list(names), 0
    for i, j in order(tuple(live), frozenset(out), whole, frozen):
        right, left = live.pop(j), live.pop(i)
        union, keep = frozenset(left) | frozenset(right), frozenset(out).union(*live)
        flops += size_of(union) * (1 if union <= keep else 2)
        live.insert(i, tuple(union & keep))
        word = words.pop(j)
        words[i] = f"({words[i]}·{word})"
    return flops, words[0].removeprefix("(").removesuffix(")") if len(names) > 1 else words[0]


def needed(operands: Sequence[Axes], out: Axes) -> list[frozenset[Axis]]:
    """For each operand, the axes that the result or another operand has."""
    return [frozenset(out).union(*operands[:i], *operands[i + 1 :]) for i in range(len(operands))]


@functools.lru_cache(maxsize=4096)
def _search(
    operands: tuple[Axes, ...], out: frozenset[Axis], whole: frozenset[Axis], frozen: frozenset[int], lead: bool
) -> tuple[float, Order]:
    if len(operands) == 1:
        return 0, ()
    best: tuple[float, Order] = (math.inf, ())
    for i in range(len(operands)):
        for j in range(i + 1, len(operands)):
            union = frozenset(operands[i]) | frozenset(operands[j])
            product = tuple(sorted(union & out.union(*operands[:i], *operands[i + 1 : j], *operands[j + 1 :])))
            if (i > 0 or not lead) and whole and whole.issubset(product):
                continue
            rest = operands[:i] + (product,) + operands[i + 1 : j] + operands[j + 1 :]
            moving = (i not in frozen) + (j not in frozen)
            held = {n - (n > j) for n in frozen if n not in (i, j)} | (set() if moving else {i})
            cost, tail = _search(rest, out, whole, frozenset(held), lead)
            # A size that is not known yet (of an exported function) counts as that of a large batch.
            known = math.prod(axis.size if isinstance(axis.size, int) else 4096 for axis in union)
            best = min(best, (known * (1 + moving) + cost, ((i, j), *tail)))
    return best
