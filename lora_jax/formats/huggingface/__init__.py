"""Hugging Face checkpoints: every tensor of the files goes into exactly one parameter, or nothing is loaded.

A model brings a few short lists (see `lora_jax.models.bert`), and this package does the rest, one tensor at a time:

- names: where its leaves are in their modules (see `lora_jax.formats.names`);
- renames: (their spelling, the spelling that `names` uses), for prefixes and for older spellings;
- ignored: their tensors that carry nothing to learn, such as the constant `position_ids`.
"""

from lora_jax.formats.huggingface.checkpoint import Checkpoint, open_checkpoint
from lora_jax.formats.huggingface.deferred import deferred, fingerprint
from lora_jax.formats.huggingface.directory import directory_of, download
from lora_jax.formats.huggingface.exporting import export, save, write
from lora_jax.formats.huggingface.filling import fill, outline
from lora_jax.formats.huggingface.merging import merge
from lora_jax.formats.huggingface.rounding import Loss
from lora_jax.formats.huggingface.tensors import CheckpointError, Lazy, Tensor

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Lazy",
    "Loss",
    "Tensor",
    "deferred",
    "directory_of",
    "download",
    "export",
    "fill",
    "fingerprint",
    "merge",
    "open_checkpoint",
    "outline",
    "save",
    "write",
]
