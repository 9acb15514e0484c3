"""Use: one place where a function consumes a leaf, as the interpreter meets it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lora_jax.axes import Axis
from lora_jax.order import Cost


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a leaf: what consumes it, where, and which of the leaf's dimensions play which part.

    Attributes:
      kind: "linear", "conv", "embedding" (rows are looked up), "sum" (over some dimensions, as for a norm), "vector"
        (it is one, or one is taken out of it), or "other" (the whole matrix is needed).
      in_axes: Dimensions that are summed over (or, of an embedding, looked up).
      out_axes: Dimensions that the result has.
      primitive: The JAX primitive that consumes it.
      where: The user's line.
      times: How often a call of the function uses it, as far as is known: loops of known length count.
      cost: What all of these cost together.
      paths: The leaves that are used together, this one among them: those of a concatenation or a sum.
      window_axes: Of a convolution, those of the `in_axes` that are its window's, and no channels.
    """

    kind: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    primitive: str
    where: str
    times: int = 1
    cost: Cost = Cost()
    paths: tuple[str, ...] = ()
    window_axes: tuple[int, ...] = ()


def dimensions(axes: Iterable[Axis], path: str) -> tuple[int, ...]:
    """Which dimensions of the leaf at `path` these axes come from.

    >>> dimensions([Axis("1.0", 8, (("w", 1),)), Axis("1.1", 64, (("w", 1),)), Axis("rank", 4)], "w")
    (1,)
    """
    return tuple(sorted({d for axis in axes for root, d in axis.roots if root == path}))
