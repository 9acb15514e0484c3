"""The collectives of a compiled program, and the bytes that each sends."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

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
    operands: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    group: int
    count: int | None = 1
    conditional: bool = False
    name: str = ""

    @property
    def payload(self) -> int:
        """The bytes that one device holds of the operands or of the results, whichever are more."""
        return max(_bytes(self.operands), _bytes(self.results))

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
        return _bytes(self.operands) * factor.get(self.kind, others / self.group)


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

    >>> import numpy as np
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
    found = (_Module(part).collectives() for part in re.split(r"(?m)^(?=HloModule )", text) if part.strip())
    return tuple(x for part in found for x in part if x.group > 1)


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


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A line of HLO: `%name = shape opcode(operands), attributes`."""

    name: str
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


class _Module:
    """A module's computations, each a list of instructions."""

    def __init__(self, text: str):
        self.header, *_ = text.split("\n", 1)
        self.entry, self.computations = "", {}
        lines: list[_Instruction] = []
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                lines = self.computations[head[2]] = []
                self.entry = head[2] if head[1] else self.entry
            elif body := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
                lines.append(_instruction(*body.groups()))

    def collectives(self) -> Iterator[Collective]:
        return self._of(self.entry, 1, False)

    def _of(self, computation: str, count: int | None, conditional: bool) -> Iterator[Collective]:
        """Those of a computation that runs so often, and of what it calls."""
        lines = self.computations[computation]
        arrays = {line.name: line.arrays for line in lines}
        for line in lines:
            kind = line.opcode.removesuffix("-start")
            if kind in KINDS:
                yield dataclasses.replace(self._collective(kind, line, arrays), count=count, conditional=conditional)
            elif line.opcode == "send" and "is_host_transfer=true" not in line.rest:
                raise ValueError(f"{line.name!r} is a send from device to device, whose group is unknown")
            elif line.opcode == "while":
                times = line.attribute(r'"known_trip_count":\{"n":"?(\d+)')
                inner = count * int(times) if times and count is not None else None
                yield from self._of(line.attribute(r"body=%?([\w.\-]+)"), inner, conditional)
                yield from self._of(line.attribute(r"condition=%?([\w.\-]+)"), inner, conditional)
            elif line.opcode == "conditional":
                branches = line.attribute(r"branch_computations=\{([^}]*)\}").split(", ")
                both = [line.attribute(rf"{which}_computation=(%?[\w.\-]+)") for which in ("true", "false")]
                for name in filter(None, (*branches, *both)):
                    yield from self._of(name.removeprefix("%"), count, True)
            elif line.opcode in ("fusion", "call", "async-start"):
                yield from self._of(line.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)"), count, conditional)

    def _collective(self, kind: str, line: _Instruction, arrays: Any) -> Collective:
        operands = tuple(x for name in line.operands for x in arrays[name])
        results = line.arrays
        if line.opcode in ("all-gather-start", "collective-permute-start"):
            results = line.arrays[len(operands) : 2 * len(operands)]  # its operands, its results, and what it waits on
        return Collective(kind, operands, results, self._group(kind, line), name=line.attribute(r'op_name="([^"]*)"'))

    def _group(self, kind: str, line: _Instruction) -> int:
        """The size of the groups, in each of the three ways in which they are written."""
        if kind == "collective-permute":
            return 2 if line.attribute(r"source_target_pairs=\{(\{.*?\})\}") else 1
        partitions, replicas = (self._header(name) for name in ("num_partitions", "replica_count"))
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

    def _header(self, name: str) -> int:
        found = re.search(rf"{name}=(\d+)", self.header)
        return int(found[1]) if found else 1


def _instruction(name: str, text: str) -> _Instruction:
    shape, text = _closed(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, rest = text.strip().partition("(")
    operands, rest = _closed("(" + rest)
    return _Instruction(name, _arrays(shape), opcode, tuple(re.findall(r"%([\w.\-]+)", operands)), rest)


def _closed(text: str) -> tuple[str, str]:
    """Text that begins with a parenthesis, in two: up to where that is closed, and the rest."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    return text, ""


@functools.cache
def _arrays(text: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arrays of a shape as HLO writes it, such as `f32[4,8]{1,0}` or `(bf16[2], s32[])`.

    >>> _arrays("(f32[4,8]{1,0:T(8,128)}, /*index=1*/token[], bf16[<=2])")
    (ShapeDtypeStruct(shape=(4, 8), dtype=float32), ShapeDtypeStruct(shape=(2,), dtype=bfloat16))
    """
    found = re.findall(r"\b(pred|[a-z]\w*\d\w*)\[([^\]]*)\]", text)
    return tuple(
        jax.ShapeDtypeStruct(tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n), _dtype(name))
        for name, dims in found
    )


def _dtype(name: str) -> Any:
    """A dtype from HLO's name for it: f32, s8, pred, f8e4m3fn."""
    if name == "pred":
        return jnp.dtype(bool)
    if name.startswith("f8"):
        return jnp.dtype("float8_" + name[2:])
    letters, bits = re.findall(r"([a-z]+)(.*)", name)[0]
    return jnp.dtype({"s": "int", "u": "uint", "c": "complex", "bf": "bfloat"}.get(letters, "float") + bits)


def _bytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
