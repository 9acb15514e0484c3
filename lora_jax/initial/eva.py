"""EVA: A begins as the directions in which a layer's inputs vary most, and ranks go where they explain most."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.choice import Rules
from lora_jax.initial.capture import Moments, capture
from lora_jax.initial.chosen import as_rules, begun_from, chosen, only_linear, total_over
from lora_jax.initial.start import Initialization, Start
from lora_jax.sites import Site
from lora_jax.variants.lora import LoRA


def eva(
    fun: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Rules,
    *,
    sites: Mapping[str, Site] | None = None,
    rho: float = 2.0,
) -> Rules:
    """Rules by which LoRA's A begins as the principal components of each leaf's inputs, with the ranks redistributed.

    The budget is the sum of the ranks that the rules give, a stacked leaf's counted once for each layer. Components
    go one by one to the leaf where the next explains the largest share of the inputs' variance (on the average of a
    stack's layers, which have one rank), until the budget is spent; a leaf that gets none is not adapted. Alpha changes
    with the rank, so that the scale s of a leaf stays what the rules say. B is zero and the base stays as it is.

    Args:
      fun: The user's function of params and a batch: a loss, or a forward pass. It is run on each batch through
        `lora_jax.capture`, under `jax.jit`.
      params: Its first argument; arrays, and other leaves that are hashable.
      batches: Its second arguments, of a few batches of training data.
      rules: As for `split`. Leaves under `LoRA` begin this way; what is under other variants stays as ruled.
      sites: As for `split`.
      rho: No leaf gets more than `rho` times the rank that the rules give it; 1 keeps the ranks as they are.

    Returns:
      Rules for `split`, for this tree.

    Raises:
      ValueError: A leaf is an embedding or a convolution, has inputs that are not captured, or inputs that are not
        finite; there is no batch; rho is below 1; or as `split`.

    Source: Paischer et al. 2024, https://arxiv.org/abs/2410.07170; inputs are centered as in Hugging Face PEFT.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((3, 2)), "v": jnp.ones((2, 2))}
    >>> def model(params, x):
    ...     return x @ params["w"] @ params["v"]
    >>> x = jnp.array([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    >>> rules = lora.eva(model, params, [x], {"w|v": lora.LoRA(rank=1)})
    >>> _, lora_params = lora.split(jax.random.key(0), params, rules)
    >>> jnp.abs(lora_params["w"].factors["A"].T)
    Array([[0., 1., 0.]], dtype=float32)
    """
    if not rho >= 1:
        raise ValueError(f"eva(rho={rho}): rho is the largest factor that a rank may grow by, 1 or more")
    adapted = chosen(rules, params, sites)
    begun = begun_from("eva", adapted, params)
    only_linear("eva", begun)
    captured, _ = total_over(capture(fun, {path: site for path, (_, site) in begun.items()}), params, batches)
    parts = {path: _components(path, moments) for path, moments in captured.items()}
    limits = {path: min(round(variant.rank * rho), site.max_rank) for path, (variant, site) in begun.items()}
    ratios = {path: parts[path][1].reshape(-1, parts[path][1].shape[-1]).mean(0)[: limits[path]] for path in begun}
    layers = {path: math.prod(site.sizes()[0]) for path, (_, site) in begun.items()}
    ranks = redistributed(ratios, {path: (variant.rank, layers[path]) for path, (variant, _) in begun.items()})
    found = {
        path: (_with_rank(variant, ranks[path], EVA(parts[path][0][..., : ranks[path]])), site)
        for path, (variant, site) in begun.items()
    }
    return as_rules({**adapted, **found})


@dataclasses.dataclass(frozen=True, eq=False)
class EVA(Initialization):
    """A = the principal components of the inputs, (*batch, in, rank), orthonormal; B = 0."""

    components: jax.Array = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """The name that an adapter's variant keeps."""
        return "eva"

    def start(self, key: jax.Array, weight: jax.Array, site: Site, rank: int, scale: float) -> Start:
        """The components as they are."""
        return Start(self.components)


def redistributed(ratios: Mapping[str, np.ndarray], ranks: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """New ranks: components in the order of what they explain, as many as the budget has room for.

    Args:
      ratios: For each leaf, the share of variance that each component explains, in descending order.
      ranks: For each leaf, its rank so far and the number of its layers, each of which costs as much.

    >>> redistributed({"a": np.array([0.9, 0.05]), "b": np.array([0.5, 0.4])}, {"a": (1, 1), "b": (1, 1)})
    {'a': 1, 'b': 1}
    >>> redistributed({"a": np.array([0.3, 0.1]), "b": np.array([0.5, 0.4])}, {"a": (1, 1), "b": (1, 1)})
    {'a': 0, 'b': 2}
    """
    budget = sum(rank * layers for rank, layers in ranks.values())
    new = dict.fromkeys(ratios, 0)
    order = list(ratios)
    heap = [(-float(ratios[path][0]), i) for i, path in enumerate(order)]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        path = order[i]
        if (cost := ranks[path][1]) > budget:
            continue
        budget -= cost
        new[path] += 1
        if new[path] < len(ratios[path]):
            heapq.heappush(heap, (-float(ratios[path][new[path]]), i))
    return new


def _components(path: str, moments: Moments) -> tuple[jax.Array, np.ndarray]:
    """The principal components of the inputs, (*batch, in, in), and the share of variance that each explains."""
    known_inputs(path, moments)
    vectors, ratios = _principal(moments)
    return vectors, np.asarray(ratios)


@jax.jit
def _principal(moments: Moments) -> tuple[jax.Array, jax.Array]:
    count = moments.tokens[..., None, None]
    mean = moments.first[..., None] / count
    values, vectors = jnp.linalg.eigh(moments.second / count - mean * jnp.swapaxes(mean, -1, -2))
    values = jnp.maximum(values[..., ::-1], 0)
    total = jnp.maximum(jnp.sum(values, -1, keepdims=True), jnp.finfo(values.dtype).tiny)
    return vectors[..., ::-1], values / total


def known_inputs(path: str, moments: Moments) -> None:
    """Refuses moments of no inputs, or of inputs that are not finite.

    Raises:
      ValueError: So it is.
    """
    if not bool((moments.tokens > 0).all()):
        raise ValueError(
            f"{path!r} has no input that could be captured: it is used behind `stop_gradient`, or in a branch that no "
            "batch takes. Leave it out of these rules"
        )
    if not bool(jnp.isfinite(moments.second).all()):
        raise ValueError(f"{path!r} has inputs that are not finite: look for NaN in params and batches")


def _with_rank(variant: LoRA, rank: int, init: Initialization) -> LoRA | None:
    """The variant at another rank and the same scale; None for rank 0."""
    if not rank:
        return None
    if rank == variant.rank:
        return dataclasses.replace(variant, init=init)
    alpha = variant.scale * (math.sqrt(rank) if variant.scaling == "rank_stabilized" else rank)
    return dataclasses.replace(variant, rank=rank, alpha=alpha, init=init)
