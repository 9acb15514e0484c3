"""The FLOPs of a compiled program's products of matrices, and the bytes that they read and write, loops and all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lora_jax.plan.hlo import Run, modules, nbytes


def matrix_flops(compiled: Any) -> int:
    """The FLOPs that each device does in products of matrices, in one run of the program: two for each multiply-add.

    XLA's own `cost_analysis` counts the body of a loop once, whatever its number of rounds; this counts every round.
    Element-wise work is not counted: of a decoder's step it is a percent or two, and a matrix unit has no part in it.

    Args:
      compiled: What `jax.jit(fun).lower(*args).compile()` returns for the CPU.

    Raises:
      ValueError: A product is in a loop whose number of rounds the compiler does not know.

    >>> import jax, jax.numpy as jnp
    >>> step = jax.jit(lambda w, x: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w))
    >>> matrix_flops(step.lower(jnp.ones((5, 64, 64)), jnp.ones((8, 64))).compile()) == 5 * 2 * 8 * 64 * 64
    True
    """
    return sum(_flops(run) * count for run, count in _products(compiled))


def matrix_bytes(compiled: Any) -> int:
    """The bytes of what these products read and write on each device, if each does so once.

    Args:
      compiled: As in `matrix_flops`.

    Raises:
      ValueError: As `matrix_flops`.

    >>> import jax, jax.numpy as jnp
    >>> matrix_bytes(jax.jit(jnp.matmul).lower(jnp.ones((8, 64)), jnp.ones((64, 32))).compile())
    11264
    """
    return sum(nbytes((*run.operands, *run.line.arrays)) * count for run, count in _products(compiled))


def _products(compiled: Any) -> Iterator[tuple[Run, int]]:
    for run in (run for module in modules(compiled.as_text()) for run in module.walk() if run.line.opcode == "dot"):
        if run.count is None:
            raise ValueError(f"{run.line.name!r} is in a loop of an unknown number of rounds: use lax.scan")
        yield run, run.count


def _flops(run: Run) -> int:
    (result,), left = run.line.arrays, run.operands[0]
    summed = run.line.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * math.prod(result.shape) * math.prod(left.shape[int(d)] for d in summed.split(",") if d)
