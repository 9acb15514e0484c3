"""A step: the gradient of the factors alone, over one batch or its parts, clipped, and an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax.adapters import attach, dropout
from lora_jax.lift import lift
from lora_jax.recipes import accumulated
from lora_jax.training.state import State
from lora_jax.tree import is_array

Metrics = dict[str, Any]  # scalars by name


def make_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    needs_key: bool = False,
    accumulate: int = 1,
    weight: Callable[[Any], Any] | None = None,
    clip_norm: float | None = None,
    dtype: Any = None,
    shardings: Any = None,
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
    """A training step, jitted: `(state, frozen, batch) -> (state, metrics)`. It donates the state that it is given.

    Args:
      loss_fn: `loss_fn(params, batch)`, as of the model without adapters: a scalar, the mean over the batch. It is
        lifted here. Factors of variants with dropout are dropped, by another mask in each step.
      tx: What `optimizer` returned.
      has_aux: Whether `loss_fn` returns `(loss, metrics)`, with a dict of scalars.
      needs_key: Whether `loss_fn` takes a PRNG key as a third argument.
      accumulate: How many parts the batch is taken in, one after another; see `recipes.accumulated`.
      weight: `weight(part)`, what a part of the batch counts by, such as its number of tokens, where `loss_fn` divides
        by that; a part of weight 0 counts for nothing, even if its loss is 0/0. None where all parts count alike.
      clip_norm: The most that the norm of all gradients together may be; they are scaled down to it.
      dtype: What to compute in, such as `jnp.bfloat16`: floating arrays of the base and of the batch are cast to it.
        Factors, their gradients and the optimizer keep their own; parts are summed, and norms taken, in float32 at
        least. A base that has it already is not copied.
      shardings: How the state lies on a mesh, as of `lora.shardings(state, frozen)`, so that it stays so.

    Returns:
      The step. Its metrics are float32 scalars: "loss", "grad_norm" before clipping, and those of `loss_fn`.

    Raises:
      ValueError: An argument makes no sense; or, at the first step, `loss_fn` or `weight` returns something else, or a
        batch does not divide into the parts.

    >>> import lora_jax as lora
    >>> frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> tx = lora.optimizer(optax.adam(1e-2))
    >>> step = make_step(lambda params, x: jnp.mean((x @ params["w"]) ** 2), tx)
    >>> state, metrics = step(State.create(jax.random.key(1), lora_params, tx), frozen, jnp.ones((2, 8)))
    >>> int(state.step), float(metrics["loss"])
    (1, 64.0)
    """
    if accumulate < 1:
        raise ValueError(f"make_step(accumulate={accumulate}): a batch has one part at least")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"make_step(clip_norm={clip_norm}): the norm is positive, or None for no clipping")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"make_step(dtype={dtype!r}): what it computes in is a floating dtype, such as 'bfloat16'")
    if not isinstance(shardings, State | jax.sharding.Sharding | None):
        raise ValueError("make_step(shardings=...): they are of a State, as lora.shardings(state, frozen) gives them")
    lifted = lift(loss_fn)

    def value_and_grad(lora_params: Any, part: Any, frozen: Any) -> Any:
        batch, (key,) = part["batch"], part["key"]
        own = jax.random.split(key)

        def objective(lora_params: Any) -> Any:
            params = attach(_cast(frozen, dtype), dropout(own[0], lora_params))
            return _scalars(lifted(params, _cast(batch, dtype), *([own[1]] if needs_key else [])), has_aux)

        (loss, aux), grads = jax.value_and_grad(objective, has_aux=True)(lora_params)
        return weighted(weight, batch, ({"loss": loss, **aux}, grads))

    def step(state: State, frozen: Any, batch: Any) -> tuple[State, Metrics]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), accumulate)
        whole = value_and_grad if accumulate == 1 else accumulated(value_and_grad, accumulate)
        counts, means = whole(state.lora_params, {"batch": batch, "key": keys}, frozen)
        metrics, grads = jax.tree.map(lambda x: x / counts.astype(x.dtype), means)
        metrics["grad_norm"] = norm = optax.tree.norm(jax.tree.map(jnp.float32, grads))
        scale = jnp.float32(1) if clip_norm is None else jnp.minimum(1, clip_norm / norm)
        lora_params: Any = state.lora_params
        grads = jax.tree.map(lambda x, like: (x * scale.astype(x.dtype)).astype(like.dtype), grads, lora_params)
        updates, opt_state = tx.update(grads, state.opt_state, lora_params)
        lora_params = optax.apply_updates(lora_params, updates)
        return State(state.step + 1, lora_params, opt_state, state.key), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _cast(tree: Any, dtype: Any) -> Any:
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree)


def _scalars(found: Any, has_aux: bool) -> tuple[jax.Array, Metrics]:
    """What a loss function returned, in float32."""
    paired = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)
    loss, aux = found if has_aux and paired else (found, {})
    if has_aux > paired or not all(map(is_scalar, (loss, *aux.values()))):
        forms = {
            False: "a scalar, or with has_aux=True (loss, metrics)",
            True: "(loss, metrics), the latter a dict of scalars",
        }
        raise ValueError(
            f"make_step(has_aux={has_aux}): loss_fn returns {forms[has_aux]}; this one returns {shapes(found)}"
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(f"loss_fn returns {shapes(loss)}, which has no gradient: return a loss of floating dtype")
    if taken := {"loss", "grad_norm", "stop"} & {*aux}:
        raise ValueError(
            f"loss_fn's metrics have {sorted(taken)}, which the harness says itself: give them other names"
        )
    return jnp.float32(loss), {name: jnp.float32(x) for name, x in aux.items()}


def is_scalar(x: Any) -> bool:
    """Whether a metric is one number."""
    return isinstance(x, int | float) or (is_array(x) and x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.generic))


def shapes(found: Any) -> Any:
    """What a function returned, for an error."""
    return jax.tree.map(lambda x: f"{x.dtype}{[*x.shape]}" if is_array(x) else type(x).__name__, found)


def weighted(weight: Callable[[Any], Any] | None, batch: Any, means: Any) -> tuple[jax.Array, Any]:
    """What a batch counts by in a mean of several, a float32 scalar, and its own means times that.

    In float32 at least: float16 has no numbers above 65,504, and bfloat16 sums to 256 ones alone.
    """
    counts = jnp.float32(1 if weight is None else weight(batch))
    if counts.ndim:
        raise ValueError(f"weight(batch) is one number, such as a mask's sum, and this one has shape {counts.shape}")

    def product(x: jax.Array) -> jax.Array:
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        return jnp.where(counts == 0, 0, wide * counts.astype(wide.dtype))  # a mean over nothing is 0/0

    return counts, jax.tree.map(product, means)
