"""Initialization: how LoRA's factors begin from the weight, and what is then frozen so that the sum is the weight."""

from __future__ import annotations

import abc
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.contract import wider
from lora_jax.matrices import from_matrices, to_matrices
from lora_jax.sites import Site


class Start(NamedTuple):
    """What an `Initialization` returns, as matrices: the weight's in axes made one, and its out axes.

    Attributes:
      a: (*batch, in, rank).
      b: (*batch, rank, out); None for zero.
      base: (*batch, in, out), what stays frozen; None for W - s·A·B, by which the function starts as it is.
    """

    a: jax.Array
    b: jax.Array | None = None
    base: jax.Array | None = None


class Initialization(abc.ABC):
    """A way for LoRA's factors to begin that looks at the weight, for `LoRA(init=...)`.

    `split` keeps its name alone, so that an adapter holds on to no array that only its start depends on.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> class FirstRows(lora.Initialization):
    ...     def start(self, key, weight, site, rank, scale):
    ...         return lora.Start(jnp.eye(weight.shape[-2], rank), weight[..., :rank, :] / scale)
    >>> frozen, _ = lora.split(jax.random.key(0), {"w": jnp.ones((3, 2))}, {"w": lora.LoRA(1, init=FirstRows())})
    >>> frozen["w"]
    Array([[0., 0.],
           [1., 1.],
           [1., 1.]], dtype=float32)
    """

    @property
    def name(self) -> str:
        """What `split` leaves of it in the adapter's variant."""
        return type(self).__name__

    @abc.abstractmethod
    def start(self, key: jax.Array, weight: jax.Array, site: Site, rank: int, scale: float) -> Start:
        """The factors to start from.

        Args:
          key: A key of this leaf's own.
          weight: (*batch, in, out), in float32 or wider.
          site: How that lies in the leaf, for `from_matrices`.
          rank: The rank of the factors.
          scale: The number s that multiplies A·B.

        Raises:
          ValueError: It does not suit the leaf. `split` puts the path in front of the message.
        """


def started(
    how: Initialization, key: jax.Array, weight: Any, site: Site, rank: int, scale: float, dtype: str
) -> tuple[Any, dict[str, jax.Array]]:
    """What stays frozen at a leaf, in the leaf's dtype, and the factors A and B in theirs.

    The base is W less the factors as they are once rounded to `dtype`, computed in float32 or wider and rounded once to
    the leaf's dtype: so base and factors add up to W to half a unit in the last place of the base.
    """
    if isinstance(weight, jax.ShapeDtypeStruct):
        raise ValueError(f"init={how.name!r} reads the leaf, and this one has no values: split inside jax.eval_shape")
    batch, inner, outer = site.sizes()
    wide = wider(weight.dtype, jnp.float32)
    with jax.default_matmul_precision("highest"):
        matrices = to_matrices(jnp.asarray(weight, wide), site)
        a, b, base = how.start(key, matrices, site, rank, scale)
        shapes = (*batch, matrices.shape[-2], rank), (*batch, rank, matrices.shape[-1])
        if a.shape != shapes[0] or (b is not None and b.shape != shapes[1]):
            found = a.shape, None if b is None else b.shape
            raise ValueError(f"init={how.name!r} gives A and B of shapes {found} where {shapes} are wanted")
        a = a.astype(dtype)
        factors = {"A": a.reshape(*batch, *inner, rank), "B": jnp.zeros((*batch, rank, *outer), dtype)}
        if b is not None:
            b = b.astype(dtype)
            factors["B"] = b.reshape(*batch, rank, *outer)
        if base is None and b is not None:
            base = _without(matrices, a, b, scale)
    return (weight if base is None else from_matrices(base, site).astype(weight.dtype)), factors


@functools.partial(jax.jit, static_argnums=3)
def _without(matrices: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    return matrices - scale * (a.astype(matrices.dtype) @ b.astype(matrices.dtype))
