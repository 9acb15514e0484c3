"""Optimizing: AdamW for the factors, its rate along a schedule; LoRA+ and AdaLoRA's pruning where asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lora_jax as lora
from lora_jax import budget
from lora_jax.finetune.settings import Settings
from lora_jax.finetune.variant import learning_rate


def schedule(settings: Settings, steps: int) -> optax.Schedule:
    """The learning rate by the number of steps taken: up from zero, then down or level.

    >>> [round(float(schedule(Settings(learning_rate=1.0, schedule="linear"), 10)(step)), 2) for step in (0, 1, 10)]
    [0.0, 1.0, 0.0]
    """
    peak, warmup = learning_rate(settings), int(steps * settings.warmup)
    rest = max(steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run.

    Raises:
      ValueError: AdaLoRA's pruning is asked for of another variant, or to more than there is.
    """

    def adamw(rate: Any) -> optax.GradientTransformation:
        return optax.adamw(rate, weight_decay=settings.weight_decay)

    rate = schedule(settings, steps)
    if settings.lora_plus_ratio is None:
        tx = lora.optimizer(adamw(rate))
    else:
        tx = lora.lora_plus(adamw, rate, ratio=settings.lora_plus_ratio, embedding_learning_rate=rate)
    if settings.prune_to is None:
        return tx
    if settings.variant != "AdaLoRA":
        raise ValueError(f"--prune-to {settings.prune_to}: {settings.variant} has none to prune: take AdaLoRA")
    if steps < 3:
        raise ValueError(f"--prune-to {settings.prune_to}: {steps} steps leave no time for it: take 3 or more")
    # A tenth of the steps before the first is pruned, and a third after the last, about as in the paper.
    planned = budget.Schedule(steps, settings.prune_to, warmup_steps=steps // 10, final_steps=steps // 3)
    return pruned(tx, planned)


class Pruned(NamedTuple):
    """State: the optimizer's own, and how much each entry of E matters."""

    inner: Any
    importance: budget.Importance


def pruned(tx: optax.GradientTransformation, planned: budget.Schedule) -> optax.GradientTransformation:
    """An optimizer after each of whose steps what matters least of AdaLoRA's E is zero.

    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((64, 32))}, {"w": lora.AdaLoRA(rank=4)})
    >>> tx = pruned(lora.optimizer(optax.sgd(0.1)), budget.Schedule(total_steps=10, target_rank=1, final_steps=9))
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, lora_params), tx.init(lora_params), lora_params)
    >>> int(jnp.count_nonzero(optax.apply_updates(lora_params, updates)["w"].factors["E"]))
    1
    """

    def init(params: Any) -> Pruned:
        return Pruned(tx.init(params), budget.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Pruned]:
        grads = updates
        updates, inner = tx.update(grads, state.inner, params)
        stepped: Any = optax.apply_updates(params, updates)
        left, importance = budget.allocate(planned, state.importance, stepped, grads)
        # Where one is set to zero, its update is what takes it there, exactly.
        zeroed = jax.tree.map(
            lambda new, old, x, update: jnp.where((new == 0) & (old != 0), -x, update), left, stepped, params, updates
        )
        return zeroed, Pruned(inner, importance)

    return optax.GradientTransformation(init, update)
