"""`capture`: the moments of what each weight is multiplied by, from the user's own function.

A weight gets factors of zeros, and a tap where dropout would be: it hands the activation on as it is, and is
differentiable by a ledger of zeros, its gradient by which is xᵀx by decree. So the moments of a call are its gradient
by the ledgers, and JAX itself adds them up over uses, loops, branches and checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax

from lora_jax import compat, tree
from lora_jax.axes import Axes, Axis, size_of
from lora_jax.contract import contract
from lora_jax.factored import Factored
from lora_jax.lift import lift
from lora_jax.network import Dropout, Network
from lora_jax.sites import Site

MOMENT = "moment"


class Moments(NamedTuple):
    """Sums over all tokens that a weight was multiplied by, in float32; those of several batches can be added.

    Attributes:
      second: Σ xᵀx, (*batch, in, in): one for each layer or expert of a stacked leaf.
      first: Σ x, (*batch, in).
      tokens: How many, (*batch,).
    """

    second: jax.Array
    first: jax.Array
    tokens: jax.Array


def capture(fun: Callable[..., Any], sites: Mapping[str, Site]) -> Callable[..., dict[str, Moments]]:
    """A function of the same arguments that returns the moments of each leaf's inputs instead.

    The model has no hooks: `fun` is interpreted, as by `lift`. Works under `jax.jit`, which leaves little more than the
    forward pass and the products xᵀx; and with leaves that are scanned over, stacked, shared or rematerialized.

    Only what a loss can train through counts: not what lies behind `jax.lax.stop_gradient`, nor uses of a leaf along
    other axes than its site's in axes, such as the second one of a weight that is also used transposed.

    Args:
      fun: A function of `params` and any other arguments; it returns any pytree, such as a loss or logits, and is
        differentiable in reverse (so that it has no `while_loop` of unknown length).
      sites: The linear leaves to look at, by path: what `lora_jax.sites` found, or a part of it. The moments of a leaf
        take in² numbers for each entry of its batch axes.

    Returns:
      A function `(params, *args, **kwargs) -> dict` from path to `Moments`.

    Raises:
      ValueError: At once, for a leaf that is not linear; on a call, where a leaf is not in the tree, or meets its input
        in parts, after another weight, as one of several to choose from, in a way of which none can be taken
        (`ragged_dot`), or not at all.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params, x = {"w": jnp.ones((3, 2))}, jnp.arange(12.0).reshape(4, 3)
    >>> def model(params, x):
    ...     return jnp.tanh(x @ params["w"])
    >>> moments = jax.jit(lora.capture(model, lora.sites(model, params, x)))(params, x)["w"]
    >>> bool((moments.second == x.T @ x).all()), moments.first, moments.tokens
    (True, Array([18., 22., 26.], dtype=float32), Array(4., dtype=float32))
    """
    for path, site in sites.items():
        if site.kind != "linear":
            raise ValueError(
                f"{path!r} {site.shape} is {site.kind}, and only a linear leaf has inputs to capture: leave it out"
            )

    def captured(params: Any, *args: Any, **kwargs: Any) -> dict[str, Moments]:
        leaves, treedef = tree.flatten(params)
        if missing := [path for path in sites if path not in leaves]:
            raise ValueError(f"the tree has no leaf at {missing[0]!r}{tree.close_to(missing[0], leaves)}")

        def arrays(*ledgers: jax.Array) -> list[jax.Array]:
            tapped = {path: _tapped(leaves[path], path, sites[path], x) for path, x in zip(sites, ledgers, strict=True)}
            result = lift(fun)(tree.unflatten(treedef, {**leaves, **tapped}), *args, **kwargs)
            return [x for x in jax.tree.leaves(result) if tree.is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)]

        ledgers = [jnp.zeros(tuple(axis.size for axis in _axes(site)), jnp.float32) for site in sites.values()]
        traced = compat.trace(arrays, *ledgers)
        for path, unread in zip(sites, compat.unread(traced), strict=True):
            if unread:
                raise ValueError(
                    f"{path!r} meets no input along its in axes {sites[path].in_axes} that a result depends on, so "
                    "there are no moments of any: leave it out of the sites"
                )
        results, pull = jax.vjp(jax.extend.core.jaxpr_as_fun(traced), *ledgers)
        sums = pull([jnp.zeros_like(x) for x in results])
        return {path: _moments(x, site) for (path, site), x in zip(sites.items(), sums, strict=True)}

    return captured


def _axes(site: Site) -> Axes:
    """A ledger's axes: those of the leaf's batch and in dimensions, and one for Σ x·xⱼ of each j, Σ x and the count."""
    batch, inner, _ = site.axes()
    return *batch, *inner, Axis(MOMENT, size_of(inner) + 2)


def _moments(ledger: jax.Array, site: Site) -> Moments:
    batch, inner, _ = site.sizes()
    rows = ledger.reshape(*batch, -1, ledger.shape[-1])
    return Moments(rows[..., :-2], rows[..., -2], rows[..., 0, -1])


def _tapped(leaf: Any, path: str, site: Site, ledger: jax.Array) -> Factored:
    """The leaf as `attach` would have it, with factors of zeros, and a tap on what meets them."""
    batch, inner, outer = site.axes()
    rank = Axis("rank", 1)
    axes = (*batch, *inner, rank), (*batch, rank, *outer)
    zeros = tuple(jnp.zeros(tuple(axis.size for axis in own), leaf.dtype) for own in axes)
    tap = Tap(ledger, _axes(site), 0.0, path, site.in_axes)
    return Factored.of(leaf, path).add(Network(zeros, axes, dropout=tap))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["axes", "rate", "path", "in_axes"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Tap(Dropout):
    """What stands in dropout's place: it drops nothing, and writes the moments of what passes into its ledger, `keys`.

    Attributes:
      path: The leaf's.
      in_axes: The leaf's dimensions that meet the input.
    """

    path: str = ""
    in_axes: tuple[int, ...] = ()

    def on(self, x: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        """The activation as it is, which the ledger has a gradient by."""
        *others, moment = self.axes
        inner = tuple(axis for axis in axes if {d for _, d in axis.roots} & {*self.in_axes})
        if not inner:  # a use along the leaf's other side
            return x, axes
        if size_of(inner) + 2 != moment.size or not {*inner} <= {*others}:
            raise ValueError(
                f"{self.path!r} meets its input in parts, {size_of(inner)} of {moment.size - 2} at a time, so that the "
                "moments of the whole input are not to be had: leave it out"
            )
        inner = tuple(axis for axis in others if axis in inner)
        return _written(x, self.keys, (axes, self.axes, inner)), axes

    def among_others(self) -> Dropout:
        """Refuses: which of the inputs are this leaf's is not known."""
        raise ValueError(
            f"{self.path!r} is multiplied by another weight, or one of several to choose from, before it meets an "
            "input, so that the moments of its own are not to be had: leave it out of the sites"
        )

    def __call__(self, x: jax.Array, apart: Axes = ()) -> jax.Array:
        """Refuses: here the axes of the activation are not those of the leaf."""
        raise ValueError(
            f"{self.path!r} is used in a way whose inputs cannot be captured (a convolution or `ragged_dot`): leave it "
            "out of the sites"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _written(x: jax.Array, ledger: jax.Array, where: tuple[Axes, Axes, Axes]) -> jax.Array:
    return x


def _written_forward(x: jax.Array, ledger: jax.Array, where: Any) -> tuple[jax.Array, jax.Array]:
    return x, x


def _written_backward(where: tuple[Axes, Axes, Axes], x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes, ledger, inner = where
    shared = tuple(axis for axis in axes if axis in ledger and axis not in inner)
    rows = tuple(axis for axis in axes if axis not in ledger)
    order = [axes.index(axis) for axis in (*shared, *rows, *inner)]
    named_x = x.reshape([axis.size for axis in axes]).astype(jnp.float32)
    flat = jnp.transpose(named_x, order).reshape(*(axis.size for axis in shared), -1, size_of(inner))
    second = jnp.einsum("...ni,...nj->...ij", flat, flat, precision=lax.Precision.HIGHEST)
    count = jnp.full((*second.shape[:-1], 1), flat.shape[-2], jnp.float32)
    sums = jnp.concatenate([second, jnp.sum(flat, -2)[..., None], count], -1)
    named = (*shared, *inner, ledger[-1])
    return dy, contract([(sums.reshape([axis.size for axis in named]), named)], ledger)


_written.defvjp(_written_forward, _written_backward)
