"""Beginning: rules whose factors begin by what a few batches of the data say, where settings ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lora_jax as lora
from lora_jax.finetune.settings import Settings
from lora_jax.finetune.variant import from_data

BATCHES = 4


def begun(
    settings: Settings, loss: Any, params: Any, batches: Sequence[Mapping[str, Any]], rules: Any, sites: Any
) -> Any:
    """The rules, or those that `lora_jax.eva`, `corda` or `lora_ga` make of them.

    Args:
      settings: Which, by `init`.
      loss: As of the task.
      params: The base's values.
      batches: Of the training data.
      rules: As for `lora_jax.split`.
      sites: What `lora_jax.sites` found.

    Raises:
      ValueError: As those functions.
    """
    name = from_data(settings)
    if name is None:
        return rules
    make = {"eva": lora.eva, "corda": lora.corda, "lora_ga": lora.lora_ga}[name]
    return make(loss, params, batches, rules, sites=sites)
