"""`explain`: what `lift` makes of a function, use by use: factored or formed, where, in which order, at what cost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from lora_jax.interpreter import Interpreter
from lora_jax.lift import attached, probe
from lora_jax.strategy import Strategy, planned
from lora_jax.table import dimensions, quantity, table
from lora_jax.uses import Use


@dataclasses.dataclass(frozen=True)
class Explained:
    """One use of an adapted leaf, or a leaf without any.

    Attributes:
      path: The leaf's path.
      shape: The leaf's shape.
      use: The use; None where the function does not read the leaf, or hands it on as it is.
    """

    path: str
    shape: tuple[int, ...]
    use: Use | None

    @property
    def factored(self) -> bool:
        """Whether W and ΔW stay apart in this use."""
        return self.use is None or self.use.kind != "other"


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """The table that `explain` returns; `str` draws it.

    Attributes:
      rows: One for each use of each adapted leaf, in the order of the leaves and of the program.
    """

    rows: tuple[Explained, ...]

    @property
    def materialized(self) -> tuple[Explained, ...]:
        """The uses that form the whole matrix W + ΔW."""
        return tuple(row for row in self.rows if not row.factored)

    @property
    def base_flops(self) -> int:
        """FLOPs of the forward pass with the bases of adapted leaves."""
        return round(sum(row.use.cost.base / len(row.use.paths) for row in self.rows if row.use))

    @property
    def low_rank_flops(self) -> int:
        """FLOPs of the forward pass with the factors."""
        return round(sum(row.use.cost.low_rank / len(row.use.paths) for row in self.rows if row.use))

    def __str__(self) -> str:
        """The table, one line for each use."""
        head = ("path", "shape", "use", "at", "times", "base FLOPs", "low-rank", "order")
        foot = ("total", "", "", "", "", quantity(self.base_flops), quantity(self.low_rank_flops), "")
        return table(head, [_line(row) for row in self.rows], foot, numbers=(4, 5, 6))

    __repr__ = __str__


def _line(row: Explained) -> tuple[str, ...]:
    use = row.use
    if use is None:
        return (row.path, dimensions(row.shape), "not used", "", "", "", "", "")
    kind = use.kind if row.factored else f"FORMED for {use.primitive}"
    with_ = f" (with {len(use.paths) - 1} more)" if len(use.paths) > 1 else ""
    cost = quantity(use.cost.base), quantity(use.cost.low_rank)
    return (row.path, dimensions(row.shape), kind + with_, use.where, str(use.times), *cost, use.cost.order)


def explain(fun: Callable[..., Any], *, strategy: Strategy = "factored") -> Callable[..., Explanation]:
    """What `lift(fun)` does with each adapted leaf, instead of its result.

    Nothing is computed, and `jax.ShapeDtypeStruct` may stand for any array, also in what `attach` made.

    Args:
      fun: The function to be lifted.
      strategy: As in `lift`.

    Returns:
      A function of the lifted function's arguments, that returns an `Explanation`: for each use of each leaf, the
      user's line, whether W and ΔW stay apart there or are formed and by which primitive, FLOPs forward (two for each
      multiplication and addition) with the base and with the factors, and the contraction order: x is the activation,
      A, B, C ... are the network's factors in the order that the variant gives them. What several leaves are joined
      to counts in full for each, and once in the total.

    Raises:
      ValueError: On a call, where no argument has an attached leaf.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}
    >>> frozen, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(rank=2)})
    >>> found = lora.explain(lambda p, x: x @ p["up"] @ p["down"])(lora.attach(frozen, lora_params), jnp.ones((4, 8)))
    >>> [(row.path, row.use.cost.base, row.use.cost.low_rank, row.use.cost.order) for row in found.rows]
    [('down', 2048, 640, '(x·A)·B'), ('up', 2048, 640, '(x·A)·B')]
    """

    @functools.wraps(fun)
    def explained(*args: Any, **kwargs: Any) -> Explanation:
        args, kwargs, weights = attached(args, kwargs)
        if not weights:
            raise ValueError("explain: no argument has an adapted leaf, so nothing is factored: give what attach made")
        interpreter = Interpreter(True, planned(strategy))
        probe(interpreter, fun, args, kwargs)
        rows = []
        for weight in weights:
            for path in weight.paths:
                uses = [use for used, use in interpreter.uses if used == path] or [None]
                rows += [Explained(path, weight.shape, use) for use in uses]
        return Explanation(tuple(rows))

    return explained
