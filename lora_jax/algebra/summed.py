"""`summed`: several adapters as one that merges to base + Σ wᵢ ΔWᵢ exactly, for a merge of all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.algebra.arithmetic import scale
from lora_jax.algebra.combine import combine
from lora_jax.factors import Adapter, LoraParams, together
from lora_jax.variants.full import Full


def summed(adapters: Sequence[Mapping[str, Adapter]], weights: Sequence[float], *, base: Any = None) -> LoraParams:
    """The sum of adapters of one base, by paths.

    A leaf that one of them has, with weight 1, stays as it is, of whichever variant; with another weight it is scaled.
    One that several have is combined by "cat", for which each ΔW must be a product A·B.

    Args:
      adapters: What `split` returned second, or `load`.
      weights: A number for each.
      base: The frozen tree, where a leaf that trains in `Full` has a weight other than 1.

    Returns:
      `lora_params`, for `merge`.

    Raises:
      ValueError: As `scale` and `combine`; or several adapters train a leaf in `Full`.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=1)})
    >>> summed([lora_params, lora_params], [0.5, 2.0])["w"].variant.rank
    2
    """
    whole = [together(one) for one in adapters]
    found = LoraParams()
    for path in dict.fromkeys(path for one in whole for path in one):
        having = [i for i, one in enumerate(whole) if path in one]
        own = [{path: whole[i][path]} for i in having]
        if len(own) > 1:
            if any(isinstance(one[path].variant, Full) for one in own):
                raise ValueError(
                    f"'{path}' trains in Full in {len(own)} of the adapters, and a sum of such leaves is seldom "
                    "wanted: merge one of them alone, or make one of them by `combine`, base + Σ w·(weight - base)"
                )
            found |= combine(own, [weights[i] for i in having])
        elif weights[having[0]] == 1:
            kept = (path, own[0][path].variant.shared_path)
            found |= {p: x for p, x in adapters[having[0]].items() if p in kept}
        elif own[0][path].variant.shared:
            found |= combine(own, [weights[having[0]]])
        else:
            found |= scale(own[0], weights[having[0]], base=base)
    return found
