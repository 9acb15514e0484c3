"""LoRA for any JAX function over any pytree: the public names, and nothing else."""

from typing import TYPE_CHECKING, Any

from lora_jax import rules as _rules  # noqa: F401  (imported for its effect: each rule registers itself with the interpreter)
from lora_jax import training
from lora_jax.adapters import attach, dropout, merge, split, unmerge
from lora_jax.algebra.arithmetic import add, negate, resize, scale, subtract
from lora_jax.algebra.combine import combine
from lora_jax.algebra.extract import extract
from lora_jax.axes import Axis
from lora_jax.diagnostics import amplification, effective_rank, singular_values, subspace_similarity
from lora_jax.explain import Explained, Explanation, explain
from lora_jax.factored import Factored, FactoredError
from lora_jax.factors import Adapter, shared
from lora_jax.fingerprint import fingerprint
from lora_jax.formats.native import load, save
from lora_jax.initial.capture import Moments, capture
from lora_jax.initial.corda import corda
from lora_jax.initial.eva import eva
from lora_jax.initial.loftq import loftq
from lora_jax.initial.lora_ga import lora_ga
from lora_jax.initial.relative import relative_to
from lora_jax.initial.start import Initialization, Start
from lora_jax.interpreter import Interpreter, MaterializeError, rule
from lora_jax.lift import UnusedError, lift
from lora_jax.materialize import materialize
from lora_jax.network import Network
from lora_jax.optim import fa_gradients, lora_plus, optimizer
from lora_jax.order import Cost
from lora_jax.sharding import match_partition_rules, partition_specs, shardings
from lora_jax.sites import Site, Sites, sites
from lora_jax.summary import Summary, summary
from lora_jax.uses import Use
from lora_jax.variants import IA3, AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, LoRAFA, LoRAXS, Variant, VeRA

if TYPE_CHECKING:
    from lora_jax.formats.orbax import Checkpoints

__all__ = [
    "AdaLoRA",
    "Adapter",
    "Axis",
    "Checkpoints",
    "Cost",
    "DoRA",
    "Explained",
    "Explanation",
    "Factored",
    "FactoredError",
    "Full",
    "IA3",
    "Initialization",
    "Interpreter",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAXS",
    "MaterializeError",
    "Moments",
    "Network",
    "Site",
    "Sites",
    "Start",
    "Summary",
    "UnusedError",
    "Use",
    "Variant",
    "VeRA",
    "add",
    "amplification",
    "attach",
    "capture",
    "combine",
    "corda",
    "dropout",
    "effective_rank",
    "eva",
    "explain",
    "extract",
    "fa_gradients",
    "fingerprint",
    "lift",
    "load",
    "loftq",
    "lora_ga",
    "lora_plus",
    "match_partition_rules",
    "materialize",
    "merge",
    "negate",
    "optimizer",
    "partition_specs",
    "relative_to",
    "resize",
    "rule",
    "save",
    "scale",
    "shardings",
    "shared",
    "singular_values",
    "sites",
    "split",
    "subspace_similarity",
    "subtract",
    "summary",
    "training",
    "unmerge",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "Checkpoints":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lora_jax.formats.orbax import Checkpoints  # orbax takes as long to import as a fifth of all else

    return Checkpoints
