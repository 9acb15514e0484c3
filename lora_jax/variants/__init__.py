"""How ΔW is made: one variant, one file."""

from lora_jax.variants.base import Variant
from lora_jax.variants.full import Full
from lora_jax.variants.lora import LoRA

__all__ = ["Full", "LoRA", "Variant"]
