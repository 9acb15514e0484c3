"""OLoRA: B begins as orthonormal directions of the weight's output, A as what the weight is along them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lora_jax.initial.start import Initialization, Start
from lora_jax.sites import Site


@dataclasses.dataclass(frozen=True)
class OLoRA(Initialization):
    """B = Q's first columns, transposed, and A = R's first rows, transposed, of Wᵀ = Q·R; W - s·A·B stays frozen.

    The rows of B are orthonormal, and A·B = W·Bᵀ·B. `init="olora"` is OLoRA(). As in Hugging Face PEFT, the factors are
    not divided by the scale.

    Source: Büyükakyüz 2024, https://arxiv.org/abs/2406.01775.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> rules = {"w": lora.LoRA(rank=2, init="olora")}
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jax.random.normal(jax.random.key(1), (6, 4))}, rules)
    >>> b = lora_params["w"].factors["B"]
    >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-6))
    True
    """

    @property
    def name(self) -> str:
        """The name that `LoRA(init=...)` knows it by."""
        return "olora"

    def start(self, key: jax.Array, weight: jax.Array, site: Site, rank: int, scale: float) -> Start:
        """From the QR decomposition of the transposed weight."""
        q, r = jnp.linalg.qr(jnp.swapaxes(weight, -1, -2))
        return Start(jnp.swapaxes(r[..., :rank, :], -1, -2), jnp.swapaxes(q[..., :rank], -1, -2))
