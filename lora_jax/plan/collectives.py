"""The collectives of a compiled program, and the bytes that each sends."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import jax

from lora_jax.plan.hlo import Arrays, Instruction, Module, Run, modules, nbytes

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a compiled program. Shapes are what one device holds.

    Attributes:
      kind: One of `KINDS`; of an asynchronous pair, that of its first half, and the second is not listed.
      operands: The shape and dtype of each array that a device puts in. A compiler joins what runs at the same time.
      results: The same of each array that a device gets.
      group: How many devices do it together; of a permutation, which has pairs, 2.
      count: How often it runs in one run of the program; None in a loop whose trip count the compiler does not know.
      conditional: Whether it is in a branch of a conditional, where it may not run; `count` is as if it did.
      name: Where it comes from: JAX's name stack, such as "jit(step)/while/body/dot_general"; "" if unknown.
    """

    kind: str
    operands: Arrays
    results: Arrays
    group: int
    count: int | None = 1
    conditional: bool = False
    name: str = ""

    @property
    def payload(self) -> int:
        """The bytes that one device holds of the operands or of the results, whichever are more."""
        return max(nbytes(self.operands), nbytes(self.results))

    @property
    def sent(self) -> float:
        """The bytes that each of `n` devices sends each time, on a ring, which sends the fewest possible.

        Of operands of b bytes: 2b(n − 1)/n in an all-reduce, b(n − 1)/n in a reduce-scatter and an all-to-all, b(n − 1)
        in an all-gather, and b in a permutation and a broadcast. Source: Patarasuk and Yuan 2009,
        https://doi.org/10.1016/j.jpdc.2008.09.002.
        """
        others = self.group - 1
        factor = {
            "all-reduce": 2 * others / self.group,
            "all-gather": others,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }
        return nbytes(self.operands) * factor.get(self.kind, others / self.group)


def collectives(compiled: Any) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order in which their computations are written.

    Those in loops, branches and functions that the program calls are listed with how often they run, and one that does
    nothing, between groups of one device, is not. They are what XLA made for the devices that the program was compiled
    for, and another compiler may do otherwise: on a CPU, XLA sends bfloat16 as float32 (JAX 0.10), reduces whole arrays
    where others scatter the sum, and joins collectives where others do not.

    Args:
      compiled: What `jax.jit(fun).lower(*args).compile()` returns.

    Raises:
      ValueError: The program has no text to read; or it sends from device to device in a way that this does not know.

    >>> import jax.numpy as jnp, numpy as np
    >>> from jax.sharding import Mesh, PartitionSpec as P
    >>> mesh = Mesh(np.array(jax.devices()[:2]), "d")
    >>> total = jax.shard_map(lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=P("d"), out_specs=P())
    >>> (one,) = collectives(jax.jit(total).lower(jnp.ones((4, 3))).compile())
    >>> one.kind, one.operands[0].shape, one.group, one.count, one.sent
    ('all-reduce', (2, 3), 2, 1, 24.0)
    """
    text = compiled.as_text()
    if not text:
        raise ValueError(f"{type(compiled).__name__} on {jax.default_backend()!r} has no text to read collectives in")
    found = (_collective(module, run) for module in modules(text) for run in module.walk())
    return tuple(one for one in found if one and one.group > 1)


def bytes_sent(found: Iterable[Collective]) -> float:
    """The bytes that each device sends in one run of the program, by the formula of `Collective.sent`.

    Raises:
      ValueError: One is inside a loop whose trip count the compiler does not know.
    """
    found = tuple(found)
    for one in found:
        if one.count is None:
            raise ValueError(
                f"{one.kind} at {one.name!r} is in a loop whose trip count the compiler does not know: "
                "use lax.scan, or lax.fori_loop between constants"
            )
    return sum(one.sent * (one.count or 0) for one in found)


def _collective(module: Module, run: Run) -> Collective | None:
    """The collective that an instruction is, if it is one."""
    line, operands, results = run.line, run.operands, run.line.arrays
    kind = line.opcode.removesuffix("-start")
    if line.opcode == "send" and "is_host_transfer=true" not in line.rest:
        raise ValueError(f"{line.name!r} is a send from device to device, whose group is unknown")
    if kind not in KINDS:
        return None
    if line.opcode in ("all-gather-start", "collective-permute-start"):
        results = line.arrays[len(operands) : 2 * len(operands)]  # its operands, its results, and what it waits on
    if kind == "all-reduce" and line.attribute(r"to_apply=%?([\w.\-]+)").endswith("_promoted"):
        # XLA sums bfloat16 as float32 on a CPU, which has no such sum; other platforms have.
        operands, results = (
            tuple(jax.ShapeDtypeStruct(x.shape, "bfloat16") for x in own) for own in (operands, results)
        )
    name = line.attribute(r'op_name="([^"]*)"')
    return Collective(kind, operands, results, _group(module, kind, line), run.count, run.conditional, name)


def _group(module: Module, kind: str, line: Instruction) -> int:
    """The size of the groups, in each of the three ways in which they are written."""
    if kind == "collective-permute":
        return 2 if line.attribute(r"source_target_pairs=\{(\{.*?\})\}") else 1
    partitions, replicas = (module.header(name) for name in ("num_partitions", "replica_count"))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line.rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        # A part of an axis is written 'axis':(size before it)its size.
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
        size = math.prod(int(part or sizes[name]) for name, part in axes)
    elif iota := line.attribute(r"replica_groups=\[([\d,]+)\]<="):
        size = int(iota.split(",")[-1])
    elif listed := line.attribute(r"replica_groups=\{\{([\d,]*)"):
        size = len(listed.split(","))
    else:
        return partitions * replicas
    # Such groups are of replicas, and each holds all of their partitions.
    mixed = kind in ("all-reduce", "all-gather", "reduce-scatter") and "channel_id=" in line.rest
    return size * partitions if mixed and "use_global_device_ids=true" not in line.rest else size
