"""VeRA: two random projections that all leaves share, and two trained vectors for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.network import Network
from lora_jax.sites import Site
from lora_jax.variants.base import FROZEN, Factors, Variant, rank_axis
from lora_jax.variants.hyperparameters import check, check_number


@dataclasses.dataclass(frozen=True)
class VeRA(Variant):
    """Vector-based random matrix adaptation: y = x·W + b∘((d∘(x·A))·B), with A and B random, frozen and shared.

    A is (the most inputs of any leaf, rank) and B (rank, the most outputs); a leaf takes the first rows of A and the
    first columns of B that it needs. `lora_params` holds them once, under "shared/VeRA-<rank>-<dtype>", and `save`
    writes them; `lora_jax.shared` makes that entry from projections that come from elsewhere. A leaf has d, (rank,),
    and b, of the weight's out axes; both have its batch axes too.

    A training step of n inputs costs 4ndk + 4nr(d + k) + 4nr + 4nk FLOPs at a kernel (d, k), of which 4ndk are the
    base's: what is frozen needs no gradient.

    Args:
      rank: The number of columns of A; it may exceed the sides of a weight.
      d_initial: What d begins as; b begins as zero.
      dtype: The dtype of all factors.
      dropout: As in `LoRA`.

    Raises:
      ValueError: For a rank below 1, a d_initial that is 0 or not finite, an unknown dtype, a dropout that is no
        probability below 1.

    Source: Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"up": jnp.ones((64, 256)), "down": jnp.ones((256, 64))}
    >>> frozen, lora_params = lora.split(jax.random.key(0), params, {".*": lora.VeRA(rank=16)})
    >>> {path: {name: a.shape for name, a in adapter.factors.items()} for path, adapter in lora_params.items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'down': {'d': (16,), 'b': (64,)}, 'up': {'d': (16,), 'b': (256,)},
     'shared/VeRA-16-float32': {'A': (256, 16), 'B': (16, 256)}}
    """

    rank: int
    d_initial: float = dataclasses.field(default=0.1, compare=False)
    dtype: str = "float32"
    dropout: float = 0.0
    shared: ClassVar[tuple[str, ...]] = ("A", "B")

    def __post_init__(self) -> None:
        check(self)
        check_number(self, "d_initial", bool, "d begins as a finite number, not 0, or neither d nor b would train")

    @property
    def shared_path(self) -> str:
        """One for each rank and dtype."""
        return f"shared/VeRA-{self.rank}-{self.dtype}"

    def initial(self, key: jax.Array, weight: Any, site: Site) -> tuple[Any, Factors]:
        """d as it is given, and b zero; the weight stays as it is."""
        batch, _, outer = site.sizes()
        d = jnp.full((*batch, self.rank), self.d_initial, self.dtype)
        return weight, {"d": d, "b": jnp.zeros(batch + outer, self.dtype)}

    def pool(self, key: jax.Array, sites: Sequence[Site]) -> Factors:
        """A and B as large as the largest leaf needs, of He's uniform distribution, as PEFT draws them."""
        inner, outer = (max(math.prod(site.sizes()[side]) for site in sites) for side in (1, 2))
        draw, keys = jax.nn.initializers.he_uniform(), jax.random.split(key)
        dtype = jnp.dtype(self.dtype)
        return {"A": draw(keys[0], (inner, self.rank), dtype), "B": draw(keys[1], (self.rank, outer), dtype)}

    def delta(self, factors: Factors, site: Site) -> Network:
        """`ir,r,ro,o->io`; d and b have batch axes."""
        batch, inner, outer = site.axes()
        _, inputs, outputs = site.sizes()
        a, b, rank = factors["A"], factors["B"], rank_axis(self.rank)
        if a.shape[0] < math.prod(inputs) or b.shape[1] < math.prod(outputs):
            raise ValueError(
                f"the shared projections A {a.shape} and B {b.shape} are smaller than the leaf, in {inputs} and out "
                f"{outputs}: they were made for other leaves, so split again for all of them together"
            )
        a = a[: math.prod(inputs)].reshape(*inputs, *a.shape[1:])
        b = b[:, : math.prod(outputs)].reshape(*b.shape[:1], *outputs)
        axes = (*inner, rank), (*batch, rank), (rank, *outer), batch + outer
        return Network((a, factors["d"], b, factors["b"]), axes, frozen=frozenset({0, 2}))

    def labels(self) -> dict[str, str]:
        """Two labels, "d" and "b"; the projections are frozen."""
        return {"d": "d", "b": "b", "A": FROZEN, "B": FROZEN}
