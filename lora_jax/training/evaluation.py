"""An evaluation: means over batches, of the lifted model as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import attach
from lora_jax.factors import LoraParams
from lora_jax.lift import lift
from lora_jax.training.step import Metrics, counted


def evaluate(
    fun: Callable[[Any, Any], Any],
    frozen: Any,
    lora_params: LoraParams,
    batches: Iterable[Any],
    *,
    weight: Callable[[Any], Any] | None = None,
) -> dict[str, float]:
    """The mean of what `fun(params, batch)` gives over batches, adapters lifted, nothing dropped.

    Args:
      fun: A scalar, called "loss" in the result, or a dict of scalars, each a mean over the batch.
      frozen: As in `attach`.
      lora_params: As in `attach`.
      batches: The batches; those of like shapes share a program, which is kept for the next evaluation.
      weight: What a batch counts by, such as its number of tokens; None where all count alike.

    Raises:
      ValueError: There are no batches.

    >>> import lora_jax as lora
    >>> frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> evaluate(lambda params, x: (x @ params["w"]).mean(), frozen, lora_params, [jnp.ones(8), jnp.zeros(8)])
    {'loss': 4.0}
    """
    sums, total = None, 0.0
    for batch in batches:
        found, counts = _evaluated(fun, weight, frozen, lora_params, batch)
        sums, total = found if sums is None else jax.tree.map(jnp.add, sums, found), total + counts
    if sums is None:
        raise ValueError("evaluate: there are no batches; if they come from an iterator, it has ended")
    return {name: float(x / total) for name, x in sums.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluated(fun: Any, weight: Any, frozen: Any, lora_params: Any, batch: Any) -> tuple[Metrics, jax.Array]:
    found = lift(fun)(attach(frozen, lora_params), batch)
    means = found if isinstance(found, dict) else {"loss": found}
    counts = counted(weight, batch)
    return {name: jnp.float32(x) * counts for name, x in means.items()}, counts
