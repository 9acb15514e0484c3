"""What a variant is: a frozen dataclass that says how ΔW is made and which of its factors train."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.axes import Axes, Axis
from lora_jax.factored import Factored
from lora_jax.network import Network
from lora_jax.sites import Site

Factors = dict[str, jax.Array]

FROZEN = "frozen"
RANK = "rank"
SHARED = "shared"


@dataclasses.dataclass(frozen=True)
class Variant(abc.ABC):
    """The base class of variants. A new one is a frozen dataclass in a file of its own, with
    `initial`, `delta` and `labels`.

    Its fields are the variant's hyperparameters: numbers and strings, so that a file can hold them; those that only
    say how factors begin are declared with `dataclasses.field(compare=False)`, and may be functions or objects, of
    which `split` keeps the names.

    Attributes:
      invertible: Whether `unmerge` can take ΔW out of merged weights again.
      needs_axes: Whether the variant needs to know a leaf's in and out axes.
      shared: The names of factors that all its leaves have in common; `pool` makes them.
      dropout: The probability that `dropout` drops an input of ΔW; a field of those variants that have it.
      registry: All variants by name, which is what a saved file knows them by.
    """

    registry: ClassVar[dict[str, type[Variant]]] = {}
    invertible: ClassVar[bool] = True
    needs_axes: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ()
    dropout = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = cls.registry.get(cls.__name__, cls)
        # In the same module, or on its way from a notebook or script into one, a class may be defined anew.
        anew = known.__module__ in (cls.__module__, "__main__") or cls.__module__ == "__main__"
        if not anew or (known.__module__ != cls.__module__ and known.__module__.startswith("lora_jax.")):
            raise TypeError(
                f"{cls.__module__}.{cls.__name__}: files know variants by their names, and {known.__module__} has one "
                "of this name already: take another"
            )
        cls.registry[cls.__name__] = cls

    def at(
        self,
        *,
        in_axes: int | Sequence[int],
        out_axes: int | Sequence[int],
        batch_axes: int | Sequence[int] = (),
    ) -> Placed:
        """The variant with the axes of the leaf it is for: which dimensions are in, out and stacked.

        Args:
          in_axes: Dimensions of the leaf that the function sums over (or, of an embedding, looks up).
          out_axes: Dimensions of the leaf that its result has.
          batch_axes: Dimensions that are stacked: layers, experts.

        >>> import lora_jax as lora
        >>> lora.LoRA(rank=8).at(in_axes=0, out_axes=(1, 2)).out_axes
        (1, 2)
        """
        groups = [tuple(np.atleast_1d(np.asarray(group, int)).tolist()) for group in (batch_axes, in_axes, out_axes)]
        return Placed(self, *groups)

    def begun(self) -> Variant:
        """The variant once its factors have begun: a function or an object that says how is replaced by its name.

        The variant is static in an adapter, and so in what `jax.jit` remembers: it must keep no array alive.
        """
        own = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if not f.compare)
        names = {name: _name(value) for name, value in own if callable(value) or hasattr(value, "name")}
        return dataclasses.replace(self, **names) if names else self

    @abc.abstractmethod
    def initial(self, key: jax.Array, weight: Any, site: Site) -> tuple[Any, Factors]:
        """What stays frozen at the leaf (the weight itself, for most), and the factors to start from.

        Args:
          key: A key of this leaf's own.
          weight: The leaf, an array of `site.shape`.
          site: Which of its dimensions are batch, in and out.

        Raises:
          ValueError: The variant does not suit the site. `split` puts the path in front of the message.
        """

    @abc.abstractmethod
    def delta(self, factors: Factors, site: Site) -> Network:
        """ΔW as an unevaluated network over `site.axes()` and axes of its own."""

    def apply(self, base: Factored, factors: Factors, site: Site) -> Factored | jax.Array:
        """What `attach` puts at the leaf: base + ΔW."""
        return base.add(self.delta(factors, site))

    def undo(self, merged: Factored, factors: Factors, site: Site) -> Factored:
        """What `unmerge` puts at the leaf, from what `merge` made of it: merged - ΔW."""
        value: Any = self.apply(merged, factors, site)
        deltas = tuple(dataclasses.replace(delta, scale=-delta.scale) for delta in value.deltas)
        return dataclasses.replace(value, deltas=deltas)

    @abc.abstractmethod
    def labels(self) -> dict[str, str]:
        """For each factor, the label that `optimizer` knows it by; "frozen" for one that does not train.

        A frozen factor gets no gradient at all. Factors that not every leaf has are named too.
        """

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of leaves that it adapts, of those that have in and out axes."""
        return ("linear", "conv", "embedding")

    def names(self, site: Site) -> tuple[str, ...]:
        """The factors that a leaf at this site has of its own."""
        return tuple(name for name in self.labels() if name not in self.shared)

    def axes(self, site: Site) -> dict[str, Axes]:
        """The axes of each factor's dimensions, for those that are operands of `delta` as they are."""
        # How the factors begin makes no difference, and the default way always can.
        own = (f for f in dataclasses.fields(self) if not f.compare and f.default is not dataclasses.MISSING)
        plain = dataclasses.replace(self, **{field.name: field.default for field in own})

        def begun() -> Factors:
            key = jax.random.key(0)
            return {**plain.pool(key, [site]), **plain.initial(key, jnp.zeros(site.shape), site)[1]}

        found: dict[str, Axes] = {}

        def look(factors: Factors) -> None:
            network = self.delta(factors, site)
            for operand, axes in zip(network.operands, network.axes, strict=True):
                found.update({name: axes for name, factor in factors.items() if factor is operand})

        jax.eval_shape(lambda: look(begun()))
        return found

    @property
    def shared_path(self) -> str:
        """Where `lora_params` holds the `shared` factors, once for all variants of the same path."""
        return f"shared/{type(self).__name__}"

    def pool(self, key: jax.Array, sites: Sequence[Site]) -> Factors:
        """The `shared` factors, for leaves at these sites; most variants have none.

        Args:
          key: A key of their own.
          sites: Those of all leaves whose variants have this `shared_path`.
        """
        return {}


@dataclasses.dataclass(frozen=True)
class Placed:
    """A variant with explicit axes, as `Variant.at` makes it."""

    variant: Variant
    batch_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    def site(self, path: str, shape: tuple[int, ...], kind: str) -> Site:
        """The site of a leaf of this shape.

        Raises:
          ValueError: The axes do not name each dimension once, or one side has none.
        """
        groups = (self.batch_axes, self.in_axes, self.out_axes)
        batch, inner, outer = (tuple(d + len(shape) if d < 0 else d for d in group) for group in groups)
        if sorted((*batch, *inner, *outer)) != list(range(len(shape))) or not (inner and outer):
            raise ValueError(
                f"{path!r} has shape {shape}, but the rule's axes are batch {batch}, in {inner}, out {outer}: each "
                "dimension belongs to one of them, and neither in nor out is empty"
            )
        return Site(shape, "linear" if kind == "other" else kind, batch, inner, outer)


def _name(value: Any) -> str:
    return getattr(value, "name", None) or getattr(value, "__name__", type(value).__name__)


def rank_axis(rank: int) -> Axis:
    """The axis that a network's factors share, and the weight does not have."""
    return Axis(RANK, rank)
