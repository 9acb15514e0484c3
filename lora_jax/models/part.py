"""What the modules of all models share: dtypes, how parameters are drawn, norms and activations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

_exact, _tanh = (functools.partial(jax.nn.gelu, approximate=approximate) for approximate in (False, True))
# By the names of Hugging Face's config.json.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _exact,
    "gelu_python": _exact,
    "gelu_new": _tanh,
    "gelu_fast": _tanh,
    "gelu_accurate": _tanh,
    "gelu_pytorch_tanh": _tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Part(nn.Module):
    """A module with a config, and the dtypes of computation (None: the parameters') and of parameters."""

    config: Any
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.nowrap
    def part(self, kind: type[nn.Module], *args: Any, **options: Any) -> Any:
        """A submodule with the same dtypes."""
        return kind(*args, dtype=self.dtype, param_dtype=self.param_dtype, **options)  # pyright: ignore[reportCallIssue]

    @nn.nowrap
    def dense(self, features: int, name: str | None = None, *, bias: bool = True) -> nn.Dense:
        """A linear layer, with its kernel [in, features]."""
        init = nn.initializers.normal(self.config.initializer_range)
        return self.part(nn.Dense, features, bias, kernel_init=init, name=name)

    @nn.nowrap
    def embed(self, entries: int, name: str | None = None) -> nn.Embed:
        """A table of rows as wide as the hidden states."""
        init = nn.initializers.normal(self.config.initializer_range)
        return self.part(nn.Embed, entries, self.config.hidden_size, embedding_init=init, name=name)


class Norm(nn.Module):
    """Rows divided by their root mean square (RMSNorm), or centered too and with a bias (LayerNorm); in float32.

    `offset` is added to the scale: 1 where files hold how much it differs from 1.
    """

    epsilon: float
    centered: bool = False
    offset: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From [..., D] to [..., D].

        >>> norm = Norm(1e-6)
        >>> norm.apply(norm.init(jax.random.key(0), jnp.ones(2)), jnp.array([3.0, -3.0])).round(4)
        Array([ 1., -1.], dtype=float32)
        """
        init = nn.initializers.constant(1 - self.offset)
        scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
        y = x.astype(jnp.float32)
        if self.centered:
            y -= y.mean(-1, keepdims=True)
        y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * (scale.astype(jnp.float32) + self.offset)
        if self.centered:
            y += self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype).astype(jnp.float32)
        return y.astype(self.dtype or jnp.promote_types(x.dtype, scale.dtype))
