"""Base: the model that a task starts from, with the head that it needs; and the one that an adapter was made for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.typing import DTypeLike

from lora_jax import models
from lora_jax.formats import adapter as adapters
from lora_jax.formats import atomic, native
from lora_jax.formats.huggingface.absent import Absent
from lora_jax.formats.huggingface.directory import CONFIG, read_json
from lora_jax.formats.peft.folder import read as read_folder
from lora_jax.models import classifier

LABELS = "labels.json"  # beside a classifier's adapter: the names of its classes, in their order
HEAD = "params/head/kernel", "params/head/bias"
APART = re.compile(r"params/layers_\d+/")  # layers that are not stacked
POOLER = "params/encoder/pooler/kernel", "params/encoder/pooler/bias"


class Base(NamedTuple):
    """A model to train.

    Attributes:
      model: The module.
      params: Its variables, or their shapes.
      whole: Paths of leaves that are the task's own, or that the directory lacks: they train as they are.
    """

    model: Any
    params: Any
    whole: tuple[str, ...] = ()


def open_base(
    directory: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    dtype: DTypeLike | None = None,
    abstract: bool = False,
    shardings: Any = None,
) -> Base:
    """The model that a task starts from.

    Args:
      directory: Of a model.
      labels: The names of the classes, to classify texts; None for a directory that says itself what it is: a decoder,
        a classifier, or an encoder.
      dtype: As in `lora_jax.models.load`, and so are the others.
      abstract: Whether to return shapes.
      shardings: Where the parameters go.

    Raises:
      FileNotFoundError: See `lora_jax.models.load`.
      ValueError: See there; or labels are given that the model cannot tell apart (see `models.classifier.opened`).
    """
    options: Any = {"dtype": dtype, "abstract": abstract, "shardings": shardings}
    directory = Path(directory)
    config = read_json(directory / CONFIG)
    if labels is None and not classifier.holds(config):
        ignore = classifier.HEADS if config.get("model_type") == "bert" else ()
        return Base(*models.load(directory, ignore=ignore, **options))
    pooler = classifier.opened(directory, labels).tensors.get("bert.pooler.dense.weight")
    whole = (*HEAD, *(POOLER if isinstance(pooler, Absent) else ()))
    return Base(*models.load(directory, labels=labels, **options), whole)


def for_adapter(
    directory: str | os.PathLike[str], adapter: str | os.PathLike[str] | None, **options: Any
) -> tuple[Any, Any]:
    """The model that an adapter was made for, and its variables.

    It is a classifier where the adapter has the head of one, and has its layers stacked unless the adapter has not.

    Args:
      directory: Of the model; it may be that of an encoder alone.
      adapter: As `lora_jax.formats.adapter.load` takes it; None for none.
      **options: dtype, abstract and shardings, as in `open_base`.

    Raises:
      FileNotFoundError: There is no model, or no adapter.
      ValueError: One of the two is damaged.
    """
    if adapter is None:
        return open_base(directory, **options)[:2]
    if not _is_bert(directory) and any(APART.match(path) for path in adapters.paths(adapter)):
        return models.load(Path(directory), scan=False, **options)
    labels = None if known_labels(directory) else adapter_labels(directory, adapter)
    return open_base(directory, labels=labels, **options)[:2]


def known_labels(directory: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """The classes that a model's directory tells apart already, in their order; None where it is no classifier's."""
    if not classifier.holds(read_json(Path(directory) / CONFIG)):
        return None
    checkpoint = classifier.opened(Path(directory))
    return classifier.labels_of(checkpoint.config, checkpoint.tensors["classifier.bias"].shape[0])


def adapter_labels(directory: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """The classes that an adapter of an encoder tells apart, in their order; None where it has no such head.

    Raises:
      FileNotFoundError: There is no adapter.
      ValueError: It is damaged, or its labels.json names others.
    """
    if not _is_bert(directory):
        return None
    form, place = adapters.find(adapter)
    if form == "peft":
        bias = read_folder(place)[1].get("classifier.bias")
        number = None if bias is None else len(bias)
    else:
        head = _load(form, place).get(HEAD[0])
        number = None if head is None else head.site.shape[-1]
    if number is None:
        return None
    folders = (place, place.parent) if place.is_dir() else (place.parent,)
    file = next((folder / LABELS for folder in folders if (folder / LABELS).is_file()), None)
    if file is None:
        return classifier.unnamed(number)
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"'{file}' is no JSON ({error}): write it as {json.dumps(classifier.unnamed(number))}"
        ) from error
    if not isinstance(names, list) or len(names) != number or not all(isinstance(name, str) for name in names):
        raise ValueError(f"'{file}' names {names}, and the adapter has {number} classes: name each, or remove the file")
    return tuple(names)


def _is_bert(directory: str | os.PathLike[str]) -> bool:
    return read_json(Path(directory) / CONFIG).get("model_type") == "bert"


def _load(form: str, place: Path) -> Any:
    if form == "native":
        return native.load(place)
    from lora_jax.formats import orbax  # which takes long to import

    return orbax.load(place)


def write_labels(folder: str | os.PathLike[str], labels: Sequence[str]) -> Path:
    """Writes the names of a classifier's classes beside its adapter, which has no config.json to name them; the file.

    >>> import tempfile
    >>> write_labels(tempfile.mkdtemp(), ["no", "yes"]).read_text()
    '["no", "yes"]\\n'
    """
    return atomic.write(Path(folder) / LABELS, (json.dumps([*labels], ensure_ascii=False) + "\n").encode())
