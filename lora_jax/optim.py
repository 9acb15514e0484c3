"""Optimizers that train factors and nothing else: optax.multi_transform over the labels that variants give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from lora_jax.factors import Adapter, is_adapter
from lora_jax.sites import Site
from lora_jax.variants.base import FROZEN
from lora_jax.variants.full import WEIGHT
from lora_jax.variants.lora_fa import LoRAFA


def optimizer(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
    *,
    group: Callable[[str, Site], str] = lambda label, site: label,
) -> optax.GradientTransformationExtraArgs:
    """`optax.multi_transform` with one transform for all factors, or one for each factor label or group of them.

    Works on `lora_params` and on any tree that holds it beside other arrays, such as `{"base": frozen, "lora":
    lora_params}`: those get no optimizer state and no update, and XLA then drops their gradients too.

    Args:
      tx: A transform for all factors together, which one norm then clips; or a mapping from label to transform. LoRA's
        labels are "A" and "B", Full's is "weight"; each variant's `labels` has its own.
      group: With a mapping, what its keys are instead of labels: from a factor's label and its leaf's site.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: On `init`, where the tree holds no adapter, or a label has no transform.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((64, 32))}, {"w": lora.LoRA(rank=2)})
    >>> state = lora.optimizer(optax.adam(1e-3)).init(lora_params)
    >>> sum(x.size for x in jax.tree.leaves(state) if x.ndim)  # two moments of A and B
    384
    """
    if isinstance(tx, Mapping):
        if FROZEN in tx:
            raise ValueError(f"the label {FROZEN!r} is that of what does not train: give it no transform")
        return _multi(dict(tx), group)
    return _multi({"trained": tx}, lambda label, site: "trained")


def lora_plus(
    make_tx: Callable[[Any], optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    *,
    ratio: float = 16.0,
    embedding_learning_rate: optax.ScalarOrSchedule = 1e-6,
    fast: tuple[str, ...] = ("B", "b"),
) -> optax.GradientTransformationExtraArgs:
    """LoRA+: B learns faster than A, by `ratio`; for every variant.

    Args:
      make_tx: A function from a learning rate to a transform, such as `optax.adamw`.
      learning_rate: The learning rate, or schedule, of A and of every other factor that is not `fast`.
      ratio: How much faster the others are.
      embedding_learning_rate: The learning rate of the factors of leaves that are looked up, as in PEFT; a leaf that
        trains itself, as under `Full`, is none.
      fast: The labels of the factors that are: what makes the outputs. So are LoRA's B and its kin's, LoHa's B1 and B2,
        LoKr's AB, VeRA's b. (PEFT's rule is "B, or of one dimension": for that, add "d", "magnitude", "scale", "E".)

    Returns:
      A gradient transformation.

    Raises:
      ValueError: For a ratio that is not positive, or labels that are no tuple; on `init`, where the tree holds no
        adapter.

    Source: Hayou et al. 2024, https://arxiv.org/abs/2402.12354.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> tx = lora.lora_plus(optax.sgd, 0.1, ratio=10)
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora_params), tx.init(lora_params))
    >>> {name: float(x[0, 0]) for name, x in updates["w"].factors.items()}
    {'A': -0.10000000149011612, 'B': -1.0}
    """
    if not ratio > 0:
        raise ValueError(f"lora_plus(ratio={ratio}): the ratio is positive")
    if isinstance(fast, str):
        raise ValueError(f"lora_plus(fast={fast!r}): fast is a tuple of labels, such as ({fast!r},)")
    faster: Any = (lambda step: ratio * learning_rate(step)) if callable(learning_rate) else ratio * learning_rate
    rates = {"slow": learning_rate, "fast": faster, "embedding": embedding_learning_rate}

    def group(label: str, site: Site) -> str:
        looked_up = site.kind == "embedding" and label != WEIGHT
        return "embedding" if looked_up else "fast" if label in fast else "slow"

    return optimizer({name: make_tx(rate) for name, rate in rates.items()}, group=group)


def fa_gradients(damping: float = 1e-8) -> optax.GradientTransformation:
    """LoRA-FA's correction of the gradient of B where A is frozen: s⁻²·(AᵀA + damping·I)⁻¹·g; others stay.

    The step of ΔW is then as near as A lets it to what a gradient of W would make. Put it before the optimizer:
    `optax.chain(fa_gradients(), optimizer(optax.adamw(1e-4)))`.

    Args:
      damping: What is added to AᵀA, so that its inverse exists.

    Returns:
      A gradient transformation, whose `update` needs the parameters.

    Raises:
      ValueError: On `init`, where no leaf is under `LoRAFA`; on `update`, without parameters.

    Source: Zhang et al. 2023, https://arxiv.org/abs/2308.03303, as in Hugging Face PEFT's `LoraFAOptimizer`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRAFA(rank=2)})
    >>> tx = optax.chain(lora.fa_gradients(), lora.optimizer(optax.sgd(0.1)))
    >>> grads = jax.tree.map(jnp.ones_like, lora_params)
    >>> updates, _ = tx.update(grads, tx.init(lora_params), lora_params)
    """

    def corrected(gradient: Any, params: Any) -> Any:
        if not (is_adapter(gradient) and isinstance(gradient.variant, LoRAFA)):
            return gradient
        b = gradient.variant.corrected(gradient.factors["B"], params.factors, gradient.site, damping)
        return dataclasses.replace(gradient, factors={**gradient.factors, "B": b})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "fa_gradients needs A to correct the gradient of B: call update(grads, state, lora_params)"
            )
        return jax.tree.map(corrected, updates, params, is_leaf=is_adapter), state

    def init(params: Any) -> optax.EmptyState:
        leaves = jax.tree.leaves(params, is_leaf=is_adapter)
        if not any(is_adapter(x) and isinstance(x.variant, LoRAFA) for x in leaves):
            raise ValueError("fa_gradients: no leaf is under LoRAFA, so there is nothing to correct: leave it out")
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)


def _multi(transforms: dict[str, optax.GradientTransformation], group: Any) -> optax.GradientTransformationExtraArgs:
    def labels(params: Any) -> Any:
        nodes, treedef = jax.tree.flatten(params, is_leaf=is_adapter)
        if not any(map(is_adapter, nodes)):
            raise ValueError(
                "the tree that the optimizer is given holds no Adapter, so nothing would train: give it lora_params, "
                "or a tree that has lora_params in it"
            )
        return jax.tree.unflatten(treedef, [_labels(x) if is_adapter(x) else FROZEN for x in nodes])

    def _labels(adapter: Adapter) -> Adapter:
        named = adapter.variant.labels()
        site = adapter.site
        groups = {name: FROZEN if named[name] == FROZEN else group(named[name], site) for name in adapter.factors}
        unknown = set(groups.values()) - {FROZEN, *transforms}
        if unknown:
            raise ValueError(
                f"{type(adapter.variant).__name__} has factors labelled {sorted(unknown)}, for which there is no "
                f"transform among {sorted(transforms)}: add one, or give one transform for all"
            )
        return Adapter(groups, adapter.variant, adapter.site)

    return optax.multi_transform({**transforms, FROZEN: optax.set_to_zero()}, labels)
