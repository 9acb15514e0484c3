"""The convolutions of `fixtures/make_peft_reference.py` as a function of their state dict, kernels turned to HWIO."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def from_torch(weights):
    turned = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
    return {name: w.transpose(turned[w.ndim]) for name, w in weights.items()}


def logits(params, images):
    x = jax.nn.silu(conv(images, params["first.weight"], 2, [(1, 1), (1, 1)]) + params["first.bias"])
    x = jax.nn.silu(conv(x, params["second.weight"], 1, [(0, 0), (1, 1)]))
    x = jax.nn.silu(conv(x, params["third.weight"], 1, "VALID") + params["third.bias"])
    return jnp.mean(x, (1, 2)) @ params["classifier.weight"] + params["classifier.bias"]


def conv(x, kernel, stride, padding):
    """Of images NHWC."""
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)
