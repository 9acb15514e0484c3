"""LoRA for any JAX function over any pytree: the public names, and nothing else."""

from lora_jax import rules as _rules  # noqa: F401  (imported for its effect: each rule registers itself with the interpreter)
from lora_jax.adapters import attach, dropout, merge, split, unmerge
from lora_jax.contract import Axis, Cost
from lora_jax.explain import Explained, Explanation, explain
from lora_jax.factored import Factored, FactoredError, Network, materialize
from lora_jax.factors import Adapter, shared
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
from lora_jax.optim import fa_gradients, lora_plus, optimizer
from lora_jax.sites import Site, Sites, sites
from lora_jax.summary import Summary, summary
from lora_jax.uses import Use
from lora_jax.variants import IA3, AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, LoRAFA, LoRAXS, Variant, VeRA

__all__ = [
    "AdaLoRA",
    "Adapter",
    "Axis",
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
    "attach",
    "capture",
    "corda",
    "dropout",
    "eva",
    "explain",
    "fa_gradients",
    "lift",
    "load",
    "loftq",
    "lora_ga",
    "lora_plus",
    "materialize",
    "merge",
    "optimizer",
    "relative_to",
    "rule",
    "save",
    "shared",
    "sites",
    "split",
    "summary",
    "unmerge",
]
__version__ = "0.1.0"
