"""What commands that take a model and adapters of it begin with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_jax.factors import LoraParams
    from lora_jax.models.base import Base


def base_of(model: str, path: Path) -> Base:
    """The model that an adapter would be of.

    Args:
      model: As `huggingface.directory_of` takes it.
      path: Of the adapter, which tells some of a model's forms apart.

    Raises:
      OSError: One of them is not there.
      ValueError: The model cannot be read, or the adapter is damaged.
    """
    from lora_jax.formats import adapter
    from lora_jax.formats.huggingface import directory_of
    from lora_jax.models.base import open_base

    return open_base(directory_of(model), adapter.paths(path))


def adapters_of(model: str, paths: Sequence[Path]) -> tuple[Base, list[LoraParams]]:
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
    base = base_of(model, paths[0])
    return base, [adapter.load(path, base.deferred(), base.names, base=base.fingerprint) for path in paths]


def hub_name(model: str) -> str:
    """What other tools find a model by: its name on the hub, or the directory as it was given."""
    return model.removeprefix("hf://")


def write(out: Path, lora_params: LoraParams, base: Base, model: str) -> None:
    """Writes an adapter's folder, and says what is in it."""
    from lora_jax.formats import adapter

    missing = adapter.save(
        out,
        lora_params,
        base.names,
        base=base.deferred(),
        fingerprint=base.fingerprint(),
        base_model_name_or_path=hub_name(model),
        task_type=base.task_type,
    )
    kinds = sorted({type(x.variant).__name__ for x in lora_params.values()})
    print(f"{out}: {len(lora_params)} leaves, {' and '.join(kinds)}")
    if missing:
        print(f"PEFT has no form for it: {missing}")
