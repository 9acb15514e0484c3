"""LoftQ: the factors begin as what quantization loses of the weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp

from lora_jax.choice import Rules
from lora_jax.initial.chosen import mapped
from lora_jax.initial.pissa import principal
from lora_jax.initial.start import Initialization, Start
from lora_jax.matrices import from_matrices, to_matrices
from lora_jax.sites import Site


def loftq(quantize: Callable[[jax.Array], jax.Array], rules: Rules, *, iterations: int = 1) -> Rules:
    """Rules by which each leaf is frozen as quantized, and LoRA begins as the best correction of its rank.

    Q = quantize(W - s·A·B) and s·A·B = the `rank` largest components of W - Q, in turn. The function starts nearer to
    what it is than quantization alone leaves it, and not as it is: what a rank does not hold is lost.

    Args:
      quantize: From an array of the leaf's shape, in float32, to what is left of it once quantized: the round trip of
        quantizing and dequantizing. What stays frozen is this, in the leaf's dtype; so a quantizer that then takes the
        frozen tree finds values that it represents as they are.
      rules: As for `split`. Leaves under `LoRA`, of any kind, begin this way; others stay as ruled.
      iterations: How often the two are done; 1 as in Hugging Face PEFT, 5 as in the paper.

    Returns:
      Rules for `split`, for any tree.

    Raises:
      ValueError: For no iterations; in `split`, where `quantize` changes the shape, or gives what is not finite.

    Source: Li et al. 2023, https://arxiv.org/abs/2310.08659. Hugging Face PEFT does not divide by the scale s, so that
    there the correction is right for s = 1 alone.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jax.random.normal(jax.random.key(0), (16, 16))}
    >>> rules = lora.loftq(jnp.round, {"w": lora.LoRA(rank=8)}, iterations=5)
    >>> frozen, lora_params = lora.split(jax.random.key(0), params, rules)
    >>> bool((frozen["w"] == jnp.round(frozen["w"])).all())
    True
    """
    if iterations < 1:
        raise ValueError(f"loftq(iterations={iterations}): iterations are 1 or more")
    init = LoftQ(quantize, iterations)
    return mapped(rules, lambda variant: dataclasses.replace(variant, init=init))


@dataclasses.dataclass(frozen=True)
class LoftQ(Initialization):
    """Quantization and decomposition in turn."""

    quantize: Callable[[jax.Array], jax.Array]
    iterations: int

    @property
    def name(self) -> str:
        """The name that an adapter's variant keeps."""
        return "loftq"

    def start(self, key: jax.Array, weight: jax.Array, site: Site, rank: int, scale: float) -> Start:
        """The quantized weight, and the largest components of what it lacks."""
        part = jnp.zeros_like(weight)
        a = b = quantized = weight
        for _ in range(self.iterations):
            leaf = self.quantize(from_matrices(weight - part, site))
            if getattr(leaf, "shape", None) != site.shape:
                found = f"an array of shape {leaf.shape}" if hasattr(leaf, "shape") else f"a {type(leaf).__name__}"
                raise ValueError(f"quantize returned {found} for a leaf of shape {site.shape}")
            if not isinstance(leaf, jax.core.Tracer) and not bool(jnp.isfinite(leaf).all()):
                raise ValueError("quantize returned values that are not finite: does it divide by a scale of zero?")
            quantized = to_matrices(leaf.astype(weight.dtype), site)
            a, b = principal(weight - quantized, rank, scale)
            part = scale * (a @ b)
        return Start(a, b, quantized)
