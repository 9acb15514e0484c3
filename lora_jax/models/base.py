"""Base: a model's directory with its values still on the disk: its module, its parameters' shapes, its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from flax import linen as nn

from lora_jax import models, tree
from lora_jax.formats import huggingface
from lora_jax.formats.huggingface.filling import located
from lora_jax.formats.names import Names
from lora_jax.models.decoder import Decoder
from lora_jax.sites import Site


class Base(NamedTuple):
    """What adapters of a model are looked at with.

    Attributes:
      model: The module.
      params: The shapes of its variables, {"params": ...}, in the dtypes that the files have.
      checkpoint: Its files.
      names: Its name map.
    """

    model: nn.Module
    params: Any
    checkpoint: huggingface.Checkpoint
    names: Names

    @property
    def task_type(self) -> str:
        """PEFT's word for what the model does."""
        return "CAUSAL_LM" if isinstance(self.model, Decoder) else "FEATURE_EXTRACTION"

    def fingerprint(self, dtype: str | None = None) -> dict[str, str]:
        """That of its parameters, as they are stored or in a dtype; few of their entries are read."""
        return huggingface.fingerprint(self.params, self.checkpoint, self.names, dtype)

    def sites(self) -> dict[str, Site]:
        """The site of each of its leaves, by the name map: nothing is traced."""
        return {path: place.site() for path, place in located(tree.flatten(self.params)[0], self.names).items()}

    def deferred(self) -> Any:
        """Its variables, each read when `np.asarray` asks for it."""
        return huggingface.deferred(self.params, self.checkpoint, self.names)


def open_base(directory: str | Path, paths: Iterable[str] = ()) -> Base:
    """A model's directory, of which headers alone are read.

    Args:
      directory: The directory.
      paths: Those of an adapter's leaves, where they are known: they tell whether a decoder's layers are stacked.

    Raises:
      FileNotFoundError: As `lora_jax.models.load`.
      ValueError: As `lora_jax.models.load`.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> from lora_jax.models.gpt2 import GPT2, Config
    >>> made, directory = GPT2(Config(100, 8, 1, 2)), f"{tempfile.mkdtemp()}/tiny"
    >>> _ = models.save(directory, made, made.init(jax.random.key(0), jnp.array([[1]])))
    >>> open_base(directory).fingerprint()["params/last_norm/scale"]
    'float32[8] f300a258'
    """
    model, params = models.load(directory, abstract=True)
    if isinstance(model, Decoder) and any(re.match(r"params/layers_\d+/", path) for path in paths):
        model, params = models.load(directory, abstract=True, scan=False)
    return Base(model, params, models.opened(model, directory), models.names(model))
