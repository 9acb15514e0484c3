"""Adapter: what trains at one leaf, and what leaves have in common."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import reprlib
from collections.abc import Mapping
from typing import Any, TypeGuard

import jax

from lora_jax import tree
from lora_jax.sites import Site
from lora_jax.variants.base import SHARED, Variant

LoraParams = dict[str, "Adapter"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["factors", "keys"], meta_fields=["variant", "site"])
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """What trains at one leaf: named factors, with the variant and the leaf's axes as static metadata.

    Factors that several leaves share, as of VeRA, are an Adapter of their own, whose site is of kind "shared".

    Attributes:
      factors: Arrays by name; of LoRA, "A" and "B".
      variant: How ΔW is made of them.
      site: The leaf's shape, kind and axes.
      keys: What `dropout` draws masks with, one PRNG key for each entry along the batch axes; None without it.
    """

    factors: dict[str, Any]
    variant: Variant
    site: Site
    keys: Any = None


def is_adapter(node: Any) -> TypeGuard[Adapter]:
    """Whether a node of a tree is an Adapter; made for `is_leaf=`."""
    return isinstance(node, Adapter)


def together(lora_params: Mapping[str, Adapter]) -> LoraParams:
    """The adapters of leaves alone, each with all of its factors, those too that it shares with others.

    Raises:
      ValueError: The shared factors of a leaf are not there.
    """
    for path, adapter in lora_params.items():
        if not is_adapter(adapter):
            found = reprlib.repr(adapter)
            raise ValueError(f"lora_params has {found} at {path!r}, which is no Adapter: give what `split` returned")
    joined = LoraParams()
    for path, adapter in lora_params.items():
        if adapter.site.kind == SHARED:
            continue
        if adapter.variant.shared:
            pool = adapter.variant.shared_path
            if pool not in lora_params:
                raise ValueError(
                    f"{path!r} as {adapter.variant} needs what lora_params holds at {pool!r}, which is not there: keep "
                    "that entry together with those of the leaves"
                )
            adapter = dataclasses.replace(adapter, factors={**lora_params[pool].factors, **adapter.factors})
        joined[path] = adapter
    return joined


def check_fits(lora_params: Mapping[str, Adapter], leaves: Mapping[str, Any]) -> None:
    """Checks that a model has the leaves of adapters.

    Args:
      lora_params: The adapters.
      leaves: The model's arrays, or their shapes, by path.

    Raises:
      ValueError: It lacks some, or has them in other shapes; the message names the first, and says how many.
    """
    own = {path: tuple(a.site.shape) for path, a in lora_params.items() if a.site.kind != SHARED}
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    odd = [path for path, shape in own.items() if shapes.get(path) != shape]
    if odd:
        path = odd[0]
        what = f"has {shapes[path]} there" if path in shapes else f"has no such leaf{tree.close_to(path, shapes)}"
        raise ValueError(
            f"{len(odd)} of the adapter's {len(own)} leaves do not fit this model, the first '{path}' {own[path]}: the "
            f"model {what}: give the model that the adapter was made for"
        )


def shared(variant: Variant, factors: Mapping[str, Any]) -> LoraParams:
    """The entry of `lora_params` that holds what a variant's leaves share, from given factors.

    `split` makes one by itself, at random; this one is for factors that come from elsewhere, such as a file.

    Args:
      variant: The variant.
      factors: What `variant.shared` names.

    Returns:
      A dict from `variant.shared_path` to an Adapter.

    Raises:
      ValueError: The names are not those that the variant shares.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> vera = lora.VeRA(rank=2)
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": vera})
    >>> lora_params |= lora.shared(vera, {"A": jnp.ones((8, 2)), "B": jnp.ones((2, 4))})
    """
    if set(factors) != set(variant.shared):
        raise ValueError(f"{variant} shares factors {[*variant.shared]}, not {[*factors]}")
    return {variant.shared_path: Adapter(dict(factors), variant, Site((), SHARED))}


def pools(key: jax.Array, leaves: Mapping[str, Any], lora_params: LoraParams) -> LoraParams:
    """What the leaves share, once for each path that their variants hold it at."""
    users = [adapter for adapter in lora_params.values() if adapter.variant.shared]
    pools = LoraParams()
    for path, variant in {adapter.variant.shared_path: adapter.variant for adapter in reversed(users)}.items():
        if path in leaves:
            raise ValueError(f"{path!r} is a leaf, and {variant} holds shared factors there: rename the leaf")
        sites = [adapter.site for adapter in users if adapter.variant.shared_path == path]
        pools |= shared(variant, variant.pool(key_of(key, path), sites))
    return pools


def key_of(key: jax.Array, path: str) -> jax.Array:
    """A key that depends on the path alone, the same in every process and session."""
    return jax.random.fold_in(key, int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little"))
