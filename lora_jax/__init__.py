"""LoRA for any JAX function over any pytree: the public names, and nothing else."""

from lora_jax import rules as _rules  # noqa: F401  (imported for its effect: each rule registers itself with the interpreter)
from lora_jax.adapters import Adapter, attach, dropout, merge, split, unmerge
from lora_jax.algebra import add, negate, resize, scale, subtract
from lora_jax.combine import combine
from lora_jax.contract import Cost
from lora_jax.diagnostics import amplification, effective_rank, singular_values, subspace_similarity
from lora_jax.explain import Explained, Explanation, explain
from lora_jax.extract import extract
from lora_jax.factored import Factored, FactoredError, Network, materialize
from lora_jax.formats.native import load, save
from lora_jax.interpreter import Interpreter, MaterializeError, rule
from lora_jax.lift import UnusedError, lift
from lora_jax.optim import optimizer
from lora_jax.sites import Site, Sites, sites
from lora_jax.summary import Summary, summary
from lora_jax.uses import Use
from lora_jax.variants import Full, LoRA, Variant

__all__ = [
    "Adapter",
    "Cost",
    "Explained",
    "Explanation",
    "Factored",
    "FactoredError",
    "Full",
    "Interpreter",
    "LoRA",
    "MaterializeError",
    "Network",
    "Site",
    "Sites",
    "Summary",
    "UnusedError",
    "Use",
    "Variant",
    "add",
    "amplification",
    "attach",
    "combine",
    "dropout",
    "effective_rank",
    "explain",
    "extract",
    "lift",
    "load",
    "materialize",
    "merge",
    "negate",
    "optimizer",
    "resize",
    "rule",
    "save",
    "scale",
    "singular_values",
    "sites",
    "split",
    "subspace_similarity",
    "subtract",
    "summary",
    "unmerge",
]
__version__ = "0.1.0"
