"""The FLOPs that a LoRA step should cost, from the model's own jaxpr and what XLA counts of full fine-tuning.

A step of full fine-tuning has three products for each use of a weight: forward, and the gradients of input and weight.
A LoRA step has the first two, and three small ones, each as dear as the forward product with A and B. No part of this
file is lora_jax: it follows the weights through casts, slices, reshapes and calls by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal


class Product(NamedTuple):
    """A product of n rows with a weight of d inputs and k outputs, `times` over; a convolution's d has one group's."""

    path: str
    kind: str
    n: int
    d: int
    k: int
    flops: float
    groups: int
    times: int
    recomputed: bool

    def low_rank(self, rank: int) -> float:
        """FLOPs of the forward product with A and B: a lookup has no product with A, whose rows are picked."""
        if self.kind == "embedding":
            return 2 * self.n * rank * self.k
        # A's product costs what W's does, for `rank` of its k channels (in each group): XLA counts no padding.
        return self.flops * rank * self.groups / self.k + 2 * self.n * rank * self.k


def products(loss: Any, params: Mapping[str, Any], *batch: Any) -> list[Product]:
    """Every product of `loss(params, *batch)` with one of its params, a dict by path."""
    jaxpr = jax.make_jaxpr(lambda params: loss(params, *batch))(params).jaxpr
    paths = jax.tree.leaves({path: path for path in params})
    return list(_walk(jaxpr, dict(zip(jaxpr.invars, paths, strict=True))))


def lora_step(full: float, products: list[Product], ranks: Mapping[str, int]) -> float:
    """The FLOPs of a LoRA step, given those of full fine-tuning of the same leaves."""
    for product in products:
        times = product.times
        weights_gradient = 0 if product.kind == "embedding" else product.flops
        passes = 4 if product.recomputed else 3  # forward once more, where activations are rematerialized
        full += times * (passes * product.low_rank(ranks[product.path]) - weights_gradient)
    return full


def _walk(jaxpr: Any, paths: dict[Any, str], times: int = 1, recomputed: bool = False) -> Iterator[Product]:
    """The products of a jaxpr; adds to `paths` every variable that is a view of a weight."""
    for eqn in jaxpr.eqns:
        read = {i: paths[v] for i, v in enumerate(eqn.invars) if not isinstance(v, Literal) and v in paths}
        if not read:
            continue
        inner = [x for value in eqn.params.values() for x in jax.tree.leaves(value, is_leaf=_is_jaxpr) if _is_jaxpr(x)]
        name, out = eqn.primitive.name, eqn.outvars[0].aval
        if name in ("jit", "pjit", "scan", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call", "cond"):
            rounds = eqn.params["length"] if name == "scan" else 1
            for body in inner:
                body = getattr(body, "jaxpr", body)
                offset = len(eqn.invars) - len(body.invars)
                known = {body.invars[i - offset]: path for i, path in read.items() if i >= offset}
                yield from _walk(body, known, times * rounds, recomputed or name in ("remat2", "checkpoint"))
                pairs = zip(eqn.outvars, body.outvars, strict=True)
                paths.update({v: known[y] for v, y in pairs if not isinstance(y, Literal) and y in known})
        elif name in ("dot_general", "conv_general_dilated"):
            ((i, path),) = read.items()
            d, k = _in_and_out(eqn, i)
            flops = 2 * out.size * d if name == "dot_general" else _counted(eqn)
            kind = "linear" if name == "dot_general" else "conv"
            groups = eqn.params.get("feature_group_count", 1)
            yield Product(path, kind, out.size // k, d, k, flops, groups, times, recomputed)
        elif name == "gather" and eqn.invars[0].aval.ndim == 2:
            ((_, path),) = read.items()
            d, k = eqn.invars[0].aval.shape
            yield Product(path, "embedding", out.size // k, d, k, 0.0, 1, times, recomputed)
        elif len(read) == 1 and out.size <= eqn.invars[next(iter(read))].aval.size:
            paths.update(dict.fromkeys(eqn.outvars, read[next(iter(read))]))


def _in_and_out(eqn: Any, operand: int) -> tuple[int, int]:
    """How many inputs and outputs the weight has that is this operand of a product."""
    shape = eqn.invars[operand].aval.shape
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "conv_general_dilated":
        k = shape[numbers.rhs_spec[0]]
        return math.prod(shape) // k, k
    summed, batch = (numbers[0][operand], numbers[1][operand])
    d = math.prod(shape[i] for i in summed)
    return d, math.prod(shape) // (d * math.prod(shape[i] for i in batch))


def _counted(eqn: Any) -> float:
    """What XLA counts for one equation on its own."""
    fun = functools.partial(eqn.primitive.bind, **eqn.params)
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    return jax.jit(fun).lower(*avals).compile().cost_analysis()["flops"]


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")
