"""Loading: a Hugging Face directory to a model and its variables, by the lists that the model's file ends with."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from lora_jax.formats import huggingface
from lora_jax.formats.names import Names

M = TypeVar("M", bound=nn.Module)


class Lists(NamedTuple):
    """What a model says of Hugging Face's tensors.

    Attributes:
      names: Where its leaves are (see `lora_jax.formats.names`).
      renames: (regex, replacement) pairs for other spellings of their names.
      ignored: Regexes of tensors that carry nothing to learn.
    """

    names: Names
    renames: Iterable[tuple[str, str]] = ()
    ignored: Iterable[str] = ()


def read(
    directory: str | Path,
    lists: Lists,
    model: Callable[[huggingface.Checkpoint], M],
    *,
    dtype: DTypeLike | None = None,
    sha256: str | Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
    shardings: Any = None,
    abstract: bool = False,
) -> tuple[M, Any]:
    """What `model` makes of a directory, and its variables; the options are as in `lora_jax.models.load`."""
    ignored = (*lists.ignored, *ignore)
    checkpoint = huggingface.open_checkpoint(directory, renames=lists.renames, ignored=ignored, sha256=sha256)
    return filled(model(checkpoint), checkpoint, lists.names, dtype=dtype, shardings=shardings, abstract=abstract)


def filled(
    made: M,
    checkpoint: huggingface.Checkpoint,
    names: Names,
    *,
    dtype: DTypeLike | None = None,
    shardings: Any = None,
    abstract: bool = False,
) -> tuple[M, Any]:
    """A model, and its variables from a checkpoint; the options are as in `lora_jax.models.load`."""
    shapes = jax.eval_shape(made.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    fill = huggingface.outline if abstract else huggingface.fill
    params = fill(shapes, checkpoint, names, dtype, shardings=shardings)
    held = functools.reduce(jnp.promote_types, {leaf.dtype for leaf in jax.tree.leaves(params)})
    return made.clone(param_dtype=held), params


def opened(model: Any, directory: str | Path) -> huggingface.Checkpoint:
    """A model's checkpoint with its values still on the disk, by the lists that the model's file ends with.

    Args:
      model: What `lora_jax.models.load` returned of the directory; with `abstract=True` nothing is read for it either.
      directory: The directory.

    Raises:
      FileNotFoundError: As `lora_jax.models.load`.
      ValueError: As `lora_jax.models.load`.

    >>> import tempfile
    >>> from lora_jax import models
    >>> from lora_jax.models.gpt2 import GPT2, Config
    >>> made, directory = GPT2(Config(100, 8, 1, 2)), f"{tempfile.mkdtemp()}/tiny"
    >>> _ = models.save(directory, made, made.init(jax.random.key(0), jnp.array([[1]])))
    >>> model, shapes = models.load(directory, abstract=True)
    >>> opened(model, directory).tensors["transformer.wte.weight"].shape
    (100, 8)
    """
    lists: Any = importlib.import_module(type(model).__module__)
    if hasattr(lists, "opened"):  # a classifier's, with a head where the directory has none
        return lists.opened(directory, model.labels)
    return huggingface.open_checkpoint(directory, renames=lists.RENAMES, ignored=lists.IGNORED)
