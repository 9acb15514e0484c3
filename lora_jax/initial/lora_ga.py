"""LoRA-GA: the factors begin so that their first step is that of full fine-tuning, as nearly as their rank permits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.choice import Rules
from lora_jax.contract import wider
from lora_jax.initial.chosen import as_rules, begun_from, chosen, total_over
from lora_jax.initial.start import Initialization, Start
from lora_jax.matrices import to_matrices
from lora_jax.sites import Site


def lora_ga(
    fun: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    rules: Rules,
    *,
    sites: Mapping[str, Site] | None = None,
    gamma: float = 16.0,
) -> Rules:
    """Rules by which LoRA begins along the gradient G = U·S·Vᵀ of the loss by each leaf.

    A = c·U[:, :r] and B = c·V[:, r:2r]ᵀ with c = out^(1/4) / √gamma, and W - s·A·B stays frozen. The first step of
    gradient descent on A and B then moves W by -lr·s²c² times the best approximation of G of rank 2r.

    Args:
      fun: The user's loss, of params and a batch; it returns a scalar.
      params: Its first argument; arrays, and other leaves that are hashable.
      batches: Its second arguments; gradients are averaged over them. One is enough if it is large.
      rules: As for `split`. Leaves under `LoRA`, of any kind, begin this way; others stay as ruled.
      sites: As for `split`.
      gamma: The larger, the smaller the factors begin.

    Returns:
      Rules for `split`, for this tree.

    Raises:
      ValueError: A rank is above half of a leaf's smaller side; a gradient is zero or not finite; there is no batch;
        gamma is not above 0; or as `split`.

    Source: Wang et al. 2024, https://arxiv.org/abs/2407.05000, its stable scale; Hugging Face PEFT 0.21 leaves A
    without the factor c and multiplies B by singular values of G besides.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> def loss(params, x):
    ...     return jnp.sum((x @ params["w"]) ** 2)
    >>> params, x = {"w": jnp.ones((4, 16))}, jax.random.normal(jax.random.key(1), (8, 4))
    >>> rules = lora.lora_ga(loss, params, [x], {"w": lora.LoRA(rank=2)})
    >>> frozen, lora_params = lora.split(jax.random.key(0), params, rules)
    >>> bool(jnp.allclose(lora.merge(frozen, lora_params)["w"], params["w"], atol=1e-6))
    True
    """
    if not gamma > 0:
        raise ValueError(f"lora_ga(gamma={gamma}): gamma is above 0")
    adapted = chosen(rules, params, sites)
    begun = begun_from("lora_ga", adapted, params)
    for path, (variant, site) in begun.items():
        if 2 * variant.rank > site.max_rank:
            raise ValueError(
                f"lora_ga: {path!r} {site.shape} has no more than {site.max_rank} directions, and rank {variant.rank} "
                "takes twice as many: lower the rank, or leave the path out"
            )

    def gradients(params: Any, batch: Any) -> dict[str, jax.Array]:
        leaves, treedef = tree.flatten(params)

        def loss(some: dict[str, jax.Array]) -> jax.Array:
            return fun(tree.unflatten(treedef, {**leaves, **some}), batch)

        found = jax.grad(loss)({path: jnp.asarray(leaves[path]) for path in begun})
        return {path: grad.astype(wider(grad.dtype, jnp.float32)) for path, grad in found.items()}

    total, n = total_over(gradients, params, batches)
    found = {}
    for path, (variant, site) in begun.items():
        if not bool(jnp.isfinite(total[path]).all()) or not bool(total[path].any()):
            raise ValueError(
                f"lora_ga: the gradient by {path!r} is zero or not finite: the loss does not depend on the leaf, or "
                "there is NaN in params or batches"
            )
        init = LoRAGA(*_along(to_matrices(total[path] / n, site), variant.rank, gamma))
        found[path] = dataclasses.replace(variant, init=init), site
    return as_rules({**adapted, **found})


@functools.partial(jax.jit, static_argnums=(1, 2))
def _along(gradient: jax.Array, rank: int, gamma: float) -> tuple[jax.Array, jax.Array]:
    """A and B along the first singular vectors of a gradient on the left, and along the next on the right."""
    u, _, vt = jnp.linalg.svd(gradient, full_matrices=False)
    c = gradient.shape[-1] ** 0.25 / gamma**0.5
    return c * u[..., :rank], c * vt[..., rank : 2 * rank, :]


@dataclasses.dataclass(frozen=True, eq=False)
class LoRAGA(Initialization):
    """Factors that are known: A (*batch, in, rank) and B (*batch, rank, out)."""

    a: jax.Array = dataclasses.field(repr=False)
    b: jax.Array = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """The name that an adapter's variant keeps."""
        return "lora_ga"

    def start(self, key: jax.Array, weight: jax.Array, site: Site, rank: int, scale: float) -> Start:
        """The factors as they are."""
        return Start(self.a, self.b)
