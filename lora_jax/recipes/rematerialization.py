"""What an adapted block keeps for its backward pass: products, of which none is made twice, and nothing else."""

from __future__ import annotations

import jax

from lora_jax.rules.linear import PRODUCT

save_products = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(PRODUCT),
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
)
"""A policy for `jax.checkpoint`: x·(W + ΔW) and x·A are kept, element-wise arithmetic and attention are repeated.

What an adapter needs of its block is its input, which is element-wise work on products kept anyway, and x·A, of rank
columns. So the backward pass repeats no product of a weight, where `jax.checkpoint` without a policy repeats them all,
a third more FLOPs of what LoRA has.
"""
