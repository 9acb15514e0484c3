"""Optimizers that train factors and nothing else: optax.multi_transform over the labels that variants give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lora_jax.adapters import Adapter, is_adapter
from lora_jax.variants.base import FROZEN


def optimizer(
    tx: optax.GradientTransformation | Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """`optax.multi_transform` with one transform for all factors, or one for each factor label.

    Works on `lora_params` and on any tree that holds it beside other arrays, such as `{"base": frozen, "lora":
    lora_params}`: those get no optimizer state and no update, and XLA then drops their gradients too.

    Args:
      tx: A transform for all factors together, which one norm then clips; or a mapping from label to transform. LoRA's
        labels are "A" and "B", Full's is "weight".

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
        return _multi(dict(tx), lambda label: label)
    return _multi({"trained": tx}, lambda label: "trained")


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
        groups = {name: FROZEN if named[name] == FROZEN else group(named[name]) for name in adapter.factors}
        unknown = set(groups.values()) - {FROZEN, *transforms}
        if unknown:
            raise ValueError(
                f"{type(adapter.variant).__name__} has factors labelled {sorted(unknown)}, for which there is no "
                f"transform among {sorted(transforms)}: add one, or give one transform for all"
            )
        return Adapter(groups, adapter.variant, adapter.site)

    return optax.multi_transform({**transforms, FROZEN: optax.set_to_zero()}, labels)
