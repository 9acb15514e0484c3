"""CorDA: the weight is decomposed in the light of its inputs' covariance, and the factors begin as a part of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax.choice import Rules
from lora_jax.initial.capture import capture
from lora_jax.initial.chosen import as_rules, begun_from, chosen, only_linear, total_over
from lora_jax.initial.eva import known_inputs
from lora_jax.initial.pissa import halves
from lora_jax.initial.start import Initialization, Start
from lora_jax.sites import Site


def corda(
    fun: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    rules: Rules,
    *,
    sites: Mapping[str, Site] | None = None,
    mode: Literal["ipm", "kpm"] = "ipm",
    damping: float = 0.01,
) -> Rules:
    """Rules by which LoRA begins as a part of C⁻¹·SVD(C·W), with C = E[xᵀx] of each leaf's inputs.

    C·W = U·S·Vᵀ, and A = C⁻¹·U·√(S/s), B = √(S/s)·Vᵀ of `rank` components; W - s·A·B stays frozen.

    Args:
      fun: The user's function of params and a batch, as for `eva`.
      params: Its first argument.
      batches: Its second arguments: of the task to learn for "ipm", of what is to be kept for "kpm".
      rules: As for `split`. Leaves under `LoRA` begin this way; what is under other variants stays as ruled.
      sites: As for `split`.
      mode: "ipm" (instruction-previewed), which trains the largest components; "kpm" (knowledge-preserved), which
        trains the smallest, and leaves the base what the data says is important.
      damping: What is added to the diagonal of C, in units of its mean.

    Returns:
      Rules for `split`, for this tree. They hold each leaf's C, in² numbers, as long as they live.

    Raises:
      ValueError: As `eva`; or for an unknown mode, or a damping that is not above 0.

    Source: Yang et al. 2024, https://arxiv.org/abs/2406.05223. C is scaled to a mean diagonal of 1, where Hugging Face
    PEFT divides inputs by their largest entry: A·B is the same, and how long A is beside B is not.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> def model(params, x):
    ...     return x @ params["w"]
    >>> params, x = {"w": jnp.eye(3)}, jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    >>> rules = lora.corda(model, params, [x], {"w": lora.LoRA(rank=1)}, mode="kpm")
    >>> frozen, _ = lora.split(jax.random.key(0), params, rules)
    >>> jnp.abs(jnp.diag(frozen["w"])).round(3)
    Array([1., 1., 0.], dtype=float32)
    """
    if mode not in ("ipm", "kpm"):
        raise ValueError(f"corda(mode={mode!r}): the mode is 'ipm' or 'kpm'")
    if not damping > 0:
        raise ValueError(f"corda(damping={damping}): the damping is above 0, or C may have no inverse")
    adapted = chosen(rules, params, sites)
    begun = begun_from("corda", adapted, params)
    only_linear("corda", begun)
    captured, _ = total_over(capture(fun, {path: site for path, (_, site) in begun.items()}), params, batches)
    for path, moments in captured.items():
        known_inputs(path, moments)
    found = {
        path: (dataclasses.replace(variant, init=CorDA(captured[path].second, mode, damping)), site)
        for path, (variant, site) in begun.items()
    }
    return as_rules({**adapted, **found})


@dataclasses.dataclass(frozen=True, eq=False)
class CorDA(Initialization):
    """The largest or the smallest components of C·W, with C (*batch, in, in) to any scale."""

    second: jax.Array = dataclasses.field(repr=False)
    mode: str
    damping: float

    @property
    def name(self) -> str:
        """The name that an adapter's variant keeps."""
        return "corda"

    def start(self, key: jax.Array, weight: jax.Array, site: Site, rank: int, scale: float) -> Start:
        """The components of this leaf's C·W."""
        smallest = self.mode == "kpm"
        return Start(*_part(self.second.astype(weight.dtype), weight, rank, scale, smallest, self.damping))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _part(
    second: jax.Array, weight: jax.Array, rank: int, scale: float, smallest: bool, damping: float
) -> tuple[jax.Array, jax.Array]:
    """A and B, with C's inverse by its eigenvalues, which the damping keeps away from zero."""
    values, vectors = jnp.linalg.eigh(second)
    # Of inputs that are all zero, C counts as the identity.
    mean = jnp.mean(values, -1, keepdims=True)
    values = jnp.maximum(jnp.where(mean > 0, values / jnp.where(mean > 0, mean, 1), 1), 0) + damping
    transposed = jnp.swapaxes(vectors, -1, -2)
    u, s, vt = jnp.linalg.svd((vectors * values[..., None, :]) @ transposed @ weight, full_matrices=False)
    part = slice(s.shape[-1] - rank, None) if smallest else slice(rank)
    u = (vectors / values[..., None, :]) @ transposed @ u[..., part]
    return halves(u, s[..., part], vt[..., part, :], scale)
