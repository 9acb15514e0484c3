"""LoKr: ΔW is a Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from lora_jax.axes import Axes, Axis, size_of, weight_axes
from lora_jax.factored import Factored
from lora_jax.network import Network
from lora_jax.sites import Site
from lora_jax.variants.base import Factors, Variant, rank_axis
from lora_jax.variants.hyperparameters import check, check_number
from lora_jax.variants.initializers import drawn


@dataclasses.dataclass(frozen=True)
class LoKr(Variant):
    """Low-rank Kronecker product: y = x·W + s·x·(C ⊗ (A·B)), s = alpha / rank; C begins as zero.

    The inputs are split in two, d = d1·d2, and the outputs, k = k1·k2, both near their square roots: C is (d1, k1), A
    is (d2, rank) and B (rank, k2). Where the rank is half of the larger of d2 and k2 or more, A·B is one factor, `AB`,
    (d2, k2); with `decompose_both`, C is C1·C2, (d1, rank) and (rank, k1), where the rank is less than half of the
    larger of d1 and k1. All of them have the weight's batch axes too. A side of several axes, such as heads and their
    size, is split between two of them or inside one, so not always as near to the square root as its product could be.
    Of a convolution the channels are split, and A (or AB) has the window's axes before its inputs.

    A training step of n inputs costs 4ndk + 6nr(d + k + d1·k1) FLOPs at a kernel (d, k), of which 4ndk are the base's,
    and with `AB` the smaller of 4ndk + 6n·d1·k2·(d2 + k1) and 4ndk + 6n·d2·k1·(d1 + k2).

    Args:
      rank: The number of columns of A.
      alpha: The scale's numerator; None for `rank`, that is a scale of 1.
      factor: What d1 and k1 are, where it divides d and k, or else near; -1 for near the square roots.
      decompose_both: Whether C is a product too.
      init: How A (or AB, C1) begins, as LoRA's A; B begins likewise, with `rank` inputs.
      dtype: The dtype of the factors.
      dropout: As in `LoRA`.

    Raises:
      ValueError: For a rank below 1, a factor that is neither -1 nor 1 or more, an alpha that is 0 or not finite, an
        unknown dtype, a dropout that is no probability below 1.

    Source: Yeh et al. 2023, LyCORIS, https://arxiv.org/abs/2309.14859.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((768, 3072))}, {"w": lora.LoKr(rank=4)})
    >>> {name: a.shape for name, a in lora_params["w"].factors.items()}
    {'C': (24, 48), 'A': (32, 4), 'B': (4, 64)}
    """

    rank: int
    alpha: float | None = None
    factor: int = -1
    decompose_both: bool = False
    init: str | Callable[..., jax.Array] = dataclasses.field(default="normal", compare=False)
    dtype: str = "float32"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check(self)
        means = "the factor is a whole number, 1 or more, or -1"
        check_number(self, "factor", lambda x: x == -1 or x >= 1, means, whole=True)
        object.__setattr__(self, "decompose_both", bool(self.decompose_both))

    @property
    def scale(self) -> float:
        """The number s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def kinds(self) -> tuple[str, ...]:
        """Matrices and convolutions."""
        return ("linear", "conv")

    def initial(self, key: jax.Array, weight: Any, site: Site) -> tuple[Any, Factors]:
        """C zero, and the others random; the weight stays as it is."""
        axes, (inner, _), factors = self._axes(site), self._parts(site), Factors()
        for name, own in zip(axes, jax.random.split(key, len(axes)), strict=True):
            shape = tuple(axis.size for axis in axes[name])
            inputs = [axis for axis in axes[name] if axis in (*inner.major, *inner.minor, *_window(site))]
            init = jax.nn.initializers.zeros if name in ("C", "C2") else self.init
            factors[name] = drawn(init, own, shape, self.dtype, size_of(inputs) if inputs else self.rank)
        return weight, factors

    def delta(self, factors: Factors, site: Site) -> Network:
        """`ij,kr,rl->ikjl`, times the scale, over the axes that `apply` splits the weight's into."""
        axes = self._axes(site)
        return Network(tuple(factors[name] for name in axes), tuple(axes.values()), self.scale)

    def apply(self, base: Factored, factors: Factors, site: Site) -> Factored:
        """The base with its in and out axes split in two, and ΔW."""
        for part in self._parts(site):
            base = base.split(*part.cut) if part.cut else base
        return base.add(self.delta(factors, site))

    def names(self, site: Site) -> tuple[str, ...]:
        """C or C1 and C2, with A and B or AB."""
        return tuple(self._axes(site))

    def labels(self) -> dict[str, str]:
        """Three labels: "C" for the small matrix, "A" and "B" as LoRA's."""
        return {"C": "C", "C1": "C", "C2": "C", "A": "A", "B": "B", "AB": "B"}

    def _parts(self, site: Site) -> tuple[_Halves, _Halves]:
        _, inner, outer = site.axes()
        channels = tuple(axis for axis in inner if axis not in _window(site))
        return _halves(channels, self.factor), _halves(outer, self.factor)

    def _axes(self, site: Site) -> dict[str, Axes]:
        """The axes of each factor that a leaf has."""
        batch, rank, other = site.axes()[0], (rank_axis(self.rank),), (Axis("other rank", self.rank),)
        inner, outer = self._parts(site)
        c, inputs = batch + inner.major + outer.major, batch + _window(site) + inner.minor
        small, large = (max(size_of(getattr(p, half)) for p in (inner, outer)) for half in ("major", "minor"))
        first = {"C": c}
        if self.decompose_both and self.rank < small / 2:
            first = {"C1": batch + inner.major + other, "C2": batch + other + outer.major}
        if self.rank >= large / 2:
            return {**first, "AB": inputs + outer.minor}
        return {**first, "A": inputs + rank, "B": batch + rank + outer.minor}


def _window(site: Site) -> Axes:
    return tuple(weight_axes(site.shape)[d] for d in site.window_axes)


class _Halves(NamedTuple):
    """A side split in two: the axes of each half, and which axis is split at what size, if one is."""

    major: Axes
    minor: Axes
    cut: tuple[Axis, int] | None


def _halves(axes: Axes, factor: int) -> _Halves:
    """A side split as `factorization` says, between two of its axes or inside one."""
    places, before = {1: _Halves((), (), None)}, 1
    for i, axis in enumerate(axes):
        for size in _divisors(axis.size):
            major, minor = axis.split(size)
            inside = _Halves((*axes[:i], major), (minor, *axes[i + 1 :]), (axis, size))
            ends = {1: _Halves(axes[:i], axes[i:], None), axis.size: _Halves(axes[: i + 1], axes[i + 1 :], None)}
            places[before * size] = ends.get(size, inside)
        before *= axis.size
    return places[factorization(before, factor, places)]


def factorization(size: int, factor: int = -1, divisors: Iterable[int] | None = None) -> int:
    """The first of two whole numbers whose product is `size`: `factor` if that divides it, or else below.

    It is the largest divisor up to the square root, and up to `factor` if that is not -1; of some `divisors` or of all.

    >>> factorization(768), factorization(768, 4), factorization(127), factorization(24, divisors=[1, 3, 6, 12, 24])
    (24, 4, 1, 3)
    """
    divisors = [n for n in divisors or _divisors(size) if size % n == 0]
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    return factor if factor in divisors else max(n for n in divisors if n <= limit)


def _divisors(size: int) -> list[int]:
    """In time that grows with the square root of the size."""
    small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
    return sorted({*small, *(size // n for n in small)})
