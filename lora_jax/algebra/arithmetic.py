"""Adapters as vectors: `scale`, `negate`, `add`, `subtract`; and `resize`, which changes their rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import applied_to
from lora_jax.algebra.combine import combine
from lora_jax.algebra.lowrank import is_plain, low_rank, truncated
from lora_jax.contract import wider
from lora_jax.explicit import whole
from lora_jax.factored import is_factored
from lora_jax.factors import Adapter, LoraParams, key_of, together
from lora_jax.optim import FROZEN
from lora_jax.variants.full import Full
from lora_jax.variants.initializers import INITIALIZERS
from lora_jax.variants.lora import LoRA


def scale(lora_params: Mapping[str, Adapter], factor: float | jax.Array, *, base: Any = None) -> LoraParams:
    """The adapter with ΔW times a number; variants, shapes and dtypes stay, so nothing that is compiled is retraced.

    One factor of each leaf is multiplied: of those that train the last of the fewest dimensions, that is LoRA's B.

    Args:
      lora_params: What trains.
      factor: A number of any sign; may be traced.
      base: The frozen tree, where leaves train in `Full`, which become base + factor · (weight - base).

    Returns:
      `lora_params` again; factors that did not change are shared.

    Raises:
      ValueError: The ΔW of a variant is not linear in a factor that trains; or `Full` without `base`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, rules = {"w": jnp.zeros((8, 4))}, {"w": lora.LoRA(rank=2)}
    >>> lora_params = jax.tree.map(jnp.ones_like, lora.split(jax.random.key(0), params, rules)[1])
    >>> lora.merge(params, lora.scale(lora_params, 0.5))["w"][0]
    Array([1., 1., 1., 1.], dtype=float32)
    """

    whole = together(lora_params)

    def scaled(path: str, adapter: Adapter) -> Adapter:
        if path not in whole:  # what leaves share
            return adapter
        if isinstance(adapter.variant, Full):
            return combine([{path: adapter}], [factor], base=base)[path]  # pyright: ignore[reportArgumentType]
        name = _linear_factor(path, whole[path])
        array = jnp.asarray(adapter.factors[name])
        wide = wider(array.dtype, jnp.float32)
        product = (array.astype(wide) * jnp.asarray(factor, wide)).astype(array.dtype)
        return dataclasses.replace(adapter, factors={**adapter.factors, name: product})

    return {path: scaled(path, adapter) for path, adapter in lora_params.items()}


def _linear_factor(path: str, adapter: Adapter) -> str:
    """The factor that multiplies the whole of ΔW, and trains."""
    variant, factors = adapter.variant, adapter.factors
    labels = variant.labels()
    value = applied_to(jax.ShapeDtypeStruct(adapter.site.shape, jnp.float32), path, adapter)
    base = value.base if is_factored(value) else None
    if base and len(base.operands) == 1 and base.scale == 1:  # the base as it is, and ΔW beside it
        operands = variant.delta(factors, adapter.site).operands
        times = {name: sum(x is array for x in operands) for name, array in factors.items()}
        names = [name for name in factors if times[name] == 1 and labels[name] != FROZEN]
        if names:
            return min(reversed(names), key=lambda name: factors[name].ndim)
    raise ValueError(
        f"{path!r}: the ΔW of {type(variant).__name__} is not proportional to a factor that trains: merge it into the "
        "base and `extract` a LoRA from what comes of it, or leave the path out"
    )


def negate(lora_params: Mapping[str, Adapter], *, base: Any = None) -> LoraParams:
    """The adapter that takes away what this one adds, `scale` by -1: exact, bit by bit.

    Source: Ilharco et al. 2022 (task arithmetic), https://arxiv.org/abs/2212.04089.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((8, 4))}
    >>> _, lora_params = lora.split(jax.random.key(0), params, {"w": lora.LoRA(rank=2)})
    >>> bool((lora.negate(lora_params)["w"].factors["B"] == -lora_params["w"].factors["B"]).all())
    True
    """
    return scale(lora_params, -1.0, base=base)


def add(first: Mapping[str, Adapter], second: Mapping[str, Adapter], *, base: Any = None) -> LoraParams:
    """The sum of two adapters of one base, exactly: `combine` by "cat" with weights 1 and 1, so that ranks add up.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=1)})
    >>> lora.add(lora_params, lora_params)["w"].variant.rank
    2
    """
    return combine([first, second], [1.0, 1.0], base=base)


def subtract(first: Mapping[str, Adapter], second: Mapping[str, Adapter], *, base: Any = None) -> LoraParams:
    """The difference of two adapters of one base, exactly: `combine` by "cat" with weights 1 and -1.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=1)})
    >>> bool(jnp.allclose(lora.merge({"w": jnp.ones((8, 4))}, lora.subtract(lora_params, lora_params))["w"], 1))
    True
    """
    return combine([first, second], [1.0, -1.0], base=base)


def resize(lora_params: Mapping[str, Adapter], rank: int, *, key: jax.Array | None = None) -> LoraParams:
    """The adapter in another rank: cut off with the least error, or grown with none. Works under `jax.jit`.

    Where the rank falls, the largest singular values of ΔW stay, layer by layer of a stacked leaf: no adapter of that
    rank comes closer in the Frobenius norm. A then has orthonormal columns, and B the singular values. Where the rank
    rises, the factors stay as they are and ΔW, too: A gets columns drawn as at the start of training and B rows of
    zeros. (Were A zero there, too, neither would ever have a gradient.) The scale stays: alpha changes with the rank.

    Args:
      lora_params: What trains; leaves in `Full`, which have no rank, stay as they are.
      rank: The new rank, for every leaf.
      key: A PRNG key, needed where the rank rises.

    Returns:
      `lora_params` of that rank, of the same variants, scales and dtypes.

    Raises:
      ValueError: A leaf is too small for the rank; a variant is neither LoRA nor LoRAFA; the rank rises and there is no
        key.

    Source: Eckart and Young 1936, https://doi.org/10.1007/BF02288367.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2, alpha=8)})
    >>> lora.resize(lora_params, 1)["w"].variant
    LoRA(rank=1, alpha=4.0, scaling='standard', init='normal', dtype='float32', dropout=0.0)
    """
    return {path: _resized(path, adapter, rank, key) for path, adapter in together(lora_params).items()}


def _resized(path: str, adapter: Adapter, rank: int, key: jax.Array | None) -> Adapter:
    old, site = adapter.variant, adapter.site
    if isinstance(old, Full):
        return adapter
    if not is_plain(old):
        raise ValueError(
            f"{path!r}: resize takes LoRA, and this is {type(old).__name__}: combine([...], [1.0], method='svd', "
            "rank=...) makes a LoRA of any variant whose ΔW is a product A·B"
        )
    power = 0.5 if old.scaling == "rank_stabilized" else 1
    variant = dataclasses.replace(old, rank=rank, alpha=old.scale * rank**power)
    if variant.rank > site.max_rank:
        raise ValueError(f"{path!r} {site.shape}: rank {rank} is above {site.max_rank}, the most that its sides allow")
    if variant.rank == old.rank:
        return adapter
    if variant.rank < old.rank:
        return dataclasses.replace(truncated(low_rank(path, adapter).svd(), site, variant), keys=adapter.keys)
    if key is None:
        raise ValueError(
            f"{path!r}: the rank rises from {old.rank} to {rank}, so new columns of A are drawn: pass key="
        )
    return dataclasses.replace(adapter, variant=variant, factors=_grown(path, adapter, variant, key))


def _grown(path: str, adapter: Adapter, variant: LoRA, key: jax.Array) -> dict[str, Any]:
    """The factors with columns of A and rows of B more."""
    init = variant.init if callable(variant.init) or variant.init in INITIALIZERS else "normal"
    shape = jax.ShapeDtypeStruct(adapter.site.shape, jnp.float32)
    _, fresh = LoRA(variant.rank, init=init, dtype=variant.dtype).initial(key_of(key, path), shape, adapter.site)
    a, b = (whole(jnp.asarray(adapter.factors[name])) for name in ("A", "B"))
    axis, more = len(adapter.site.batch_axes), variant.rank - a.shape[-1]
    zeros = jnp.zeros((*b.shape[:axis], more, *b.shape[axis + 1 :]), b.dtype)
    columns = fresh["A"][..., a.shape[-1] :].astype(a.dtype)
    return {"A": jnp.concatenate([a, columns], -1), "B": jnp.concatenate([b, zeros], axis)}
