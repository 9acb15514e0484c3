"""`summary`: what trains, leaf by leaf, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax import tree
from lora_jax.factors import Adapter, together
from lora_jax.table import dimensions, table
from lora_jax.variants.base import FROZEN


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted leaf: its path and shape, its variant and rank (None where it has none), and what trains there."""

    path: str
    shape: tuple[int, ...]
    variant: str
    rank: int | None
    parameters: int
    share: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """The table that `summary` returns; `str` draws it.

    Attributes:
      rows: One for each adapted leaf.
      trained: How many numbers train.
      total: How many numbers the base has.
    """

    rows: tuple[Row, ...]
    trained: int
    total: int

    @property
    def share(self) -> float:
        """Trained numbers over the base's."""
        return self.trained / max(self.total, 1)

    def __str__(self) -> str:
        """The table, one line for each leaf, under 100 columns where the paths allow."""
        head = ("path", "shape", "variant", "rank", "parameters", "share")
        body = [
            (
                row.path,
                dimensions(row.shape),
                row.variant,
                "" if row.rank is None else str(row.rank),
                f"{row.parameters:,}",
                f"{row.share:.2%}",
            )
            for row in self.rows
        ]
        foot = ("total", f"{self.total:,}", "", "", f"{self.trained:,}", f"{self.share:.2%}")
        return table(head, body, foot, numbers=(3, 4, 5))


def summary(params: Any, lora_params: Mapping[str, Adapter]) -> Summary:
    """What trains, leaf by leaf, and in all.

    Args:
      params: The base: the tree given to `split`, or the frozen one it returned; abstract arrays will do.
      lora_params: What `split` returned second.

    Returns:
      A `Summary`; a leaf's share is what trains there over the leaf's size. Factors that do not train do not count.

    Raises:
      ValueError: A path of `lora_params` is not in `params`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"kernel": jnp.ones((512, 512)), "bias": jnp.ones(512)}
    >>> frozen, lora_params = lora.split(jax.random.key(0), params, {"kernel": lora.LoRA(rank=2), "bias": lora.Full()})
    >>> print(lora.summary(frozen, lora_params))
    path    shape    variant  rank  parameters    share
    ──────  ───────  ───────  ────  ──────────  ───────
    bias    512      Full                  512  100.00%
    kernel  512×512  LoRA        2       2,048    0.78%
    ──────  ───────  ───────  ────  ──────────  ───────
    total   262,656                      2,560    0.97%
    """
    leaves, _ = tree.flatten(params)
    lora_params = together(lora_params)
    missing = [path for path in lora_params if path not in leaves]
    if missing:
        raise ValueError(f"the tree has no leaf at {missing[0]!r}{tree.close_to(missing[0], leaves)}")
    rows = []
    for path, adapter in sorted(lora_params.items()):
        labels = adapter.variant.labels()
        size = sum(array.size for name, array in adapter.factors.items() if labels[name] != FROZEN)
        rank = getattr(adapter.variant, "rank", None)
        share = size / max(leaves[path].size, 1)
        rows.append(Row(path, adapter.site.shape, type(adapter.variant).__name__, rank, size, share))
    total = sum(leaf.size for leaf in leaves.values() if tree.is_array(leaf))
    return Summary(tuple(rows), sum(row.parameters for row in rows), total)
