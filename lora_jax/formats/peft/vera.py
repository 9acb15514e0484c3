"""VeRA's projections in PEFT's form: two tensors of no module, as large as the largest module needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.factors import Adapter, LoraParams, shared
from lora_jax.formats.peft.folder import SHARED
from lora_jax.formats.peft.modules import Module
from lora_jax.sites import Site

NAMES = dict(zip("AB", SHARED, strict=True))


def projections(lora_params: Mapping[str, Adapter], modules: Mapping[str, Module]) -> dict[str, np.ndarray]:
    """The two tensors by name: of ours, the rows and columns that these modules use.

    Raises:
      ValueError: A module's inputs or outputs are in another order than the leaf's, which all share.
    """
    for name, module in modules.items():
        place, site = module.place, module.place.site()
        flat = [[axis for group in place.layout.side(side) for axis in group] for side in "io"]
        if flat != [[place.axes[d] for d in axes] for axes in (site.in_axes, site.out_axes)] or place.part:
            raise ValueError(
                f"'{name}' has its inputs or outputs in another order than ours, or is made of several leaves, and "
                "VeRA's projections are one for all: `merge` it"
            )
    sizes = largest(module.place.site() for module in modules.values())
    (variant,) = {module.variant.shared_path for module in modules.values()}
    a, b = (np.asarray(lora_params[variant].factors[name]) for name in "AB")
    found = {"A": a[: sizes[0]].T, "B": b[:, : sizes[1]].T}
    return {NAMES[name]: x for name, x in found.items()}


def largest(sites: Iterable[Site]) -> tuple[int, int]:
    """The most inputs and the most outputs of any leaf."""
    sides = [tuple(math.prod(own) for own in site.sizes()[1:]) for site in sites]
    return max(inner for inner, _ in sides), max(outer for _, outer in sides)


def pool(users: Sequence[Adapter], tensors: dict[str, np.ndarray]) -> LoraParams:
    """What leaves share, from the two tensors, which are taken out of the dict.

    Args:
      users: The leaves' adapters.
      tensors: By name.

    Raises:
      ValueError: They are not there, or not as large as the leaves need; or not all leaves are of one dtype.
    """
    variant: Any = users[0].variant
    if other := next((user.variant for user in users if user.variant != variant), None):
        raise ValueError(f"some modules have {variant}, others {other}: convert their tensors to one dtype")
    if missing := [name for name in NAMES.values() if name not in tensors]:
        raise ValueError(
            f"'{missing[0]}' is not in the file, and VeRA's projections are PyTorch's random numbers: save it again "
            "with save_projection=True"
        )
    factors = {name: tensors.pop(key).T for name, key in NAMES.items()}
    inner, outer = largest(user.site for user in users)
    if factors["A"].shape != (inner, variant.rank) or factors["B"].shape != (variant.rank, outer):
        raise ValueError(
            f"VeRA's projections have shapes {factors['A'].T.shape} and {factors['B'].T.shape}, and the adapted "
            f"modules make them {(variant.rank, inner)} and {(outer, variant.rank)}: this is not their file"
        )
    return shared(variant, {name: jnp.asarray(np.ascontiguousarray(x)) for name, x in factors.items()})
