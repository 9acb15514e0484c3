"""Orthogonal: neither factor begins at zero, but their product does."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.initial.start import Initialization, Start
from lora_jax.sites import Site


@dataclasses.dataclass(frozen=True)
class Orthogonal(Initialization):
    """A = X·P/10 and B = Qᵀ·Y/10, with X and Y normal and P and Q the odd and even rows of a random orthogonal matrix.

    P·Qᵀ = 0, so A·B is zero but for rounding, which is taken out of the base; and A trains from the first step on, as
    it does not where B is zero. `init="orthogonal"` is Orthogonal().

    Raises:
      ValueError: In `split`, for an odd rank.

    Source: `init_lora_weights="orthogonal"` in Hugging Face PEFT, after
    https://datta0.github.io/posts/rethink-lora-init/.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> rules = {"w": lora.LoRA(rank=2, init="orthogonal")}
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((6, 4))}, rules)
    >>> a, b = lora_params["w"].factors["A"], lora_params["w"].factors["B"]
    >>> bool(jnp.abs(a @ b).max() < 1e-7 < jnp.abs(b).max())
    True
    """

    @property
    def name(self) -> str:
        """The name that `LoRA(init=...)` knows it by."""
        return "orthogonal"

    def start(self, key: jax.Array, weight: jax.Array, site: Site, rank: int, scale: float) -> Start:
        """Random factors of which each uses half of the rank's dimensions, rotated."""
        if rank % 2:
            raise ValueError(f"init='orthogonal' shares the rank's dimensions between A and B, and rank {rank} is odd")
        return Start(*_drawn(key, weight.shape, rank, weight.dtype))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(key: jax.Array, shape: tuple[int, ...], rank: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    *batch, n, k = shape
    keys = jax.random.split(key, 3)
    rotation, left, right = (
        jax.random.normal(key, (*batch, *shape), dtype)
        for key, shape in zip(keys, ((rank, rank), (n, rank // 2), (rank // 2, k)), strict=True)
    )
    rotation, _ = jnp.linalg.qr(rotation)
    odd, even = rotation[..., 0::2, :], rotation[..., 1::2, :]
    return left @ odd / 10, jnp.swapaxes(even, -1, -2) @ right / 10
