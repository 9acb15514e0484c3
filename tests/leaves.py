"""Leaves of every shape with random adapters of several variants, and their ΔW by NumPy in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from checks import normal, randomized

import lora_jax as lora
from lora_jax.variants.base import rank_axis

# name: shape, batch axes, in axes, out axes. The last is smaller than some ranks are together.
LEAVES = {
    "dense": ((11, 7), (), (0,), (1,)),
    "out_in": ((7, 12), (), (1,), (0,)),
    "heads": ((4, 9, 2, 5), (0,), (1,), (2, 3)),
    "conv": ((8, 4, 3, 3), (), (1, 2, 3), (0,)),
    "experts": ((2, 8, 3, 7), (0, 2), (1,), (3,)),
    "narrow": ((3, 13), (), (0,), (1,)),
}


@dataclasses.dataclass(frozen=True)
class Diagonal(lora.LoRA):
    """Another variant: A·diag(d)·B, with one A for all stacked layers, and A frozen."""

    def initial(self, key, weight, site):
        weight, factors = super().initial(key, weight, site)
        first = factors["A"][(0,) * len(site.batch_axes)]
        return weight, {"A": first, "B": factors["B"], "d": jnp.ones((*site.sizes()[0], self.rank))}

    def delta(self, factors, site):
        batch, inner, outer = site.axes()
        rank = (rank_axis(self.rank),)
        axes = (inner + rank, batch + rank, batch + rank + outer)
        return lora.Network((factors["A"], factors["d"], factors["B"]), axes, self.scale)

    def labels(self):
        return {"A": "frozen", "B": "B", "d": "d"}


@dataclasses.dataclass(frozen=True)
class Elementwise(lora.Variant):
    """Another: (A·B) times (C·D), entry by entry, of rank 4."""

    def initial(self, key, weight, site):
        batch, inner, outer = site.sizes()
        a, b = jnp.ones((*batch, *inner, 2)), jnp.ones((*batch, 2, *outer))
        return weight, {"A": a, "B": b, "C": a, "D": b}

    def delta(self, factors, site):
        batch, inner, outer = site.axes()
        r, s = (dataclasses.replace(rank_axis(2), name=name) for name in "rs")
        axes = tuple(batch + rest for rest in (inner + (r,), (r,) + outer, inner + (s,), (s,) + outer))
        return lora.Network(tuple(factors[name] for name in "ABCD"), axes, 0.5)

    def labels(self):
        return dict.fromkeys("ABCD", "factor")


@dataclasses.dataclass(frozen=True)
class Rescaled(lora.LoRA):
    """A variant that changes the base, as DoRA does."""

    def apply(self, base, factors, site):
        return super().apply(base, factors, site).times(factors["B"].sum(), ())


VARIANTS = {
    "standard": lora.LoRA(2, alpha=6),
    "rank_stabilized": lora.LoRA(3, alpha=2, scaling="rank_stabilized"),
    "opposite": lora.LoRA(3, alpha=-1.5),
    "diagonal": Diagonal(2, alpha=1),
    "elementwise": Elementwise(),
}


def placed(name, variant):
    _, batch, inner, outer = LEAVES[name]
    return variant.at(batch_axes=batch, in_axes=inner, out_axes=outer)


@functools.cache
def base():
    return {name: normal(*shape, seed=i) for i, (name, (shape, *_)) in enumerate(LEAVES.items())}


@functools.cache
def made(variant, seed=0, leaves=tuple(LEAVES)):
    """Random adapters of one variant."""
    chosen = VARIANTS[variant] if isinstance(variant, str) else variant
    rules = {name: placed(name, chosen) for name in leaves}
    params = base()
    shapes = jax.eval_shape(functools.partial(lora.split, rules=rules), jax.random.key(0), params)[1]
    return randomized(shapes, scale=0.5, seed=seed + 100 * len(leaves))


def delta(adapter):
    """ΔW by NumPy's einsum, in float64."""
    network = adapter.variant.delta(adapter.factors, adapter.site)
    axes = {axis for axes in network.axes for axis in axes}
    letter = dict(zip(sorted(axis.name for axis in axes), "abcdefghijkl", strict=False))
    spec = ",".join("".join(letter[axis.name] for axis in own) for own in network.axes)
    out = "".join(letter[str(d)] for d in range(len(adapter.site.shape)))
    return network.scale * np.einsum(f"{spec}->{out}", *(np.asarray(x, np.float64) for x in network.operands))


def as_matrices(array, path):
    shape, batch, inner, outer = LEAVES[path]
    sizes = [shape[d] for d in batch]
    return np.transpose(array, (*batch, *inner, *outer)).reshape(*sizes, np.prod([shape[d] for d in inner]), -1)


def best(array, path, rank):
    """The best approximation of that rank of each matrix, as matrices."""
    u, s, vt = np.linalg.svd(as_matrices(array, path), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def full():
    """One leaf that trains itself."""
    site = lora.Site((11, 7), "linear", (), (0,), (1,))
    return {"dense": lora.Adapter({"weight": jnp.zeros((11, 7))}, lora.Full(), site)}
