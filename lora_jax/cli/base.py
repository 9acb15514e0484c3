"""What commands that take a model and adapters of it begin with, and how those end that make an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_jax.factors import LoraParams
    from lora_jax.models.stored import Stored


def stored(model: str, adapter: Path | None = None) -> Stored:
    """A model of which headers alone are read.

    Args:
      model: As `huggingface.directory_of` takes it.
      adapter: One of it, which tells a classifier from its encoder, and whether a decoder's layers are stacked.

    Raises:
      OSError: One of them is not there.
      ValueError: The model cannot be read, or the adapter is damaged.
    """
    from lora_jax import models
    from lora_jax.finetune.base import for_adapter
    from lora_jax.formats.huggingface import directory_of

    directory = directory_of(model)
    made, params = for_adapter(directory, adapter, abstract=True)
    return models.Stored.of(directory, made, params)


def adapters_of(model: str, paths: Sequence[Path]) -> tuple[Stored, list[LoraParams]]:
    """A model, and adapters that were made for it.

    Args:
      model: As `huggingface.directory_of` takes it.
      paths: Of the adapters.

    Raises:
      OSError: One of them is not there.
      ValueError: One of them is damaged, or for another base.
    """
    from lora_jax.formats import adapter

    for path in paths:
        adapter.find(path)
    base = stored(model, paths[0])
    return base, [adapter.load(path, base.deferred(), base.names, base=base.fingerprint) for path in paths]


def task_type(base: Stored) -> str:
    """PEFT's word for what a model does."""
    from lora_jax.finetune import task

    try:
        return task.of(base.model).peft
    except ValueError:  # an encoder without a task
        return "FEATURE_EXTRACTION"


def hub_name(model: str) -> str:
    """What other tools find a model by: its name on the hub, or the directory as it was given."""
    return model.removeprefix("hf://")


def write(out: Path, lora_params: LoraParams, base: Stored, model: str) -> None:
    """Writes an adapter's folder, and says what is in it."""
    from lora_jax.formats import adapter

    missing = adapter.save(
        out,
        lora_params,
        base.names,
        base=base.deferred(),
        fingerprint=base.fingerprint(),
        base_model_name_or_path=hub_name(model),
        task_type=task_type(base),
    )
    kinds = sorted({type(x.variant).__name__ for x in lora_params.values()})
    print(f"{out}: {len(lora_params)} leaves, {' and '.join(kinds)}")
    if missing:
        print(f"PEFT has no form for it: {missing}")
