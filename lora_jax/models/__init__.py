"""Readable Flax models that load Hugging Face checkpoints, one file per architecture."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from lora_jax.formats.huggingface.directory import CONFIG, read_json
from lora_jax.models import classifier
from lora_jax.models.generate import generate
from lora_jax.models.loading import opened
from lora_jax.models.stored import Stored
from lora_jax.models.writing import MODULES, names, save

__all__ = ["MODULES", "Stored", "generate", "load", "names", "opened", "save"]


def load(
    directory: str | Path,
    *,
    dtype: DTypeLike | None = None,
    sha256: str | Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
    shardings: Any = None,
    abstract: bool = False,
    labels: Sequence[str] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a model from a Hugging Face directory; every tensor in it is used, once.

    A BertForSequenceClassification is loaded as `classifier.Classifier`, and with `ignore=["classifier.*"]` as the
    encoder that it has.

    Args:
      directory: Holds config.json and safetensors weights, whole or in shards.
      dtype: What the parameters are cast to; None keeps the file's.
      sha256: The hex digest of the weights file, or of each shard by its file name; checked before it is read.
      ignore: Regexes for tensors to leave out, such as the heads of other tasks: `["cls.*"]`.
      shardings: Where the parameters go, as in `lora_jax.formats.huggingface.fill`; None for the default device.
      abstract: Whether to return the parameters' shapes instead, as `jax.ShapeDtypeStruct`: headers alone are read.
      labels: The names of classes, which make a classifier of a BERT (see `lora_jax.models.classifier.opened`).
      **options: Of the `load` of the model's own file: `scan=False` for a decoder whose layers are not stacked.

    Returns:
      The module, which computes in the parameters' dtype (`model.clone(dtype=..., remat=...)` has it otherwise), and
      its variables, {"params": ...}.

    Raises:
      FileNotFoundError: The directory or one of its files is missing.
      ValueError: No model here is of the config's type, the config asks for what the model does not do, or the weights
        do not fit it.

    >>> load("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: 'no/such/folder/config.json' is missing: copy it from where the weights come from
    """
    config = read_json(Path(directory) / CONFIG)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODULES:
        raise ValueError(f"'{directory}': model_type is {kind!r}; known are {', '.join(MODULES)}: load one of them")
    ignore = tuple(ignore)
    module = importlib.import_module(f"lora_jax.models.{MODULES[kind]}")
    if labels is not None or (classifier.holds(config) and not classifier.left_out(ignore)):
        module, options["labels"] = classifier, labels
    return module.load(
        directory, dtype=dtype, sha256=sha256, ignore=ignore, shardings=shardings, abstract=abstract, **options
    )
