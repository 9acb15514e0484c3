"""`sites`: trace a function once, abstractly, to see how it uses each leaf of its parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.axes import Axes, Axis, weight_axes
from lora_jax.factored import Factored
from lora_jax.interpreter import Interpreter
from lora_jax.lift import probe
from lora_jax.network import Network
from lora_jax.table import dimensions, table
from lora_jax.uses import Use


@dataclasses.dataclass(frozen=True)
class Site:
    """How a function uses a leaf: which of its dimensions are stacked, summed over, and in the result.

    Attributes:
      shape: The leaf's shape.
      kind: "linear", "conv", "embedding", "other" (the whole array is needed, if only once), or "unused".
      batch_axes: Dimensions of stacked layers or experts: each has a low-rank ΔW of its own.
      in_axes: Dimensions that are summed over (or, of an embedding, looked up).
      out_axes: Dimensions that the result has.
      uses: Every use, in program order; a tied embedding has two. The first gives kind and axes, if none is "other".
      window_axes: Of a convolution, those of the `in_axes` that are its window's, and no channels.
    """

    shape: tuple[int, ...]
    kind: str
    batch_axes: tuple[int, ...] = ()
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    uses: tuple[Use, ...] = ()
    window_axes: tuple[int, ...] = ()

    @property
    def adaptable(self) -> bool:
        """Whether the leaf has an in and an out side for a low-rank ΔW to connect."""
        return bool(self.in_axes and self.out_axes)

    @property
    def max_rank(self) -> int:
        """The smaller of the in and out sizes, which no low-rank update can exceed; 0 where there are none.

        >>> Site((2, 512), "embedding", (), (0,), (1,)).max_rank
        2
        """
        _, inner, outer = self.sizes()
        return min(math.prod(inner), math.prod(outer)) if self.adaptable else 0

    def axes(self) -> tuple[Axes, Axes, Axes]:
        """The named axes of the batch, in and out dimensions, for a variant's network."""
        named = weight_axes(self.shape)
        groups = (self.batch_axes, self.in_axes, self.out_axes)
        batch, inner, outer = (tuple(named[d] for d in group) for group in groups)
        return batch, inner, outer

    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The sizes of the batch, in and out dimensions.

        >>> Site((12, 512, 8, 64), "linear", (0,), (1,), (2, 3)).sizes()
        ((12,), (512,), (8, 64))
        """
        batch, inner, outer = (tuple(axis.size for axis in group) for group in self.axes())
        return batch, inner, outer


class Sites(dict[str, Site]):
    """A dict from path to `Site`; `str` draws it as a table."""

    def __str__(self) -> str:
        """One line for each leaf, with the place of its first use."""
        head = ("path", "shape", "kind", "batch", "in", "out", "uses", "first at")
        return table(head, [_line(path, site) for path, site in self.items()], numbers=(6,))

    __repr__ = __str__


def _line(path: str, site: Site) -> tuple[str, ...]:
    sides = (",".join(map(str, axes)) for axes in (site.batch_axes, site.in_axes, site.out_axes))
    times = sum(use.times for use in site.uses)
    where = next((use.where for use in (*(u for u in site.uses if u.kind == site.kind), *site.uses)), "")
    return (path, dimensions(site.shape), site.kind, *sides, str(times), where)


def sites(fun: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
    """What each leaf of `params` is to `fun(params, *args, **kwargs)`, by path.

    Found by tracing, not by names: nothing is computed, and `jax.ShapeDtypeStruct` may stand for any array, so a model
    of any size can be looked at without its weights. Each leaf that is adaptable can be adapted together with all
    others that are, and none of them is formed.

    Args:
      fun: The function that will be lifted: a model's forward pass, or a loss.
      params: Its first argument, a pytree.
      *args: Its other arguments, as it takes them.
      **kwargs: Likewise.

    Returns:
      `Sites`, a dict from path to `Site`, for each leaf that is an array, in the order of the tree.

    >>> import jax.numpy as jnp
    >>> params = {"table": jnp.ones((10, 4)), "w": jnp.ones((2, 4, 3)), "b": jnp.ones(3)}
    >>> def model(params, tokens):
    ...     return params["table"][tokens] @ params["w"][0] + params["b"]
    >>> for path, site in sites(model, params, jnp.arange(5)).items():
    ...     print(path, site.kind, site.batch_axes, site.in_axes, site.out_axes)
    b other () () ()
    table embedding () (0,) (1,)
    w linear (0,) (1,) (2,)

    Printed, it is a table: `print(sites(...))`.
    """
    leaves, treedef = tree.flatten(params)
    arrays = {path: leaf for path, leaf in leaves.items() if tree.is_array(leaf)}
    traced = fun, leaves, treedef, args, kwargs
    weights = {path: leaf for path, leaf in arrays.items() if not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)}
    uses, handed_on = _uses({path: Factored.of(array, path) for path, array in weights.items()}, *traced)
    handed_on |= arrays.keys() - weights.keys()
    found = Sites({path: _site(tuple(leaf.shape), uses[path], path in handed_on) for path, leaf in arrays.items()})
    # Once more with factors: where some of the adapted leaves meet, they may have to be formed after all.
    while adapted := {path: _adapted(weights[path], path, site) for path, site in found.items() if site.adaptable}:
        uses, _ = _uses(adapted, *traced)
        formed = {path: tuple(own) for path, own in uses.items() if any(use.kind == "other" for use in own)}
        if not formed:
            break
        found.update({path: Site(found[path].shape, "other", uses=own) for path, own in formed.items()})
    return found


def _uses(
    values: dict[str, Factored], fun: Callable[..., Any], leaves: Any, treedef: Any, args: Any, kwargs: Any
) -> tuple[dict[str, list[Use]], set[str]]:
    """How each of these leaves is used, and which are handed on."""
    interpreter = Interpreter(allow=True)
    handed_on = probe(interpreter, fun, (tree.unflatten(treedef, {**leaves, **values}), *args), kwargs)
    uses: dict[str, list[Use]] = {path: [] for path in leaves}
    for path, use in interpreter.uses:
        uses[path].append(use)
    return uses, handed_on


def _adapted(weight: Any, path: str, site: Site) -> Factored:
    """The leaf with factors of shape alone."""
    batch, inner, outer = site.axes()
    rank = Axis("rank", 2)
    axes = (*batch, *inner, rank), (*batch, rank, *outer)
    factors: Any = (jax.ShapeDtypeStruct(tuple(axis.size for axis in own), weight.dtype) for own in axes)
    return Factored.of(weight, path).add(Network(tuple(factors), axes))


def _site(shape: tuple[int, ...], uses: Sequence[Use], handed_on: bool) -> Site:
    adaptable = [use for use in uses if use.in_axes and set(use.out_axes) - set(use.in_axes)]
    if not adaptable:
        return Site(shape, "other" if uses or handed_on else "unused", uses=tuple(uses))
    use = adaptable[0]
    outer = tuple(d for d in use.out_axes if d not in use.in_axes)
    batch = tuple(d for d in range(len(shape)) if d not in (*use.in_axes, *outer))
    return Site(shape, use.kind, batch, use.in_axes, outer, tuple(uses), use.window_axes)
