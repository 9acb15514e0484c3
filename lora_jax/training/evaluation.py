"""An evaluation: means over batches, of the lifted model as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import attach
from lora_jax.factors import LoraParams
from lora_jax.lift import lift
from lora_jax.training.step import Metrics, is_scalar, shapes, weighted


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
      fun: A scalar, called "loss" in the result, a dict of scalars, or both, as `(loss, metrics)`: each a mean over the
        batch. Give the same function each time; one made anew, as a lambda here would be, is compiled anew.
      frozen: As in `attach`, of arrays alone.
      lora_params: As in `attach`.
      batches: The batches; those of like shapes share a program, which is kept for the next evaluation.
      weight: What a batch counts by, such as its number of tokens; one of weight 0 counts for nothing. None where all
        count alike.

    Raises:
      ValueError: There are no batches; or `fun` or `weight` returns something else.

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
    loss, means = found if isinstance(found, tuple) and len(found) == 2 else (None, found)
    means = {**means} if isinstance(means, Mapping) else {"loss": means}
    means |= {} if loss is None else {"loss": loss}
    if not all(map(is_scalar, means.values())):
        raise ValueError(f"evaluate: fun returns a scalar, a dict of them, or (loss, metrics), not {shapes(found)}")
    counts, sums = weighted(weight, batch, jax.tree.map(jnp.float32, means))
    return sums, counts
