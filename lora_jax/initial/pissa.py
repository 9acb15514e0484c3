"""PiSSA: the factors begin as the principal part of the weight, and the rest of it is what stays frozen."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lora_jax.initial.start import Initialization, Start
from lora_jax.sites import Site


@dataclasses.dataclass(frozen=True)
class PiSSA(Initialization):
    """A = U·√(S/s) and B = √(S/s)·Vᵀ of the `rank` largest singular values of W = U·S·Vᵀ; W - s·A·B stays frozen.

    `init="pissa"` is PiSSA(), and `init="pissa_niter_4"` is PiSSA(iterations=4).

    Args:
      iterations: None for the exact decomposition, of O(in·out·min(in, out)); or how many rounds of subspace iteration
        approximate it, of O(in·out·rank) each, as large matrices need. The function starts as it is either way.

    Raises:
      ValueError: For a negative number of iterations.

    Source: Meng et al. 2024, https://arxiv.org/abs/2404.02948.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> w = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    >>> frozen, lora_params = lora.split(jax.random.key(0), {"w": w}, {"w": lora.LoRA(rank=1, init="pissa")})
    >>> jnp.diag(frozen["w"])
    Array([0., 2., 1.], dtype=float32)
    """

    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.iterations is not None and self.iterations < 0:
            raise ValueError(
                f"PiSSA(iterations={self.iterations}): iterations are 0 or more, or None for the exact SVD"
            )

    @property
    def name(self) -> str:
        """The name that `LoRA(init=...)` knows it by."""
        return "pissa" if self.iterations is None else f"pissa_niter_{self.iterations}"

    def start(self, key: jax.Array, weight: jax.Array, site: Site, rank: int, scale: float) -> Start:
        """The principal part, half of each singular value on either side."""
        if self.iterations is None:
            return Start(*principal(weight, rank, scale))
        return Start(*halves(*randomized_svd(key, weight, rank, self.iterations), scale))


@functools.partial(jax.jit, static_argnums=(1, 2))
def principal(matrix: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """A and B with scale·A·B the best approximation of a matrix that has this rank."""
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return halves(u[..., :rank], s[..., :rank], vt[..., :rank, :], scale)


@functools.partial(jax.jit, static_argnums=3)
def halves(u: jax.Array, s: jax.Array, vt: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """A and B with scale·A·B = u·diag(s)·vt, and the columns of A as long as the rows of B."""
    root = jnp.sqrt(s / abs(scale))
    return u * root[..., None, :], (root if scale > 0 else -root)[..., :, None] * vt


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def randomized_svd(
    key: jax.Array, matrix: jax.Array, rank: int, iterations: int, oversampling: int = 8
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `rank` largest singular values and vectors, approximately.

    Args:
      key: A PRNG key.
      matrix: (..., n, k).
      rank: How many.
      iterations: Rounds of subspace iteration.
      oversampling: How many more directions the subspace has.

    Returns:
      u (..., n, rank), s (..., rank) and vt (..., rank, k).

    Exact, but for rounding, where the matrix has no more than rank + oversampling singular values other than zero.

    Source: Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1, https://arxiv.org/abs/0909.4061.

    >>> matrix = jnp.diag(jnp.arange(16.0))
    >>> u, s, vt = randomized_svd(jax.random.key(0), matrix, 2, 4)
    >>> [round(float(x), 4) for x in s]
    [15.0, 14.0]
    """
    *batch, n, k = matrix.shape
    width = min(rank + oversampling, n, k)
    transposed = jnp.swapaxes(matrix, -1, -2)
    q, _ = jnp.linalg.qr(matrix @ jax.random.normal(key, (*batch, k, width), matrix.dtype))
    for _ in range(iterations):
        z, _ = jnp.linalg.qr(transposed @ q)
        q, _ = jnp.linalg.qr(matrix @ z)
    u, s, vt = jnp.linalg.svd(jnp.swapaxes(q, -1, -2) @ matrix, full_matrices=False)
    return (q @ u)[..., :rank], s[..., :rank], vt[..., :rank, :]
