"""Biases: what PEFT's adapters of weights do to the biases beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax.factors import Adapter, LoraParams
from lora_jax.formats.names import Place
from lora_jax.formats.peft.factors import LORA_BIAS
from lora_jax.formats.peft.full import BASE_BIAS, owned, tensor
from lora_jax.formats.peft.modules import Module
from lora_jax.variants import IA3, DoRA, Full


def scaled_by_ia3(
    lora_params: Mapping[str, Adapter],
    modules: Mapping[str, Module],
    places: Mapping[str, Place],
    leaves: Mapping[str, Any],
) -> LoraParams:
    """The adapters without those biases that PEFT's IA³ makes itself, as it scales a layer's outputs with their bias.

    Raises:
      ValueError: A bias is another; or there is no base to tell by.
    """
    owners, fulls = owned(places), {p: a for p, a in lora_params.items() if isinstance(a.variant, Full)}
    made = set()
    for name, module in modules.items():
        if not isinstance(module.variant, IA3) or module.variant.side == "in":
            continue
        if not leaves:
            raise ValueError(f"PEFT's IA³ scales the bias of '{name}' too, if it has one: give base=, to tell whether")
        bias = f"{name}.bias"
        if bias not in owners:
            continue
        expected = _times(tensor(bias, owners, places, {}, leaves), module.factors["scale"])
        if not np.array_equal(tensor(bias, owners, places, fulls, leaves), expected):
            raise ValueError(
                f"PEFT's IA³ scales '{bias}' along with the outputs, and here it is not: scale the inputs, "
                "IA3(side='in'), or `merge`"
            )
        made.update(owners[bias])
    return {path: adapter for path, adapter in lora_params.items() if path not in made}


def resolve(
    tensors: dict[str, np.ndarray],
    variants: Mapping[str, Any],
    places: Mapping[str, Place],
    leaves: Mapping[str, Any],
) -> None:
    """Puts biases as they are in the place of what a file has that adds to them, or scales them.

    Args:
      tensors: By name, with what LoRA adds to a bias at `lora_B.bias`, and IA³'s scales at `ia3_l`.
      variants: Those of the adapted modules.
      places: Where the leaves are.
      leaves: The base's arrays.

    Raises:
      ValueError: There is no such bias, its values are not given, or it is part of what DoRA scales.
    """
    owners = owned(places)

    def change(module: str, by: Callable[[np.ndarray], np.ndarray]) -> None:
        bias = f"{module}.bias"
        given = tensors.pop(module + BASE_BIAS, None)
        try:
            before = tensor(bias, owners, places, {}, leaves) if given is None else given
        except ValueError as error:
            raise ValueError(
                f"the file changes '{bias}', whose values are not known: give params with values"
            ) from error
        tensors[module + BASE_BIAS] = by(before)

    for module, variant in variants.items():
        if module + LORA_BIAS in tensors:
            added = tensors.pop(module + LORA_BIAS)
            if isinstance(variant, DoRA) or f"{module}.bias" not in owners:
                why = "scales it, as DoRA" if isinstance(variant, DoRA) else "has no bias to add it to"
                raise ValueError(
                    f"'{module}{LORA_BIAS}' adds to the outputs of a module that {why}: train without lora_bias"
                )
            change(module, lambda bias, added=added, s=variant.scale: _cast(bias + np.float64(s) * _wide(added), bias))
        if isinstance(variant, IA3) and variant.side == "out" and f"{module}.bias" in owners:
            change(module, lambda bias, vector=tensors[f"{module}.ia3_l"]: _times(bias, vector))


def _times(bias: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return _cast(_wide(bias) * _wide(vector).reshape(bias.shape), bias)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def _cast(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    return x.astype(like.dtype)
