"""LowRank: a leaf's ΔW as the product of two thin matrices, and its singular value decomposition without forming it."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import Axes, size_of
from lora_jax.contract import contract, wider
from lora_jax.explicit import whole
from lora_jax.factors import Adapter
from lora_jax.network import Network
from lora_jax.sites import Site
from lora_jax.variants.base import Variant
from lora_jax.variants.lora import LoRA
from lora_jax.variants.lora_fa import LoRAFA

matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class SVD(NamedTuple):
    """U·diag(s)·Vᵀ, one for each entry along the batch axes.

    Attributes:
      u: (batch..., in, k), with orthonormal columns, also where singular values are zero.
      s: (batch..., k), descending.
      vt: (batch..., k, out), with orthonormal rows.
    """

    u: jax.Array
    s: jax.Array
    vt: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = A·B with the scale in B, one pair of matrices for each entry along the batch axes; in float32 or wider.

    Attributes:
      a: (batch..., in, rank): the in axes of the leaf as one.
      b: (batch..., rank, out): the out axes as one.
      site: The leaf's shape and axes.
      dtype: The dtype in which the factors are kept.
    """

    a: jax.Array
    b: jax.Array
    site: Site
    dtype: str

    @property
    def rank(self) -> int:
        """The number of columns of A and rows of B."""
        return self.a.shape[-1]

    def svd(self) -> SVD:
        """The decomposition of A·B, from that of a matrix of its rank: A = Q·R and Bᵀ = P·S make it Q·(R·Sᵀ)·Pᵀ."""
        q, r = jnp.linalg.qr(self.a)
        p, s = jnp.linalg.qr(self.b.mT)
        u, values, vt = jnp.linalg.svd(matmul(r, s.mT), full_matrices=False)
        return SVD(matmul(q, u), values, matmul(vt, p.mT))


def low_rank(path: str, adapter: Adapter) -> LowRank:
    """The ΔW of an adapter as A·B.

    Any network will do that falls in two: operands with in axes, and operands with out axes. So LoRA's, one with a
    diagonal between A and B, and a product of two LoRAs, entry by entry, whose rank is that of one times the other's.

    Args:
      path: Of the leaf, for messages.
      adapter: What trains there.

    Raises:
      ValueError: The variant changes the base, or its network has an operand with in and out axes.
    """
    variant, site = adapter.variant, adapter.site
    if type(variant).apply is not Variant.apply or not site.adaptable:
        raise _not_low_rank(path, variant)
    network = variant.delta(adapter.factors, site)
    batch, inner, outer = site.axes()
    left, right = _sides(path, variant, network, inner, outer)
    named = [{axis for i in side for axis in network.axes[i]} for side in (left, right)]
    rank = tuple(sorted((named[0] & named[1]) - {*batch}))
    dtype = wider(*(x.dtype for x in network.operands))
    wide = wider(dtype, jnp.float32)

    def product(side: list[int], axes: Axes) -> jax.Array:
        return contract(
            [(whole(jnp.asarray(network.operands[i], wide)), network.axes[i]) for i in side],
            axes,
            precision=lax.Precision.HIGHEST,
        )

    sizes = tuple(axis.size for axis in batch)
    a = product(left, (*batch, *inner, *rank)).reshape(*sizes, size_of(inner), size_of(rank))
    b = product(right, (*batch, *rank, *outer)).reshape(*sizes, size_of(rank), size_of(outer))
    return LowRank(a, b * network.scale if network.scale != 1 else b, site, dtype.name)


def _sides(path: str, variant: Variant, network: Network, inner: Axes, outer: Axes) -> tuple[list[int], list[int]]:
    """The operands that make A, and those that make B; a diagonal between them is of B."""
    left = [i for i, axes in enumerate(network.axes) if {*axes} & {*inner}]
    right = [i for i in range(len(network.axes)) if i not in left]
    carried = [{axis for i in side for axis in network.axes[i]} for side in (left, right)]
    if not ({*inner} <= carried[0] and {*outer} <= carried[1]) or carried[0] & {*outer}:
        raise _not_low_rank(path, variant)
    return left, right


def is_plain(variant: Variant) -> TypeGuard[LoRA]:
    """Whether ΔW is s·A·B, of these two factors and nothing else, however they begin and whichever of them trains."""
    own = type(variant)
    return isinstance(variant, LoRA) and own.delta in (LoRA.delta, LoRAFA.delta) and own.apply is Variant.apply


def _not_low_rank(path: str, variant: Variant) -> ValueError:
    return ValueError(
        f"{path!r}: the ΔW of {type(variant).__name__} is no product A·B of its factors: merge it into the base and "
        "`extract` a LoRA from what comes of it, or leave the path out"
    )


def lora_adapter(a: jax.Array, b: jax.Array, site: Site, variant: LoRA) -> Adapter:
    """An adapter from matrices (batch..., in, rank) and (batch..., rank, out), in the variant's dtype.

    The variant's scale still multiplies them.
    """
    batch, inner, outer = site.sizes()
    factors = {"A": a.reshape(*batch, *inner, a.shape[-1]), "B": b.reshape(*batch, b.shape[-2], *outer)}
    return Adapter({name: x.astype(variant.dtype) for name, x in factors.items()}, variant, site)


def truncated(svd: SVD, site: Site, variant: LoRA) -> Adapter:
    """The best adapter of the variant's rank in the Frobenius norm (Eckart and Young 1936).

    A has orthonormal columns and B the singular values: a column of A is about as long as at the start of training, and
    where a singular value is zero, B trains, which it could not if A were zero there, too.
    """
    u, s, vt = svd.u[..., : variant.rank], svd.s[..., : variant.rank], svd.vt[..., : variant.rank, :]
    return lora_adapter(u, s[..., :, None] * vt / variant.scale, site, variant)
