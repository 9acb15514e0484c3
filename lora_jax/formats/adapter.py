"""An adapter, in whichever form it is on the disk: a native file, PEFT's folder, or checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lora_jax.factors import LoraParams
from lora_jax.formats import native, peft
from lora_jax.formats.names import Names

NATIVE = "adapter.safetensors"  # in a folder
PEFT = "adapter_config.json"


def load(path: str | os.PathLike[str], params: Any, names: Names) -> LoraParams:
    """Reads an adapter of a model.

    Args:
      path: A file that `lora_jax.save` wrote, or a folder with such an adapter.safetensors, which is taken where both
        are, since it has all bits of any variant; or PEFT's folder.
      params: The model's parameters, or their shapes.
      names: The model's name map.

    Raises:
      FileNotFoundError: There is no adapter.
      ValueError: It is damaged, or does not fit.
    """
    path = Path(path)
    if not path.is_dir():
        return native.load(path)
    if (path / NATIVE).is_file():
        return native.load(path / NATIVE)
    if (path / PEFT).is_file():
        return peft.load(path, params, names)
    raise FileNotFoundError(f"'{path}' has neither {NATIVE} nor {PEFT}: give an adapter's file or folder")
