"""One rule for each primitive that keeps a weight factored; importing the package registers them all."""

from lora_jax.rules import (
    control_flow,
    conv,
    elementwise,
    indexing,
    joining,
    layout,
    linear,
    lookup,
    ragged,
    sharding,
)

__all__ = [
    "control_flow",
    "conv",
    "elementwise",
    "indexing",
    "joining",
    "layout",
    "linear",
    "lookup",
    "ragged",
    "sharding",
]
