"""Read: a folder's config and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from lora_jax.formats.peft.folder import CONFIG, WEIGHTS


def read(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config, and the tensors by name."""
    return json.loads((directory / CONFIG).read_text()), load_file(directory / WEIGHTS)
