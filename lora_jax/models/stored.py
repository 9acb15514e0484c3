"""Stored: a model whose values are still on the disk: its module, its parameters' shapes, its checkpoint, its names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from flax import linen as nn

from lora_jax import tree
from lora_jax.formats import huggingface
from lora_jax.formats.huggingface.filling import located
from lora_jax.formats.names import Names
from lora_jax.models.loading import opened
from lora_jax.models.writing import names
from lora_jax.sites import Site


class Stored(NamedTuple):
    """What adapters of a model are looked at with, where none of its weights is needed as a whole.

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

    @classmethod
    def of(cls, directory: str | Path, model: nn.Module, params: Any) -> Stored:
        """What `lora_jax.models.load(directory, abstract=True)` returned.

        >>> import tempfile, jax, jax.numpy as jnp
        >>> from lora_jax import models
        >>> from lora_jax.models.gpt2 import GPT2, Config
        >>> made, directory = GPT2(Config(100, 8, 1, 2)), f"{tempfile.mkdtemp()}/tiny"
        >>> _ = models.save(directory, made, made.init(jax.random.key(0), jnp.array([[1]])))
        >>> Stored.of(directory, *models.load(directory, abstract=True)).fingerprint()["params/last_norm/scale"]
        'float32[8] f300a258'
        """
        return cls(model, params, opened(model, directory), names(model))

    def sites(self) -> dict[str, Site]:
        """The site of each of its leaves, by the name map: nothing is traced."""
        return {path: place.site() for path, place in located(tree.flatten(self.params)[0], self.names).items()}

    def fingerprint(self, dtype: str | None = None) -> dict[str, str]:
        """That of its parameters, as they are stored or in a dtype; few of their entries are read."""
        return huggingface.fingerprint(self.params, self.checkpoint, self.names, dtype)

    def deferred(self) -> Any:
        """Its variables, each read when `np.asarray` asks for it."""
        return huggingface.deferred(self.params, self.checkpoint, self.names)
