"""How ΔW is made: one variant, one file."""

from lora_jax.variants.adalora import AdaLoRA
from lora_jax.variants.base import Variant
from lora_jax.variants.dora import DoRA
from lora_jax.variants.full import Full
from lora_jax.variants.ia3 import IA3
from lora_jax.variants.loha import LoHa
from lora_jax.variants.lokr import LoKr
from lora_jax.variants.lora import LoRA
from lora_jax.variants.lora_fa import LoRAFA
from lora_jax.variants.lora_xs import LoRAXS
from lora_jax.variants.vera import VeRA

__all__ = ["IA3", "LoRAFA", "LoRAXS", "AdaLoRA", "DoRA", "Full", "LoHa", "LoKr", "LoRA", "Variant", "VeRA"]
