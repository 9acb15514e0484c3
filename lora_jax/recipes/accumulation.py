"""Gradient accumulation: the value and gradient of a large batch, a part at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulated(value_and_grad: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """The mean of `value_and_grad` over parts of the batch, one after another in a scan.

    Of a loss that is a mean over examples the result is that of the whole batch, up to rounding; of one that divides by
    something else, such as the number of tokens that count, it is the mean of the parts' means.

    Args:
      value_and_grad: A function `(trainable, batch, *args)` that returns a pytree of floating arrays, such as
        `jax.value_and_grad(loss)` does; sums are made in the dtypes that it returns.
      parts: How many parts; each leaf's leading axis is a multiple of it. Example i goes to part i modulo `parts`, so
        that a batch which is sharded along that axis stays where it is.

    Returns:
      A function of the same arguments with the same results.

    Raises:
      ValueError: On a call, for a leaf of the batch that does not divide.

    >>> import jax, jax.numpy as jnp
    >>> step = accumulated(jax.value_and_grad(lambda w, x: jnp.mean((x * w) ** 2)), 2)
    >>> step(jnp.array(3.0), jnp.arange(4.0))
    (Array(31.5, dtype=float32), Array(21., dtype=float32))
    """
    if parts < 1:
        raise ValueError(f"accumulated: {parts} parts: there is one at least")

    def divided(path: Any, x: Any) -> Any:
        if jnp.ndim(x) == 0 or x.shape[0] % parts:
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "batch"
            raise ValueError(
                f"{name!r} of the batch has shape {jnp.shape(x)}, which {parts} parts do not divide: take batches of a "
                "multiple of them, or another number of parts"
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    def whole(trainable: Any, batch: Any, *args: Any) -> Any:
        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(trainable, part, *args)), None

        rows = jax.tree_util.tree_map_with_path(divided, batch)
        first = jax.tree.map(lambda x: x[0], rows)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(value_and_grad, trainable, first, *args))
        total, _ = lax.scan(add, zeros, rows)
        return jax.tree.map(lambda x: x / parts, total)

    return whole
