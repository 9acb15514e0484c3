"""Checkpoint: what a Hugging Face directory holds, known by its headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.formats.huggingface.directory import CONFIG, raise_if, read_json, tensors_of
from lora_jax.formats.huggingface.tensors import CheckpointError, Tensor


class Checkpoint(NamedTuple):
    """A directory's config.json and tensors, whose values stay on the disk.

    Attributes:
      directory: Where it is.
      config: What config.json says.
      tensors: By the names that the model's list uses.
      ignored: Those left out.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    ignored: tuple[Tensor, ...] = ()


def open_checkpoint(
    directory: str | Path,
    *,
    renames: Iterable[tuple[str, str]] = (),
    ignored: Iterable[str] = (),
    sha256: str | Mapping[str, str] | None = None,
) -> Checkpoint:
    """Read the config and the headers of a Hugging Face directory, and check that its files belong together.

    Args:
      directory: Holds config.json, and model.safetensors or else model.safetensors.index.json with its shards;
        `download` gets one from the hub.
      renames: (regex, replacement) pairs, applied in order to each tensor's name where the regex matches in full.
      ignored: Regexes; a tensor whose name, in the file or renamed, matches one in full is left out.
      sha256: The hex digest of the weights file, or of each by its file name; compared before anything is parsed.

    Raises:
      FileNotFoundError: The directory, config.json, the weights or a shard is not there.
      CheckpointError: A file is unreadable or has another digest, index and shards disagree, two names become one, or
        the weights are quantized.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"'{directory}' is no directory: pass the one that holds config.json and the weights")
    config = read_json(directory / CONFIG)
    for field in ("quantization_config", "compression_config"):
        if config.get(field):
            how = config[field].get("quant_method") if isinstance(config[field], dict) else None
            raise CheckpointError(
                f"'{directory}' holds quantized weights ({how or field}), which are not read: take those it was made "
                "of, or have transformers write them, with dequantize() and save_pretrained"
            )
    tensors: dict[str, Tensor] = {}
    clashes, left_out, ignored = [], [], tuple(ignored)
    for tensor in tensors_of(directory, sha256):
        name = tensor.name
        for pattern, replacement in renames:
            if match := re.fullmatch(pattern, name):
                name = match.expand(replacement)
        if any(re.fullmatch(pattern, spelling) for pattern in ignored for spelling in (name, tensor.name)):
            left_out.append(tensor)
            continue
        if name in tensors:
            clashes.append(f"'{tensors[name].name}' and '{tensor.name}' both stand for '{name}'")
        tensors[name] = tensor
    raise_if(clashes, f"'{directory}': two tensors for one parameter; take one of each pair out of the files")
    return Checkpoint(directory, config, tensors, tuple(left_out))
