"""AdaLoRA's budget: how much each entry of E matters, and which of all leaves' entries may stay.

Pure functions of static shapes: an entry that is pruned is set to zero, and may grow back until the schedule ends.

Source: Zhang et al. 2023, https://arxiv.org/abs/2303.10512.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.factors import Adapter, LoraParams
from lora_jax.variants.adalora import AdaLoRA
from lora_jax.variants.hyperparameters import check_number


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many entries of E stay at each step: all of them, then fewer by a cubic law, then the target's.

    Args:
      total_steps: The steps of the whole run.
      target_rank: How many entries a matrix has in the end, on the average of all.
      warmup_steps: The steps before the first entry is pruned.
      final_steps: The last steps, in which what is left trains, and what is pruned stays so.
      every: How many steps there are from one pruning to the next.
      beta1: The share of the past in the moving average of sensitivities.
      beta2: The share of the past in that of their uncertainties.

    Raises:
      ValueError: Warm-up and final steps leave none in between, or a number is out of range.
    """

    total_steps: int
    target_rank: int = 8
    warmup_steps: int = 0
    final_steps: int = 0
    every: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        for name, least in (
            ("total_steps", 1),
            ("target_rank", 1),
            ("every", 1),
            ("warmup_steps", 0),
            ("final_steps", 0),
        ):
            check_number(self, name, lambda x, n=least: x >= n, f"it is a whole number, {least} or more", whole=True)
        if self.warmup_steps + self.final_steps >= self.total_steps:
            raise ValueError(
                f"{self.warmup_steps} steps of warm-up and {self.final_steps} final ones leave none of "
                f"{self.total_steps} in which to prune"
            )
        for name in ("beta1", "beta2"):
            check_number(self, name, lambda x: 0 < x < 1, "it is between 0 and 1")

    @property
    def end(self) -> int:
        """The step of the last pruning."""
        return self.total_steps - self.final_steps

    def budget(self, step: jax.typing.ArrayLike, start: int, target: int) -> jax.Array:
        """How many entries stay at a step, counted from 1, of `start` in the beginning and `target` in the end.

        >>> [int(Schedule(100, warmup_steps=20, final_steps=20).budget(step, 96, 32)) for step in (20, 50, 80, 100)]
        [96, 40, 32, 32]
        """
        left = 1 - (jnp.asarray(step, jnp.float32) - self.warmup_steps) / (self.end - self.warmup_steps)
        return jnp.floor((start - target) * jnp.clip(left, 0, 1) ** 3 + target).astype(jnp.int32)


class Importance(NamedTuple):
    """What is known of all entries after some steps; a pytree.

    Attributes:
      step: The number of steps.
      sensitivity: For each leaf and factor, the moving average of |factor · gradient|.
      uncertainty: Likewise, that of how far each step's value was from the average.
      kept: For each leaf, the entries of E that the last pruning left.
    """

    step: jax.Array
    sensitivity: dict[str, dict[str, jax.Array]]
    uncertainty: dict[str, dict[str, jax.Array]]
    kept: dict[str, jax.Array]


def init(lora_params: Mapping[str, Adapter]) -> Importance:
    """Nothing is known, and all is kept.

    Raises:
      ValueError: No leaf is under `AdaLoRA`.
    """
    leaves = _leaves(lora_params)
    if not leaves:
        raise ValueError(
            "no leaf is under AdaLoRA, so there is nothing to prune: give one of the rules AdaLoRA(rank=...)"
        )
    zeros = {path: jax.tree.map(jnp.zeros_like, dict(adapter.factors)) for path, adapter in leaves.items()}
    kept = {path: jnp.ones(adapter.factors["E"].shape, bool) for path, adapter in leaves.items()}
    return Importance(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, zeros), kept)


def allocate(
    schedule: Schedule, importance: Importance, lora_params: Mapping[str, Adapter], grads: Mapping[str, Adapter]
) -> tuple[LoraParams, Importance]:
    """The adapters with what matters least set to zero, to be called after each step of the optimizer.

    Args:
      schedule: When to prune how much.
      importance: What `init` or the last call returned.
      lora_params: The adapters after the optimizer's step.
      grads: The gradients that it was given.

    Returns:
      The adapters, of the same shapes, and what is known now.

    Raises:
      ValueError: The schedule's target is above the ranks that the adapters have on the average.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> from lora_jax import budget
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((64, 32))}, {"w": lora.AdaLoRA(rank=4)})
    >>> schedule = budget.Schedule(total_steps=10, target_rank=1, final_steps=9)
    >>> grads = jax.tree.map(jnp.ones_like, lora_params)
    >>> lora_params, state = budget.allocate(schedule, budget.init(lora_params), lora_params, grads)
    >>> int(state.kept["w"].sum())
    1
    """
    leaves, step = _leaves(lora_params), importance.step + 1
    learning = step < schedule.end
    known = _observed(schedule, importance, leaves, grads)
    sensitivity, uncertainty = (
        jax.tree.map(lambda new, old: jnp.where(learning, new, old), new, old)
        for new, old in zip(known, importance[1:3], strict=True)
    )
    pruning = (learning & (step > schedule.warmup_steps) & (step % schedule.every == 0)) | (step == schedule.end)
    start = sum(kept.size for kept in importance.kept.values())
    target = schedule.target_rank * sum(math.prod(kept.shape[:-1]) for kept in importance.kept.values())
    if target > start:
        raise ValueError(
            f"target_rank {schedule.target_rank} is above the {start} entries of E that "
            f"{target // schedule.target_rank} matrices have, so none would be pruned: give AdaLoRA a higher rank, or "
            "the schedule a lower target_rank"
        )
    best = most_important(_scores(sensitivity, uncertainty, leaves), schedule.budget(step, start, target))
    kept = {path: jnp.where(pruning, best[path], old) for path, old in importance.kept.items()}
    masked = pruning | (step > schedule.end)
    pruned = LoraParams(lora_params)
    for path, adapter in leaves.items():
        e = adapter.factors["E"]
        e = jnp.where(kept[path] | ~masked, e, jnp.zeros_like(e))
        pruned[path] = dataclasses.replace(adapter, factors={**adapter.factors, "E": e})
    return pruned, Importance(step, sensitivity, uncertainty, kept)


def most_important(scores: Mapping[str, jax.Array], budget: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Which entries are among the `budget` highest of all, by path; of equal ones the earlier.

    >>> most_important({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 5.0])}, 2)
    {'a': Array([ True, False], dtype=bool), 'b': Array([False,  True], dtype=bool)}
    """
    flat = jnp.concatenate([score.ravel() for score in scores.values()])
    places = jnp.zeros(flat.shape, jnp.int32).at[jnp.argsort(-flat)].set(jnp.arange(flat.size, dtype=jnp.int32))
    kept, start = dict[str, jax.Array](), 0
    for path, score in scores.items():
        kept[path] = (places[start : start + score.size] < budget).reshape(score.shape)
        start += score.size
    return kept


def orthogonality(lora_params: Mapping[str, Adapter]) -> jax.Array:
    """How far factors under `AdaLoRA` are from orthonormal: the mean of ‖AᵀA - I‖ and ‖B·Bᵀ - I‖, for the loss.

    The paper and PEFT add it times 0.1 to 0.5. It costs 6r²(d + k) FLOPs for each leaf of a training step.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> rules = {"w": lora.AdaLoRA(rank=4, deviation=1e-9)}
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((4, 4))}, rules)
    >>> orthogonality(lora_params)
    Array(2., dtype=float32)
    """
    distances = list[jax.Array]()
    for adapter in _leaves(lora_params).values():
        batch, rank = adapter.factors["E"].shape[:-1], adapter.variant.rank  # pyright: ignore[reportAttributeAccessIssue]
        for rows in (adapter.factors["A"].reshape(*batch, -1, rank).mT, adapter.factors["B"].reshape(*batch, rank, -1)):
            apart = rows @ rows.mT - jnp.eye(rank, dtype=rows.dtype)
            squares = jnp.sum(apart**2, (-2, -1)).ravel()
            zero = squares == 0  # where the norm has no gradient
            distances.append(jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares))))
    if not distances:
        raise ValueError("no leaf is under AdaLoRA, so there is nothing to hold orthonormal: leave the term out")
    return jnp.mean(jnp.concatenate(distances))


def _leaves(lora_params: Mapping[str, Adapter]) -> LoraParams:
    return {path: adapter for path, adapter in lora_params.items() if isinstance(adapter.variant, AdaLoRA)}


def _observed(
    schedule: Schedule, importance: Importance, leaves: LoraParams, grads: Mapping[str, Adapter]
) -> tuple[dict[str, dict[str, jax.Array]], dict[str, dict[str, jax.Array]]]:
    """The moving averages of sensitivity and uncertainty with one step more."""
    now = {path: {n: jnp.abs(x * grads[path].factors[n]) for n, x in a.factors.items()} for path, a in leaves.items()}
    b1, b2 = schedule.beta1, schedule.beta2
    mean = jax.tree.map(lambda old, new: b1 * old + (1 - b1) * new, importance.sensitivity, now)
    off = jax.tree.map(lambda new, mean: jnp.abs(new - mean), now, mean)
    return mean, jax.tree.map(lambda old, new: b2 * old + (1 - b2) * new, importance.uncertainty, off)


def _scores(
    sensitivity: dict[str, dict[str, jax.Array]], uncertainty: dict[str, dict[str, jax.Array]], leaves: LoraParams
) -> dict[str, jax.Array]:
    """For each entry of E, its own importance and the means of those of its column of A and its row of B."""
    scores = dict[str, jax.Array]()
    for path, adapter in leaves.items():
        each = {name: value * uncertainty[path][name] for name, value in sensitivity[path].items()}
        batch = adapter.site.sizes()[0]
        a = each["A"].reshape(*batch, -1, each["E"].shape[-1]).mean(-2)
        b = each["B"].reshape(*each["E"].shape, -1).mean(-1)
        scores[path] = each["E"] + a + b
    return scores
