"""What makes a step small, for any model: each recipe is one function, and none knows LoRA's factors.

Once frozen weights have neither gradient nor optimizer state, a step's memory is its activations and its logits:
`save_products` and `cross_entropy` are about those. `accumulated` makes of a batch as many parts as fit. Besides,
`jax.jit(step, donate_argnums=...)`, of the factors and the optimizer state that a step takes and returns, saves a copy.
"""

from lora_jax.recipes.accumulation import accumulated
from lora_jax.recipes.cross_entropy import cross_entropy
from lora_jax.recipes.rematerialization import save_products

__all__ = ["accumulated", "cross_entropy", "save_products"]
