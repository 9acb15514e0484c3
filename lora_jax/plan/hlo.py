"""The text of a compiled program, HLO, as instructions."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

Arrays = tuple[jax.ShapeDtypeStruct, ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: `%name = shape opcode(operands), rest`.

    Attributes:
      name: What other lines of its computation know its result by.
      arrays: The arrays of its result, of a tuple all in a row.
      opcode: What it does.
      inside: What stands in its parentheses; of a constant, the value.
      rest: Its attributes.
      is_root: Whether its result is that of its computation.
    """

    name: str
    arrays: Arrays
    opcode: str
    inside: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    def attribute(self, pattern: str) -> str:
        """What the group of a regular expression finds among its attributes, or ""."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction, and what is known of when it runs.

    Attributes:
      line: The instruction.
      operands: The arrays that it takes.
      count: How often it runs in one run of the program; None in a loop whose trip count is not known.
      conditional: Whether it is in a branch of a conditional, where it may not run; `count` is as if it did.
    """

    line: Instruction
    operands: Arrays
    count: int | None
    conditional: bool


class Module:
    """A module's computations, each a dict from name to instruction.

    >>> (module,) = modules(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text())
    >>> [line.arrays for line in module.computations[module.entry].values() if line.is_root]
    [(ShapeDtypeStruct(shape=(), dtype=float32),)]
    """

    def __init__(self, text: str):
        self.first, *_ = text.split("\n", 1)
        self.entry = ""
        self.computations: dict[str, dict[str, Instruction]] = {}
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                lines = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif body := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
                lines[body[2]] = _instruction(body[2], body[3], bool(body[1]))

    def header(self, name: str) -> int:
        """A number in the module's first line, such as num_partitions; 1 if it is not there."""
        found = re.search(rf"\b{name}=(\d+)", self.first)
        return int(found[1]) if found else 1

    def walk(self) -> Iterator[Run]:
        """Every instruction of the entry, and of what it calls, in the order in which they are written."""
        return self._walk(self.entry, 1, False)

    def _walk(self, computation: str, count: int | None, conditional: bool) -> Iterator[Run]:
        lines = self.computations[computation]
        for line in lines.values():
            operands = (x for name in line.operands if name in lines for x in lines[name].arrays)
            yield Run(line, tuple(operands), count, conditional)
            if line.opcode == "while":
                times = self.trip_count(computation, line)
                inner = None if times is None or count is None else count * times
                yield from self._walk(line.attribute(r"body=%?([\w.\-]+)"), inner, conditional)
                yield from self._walk(line.attribute(r"condition=%?([\w.\-]+)"), inner, conditional)
            elif line.opcode == "conditional":
                branches = line.attribute(r"branch_computations=\{([^}]*)\}").split(", ")
                both = [line.attribute(rf"{which}_computation=(%?[\w.\-]+)") for which in ("true", "false")]
                for name in filter(None, (*branches, *both)):
                    yield from self._walk(name.removeprefix("%"), count, True)
            elif line.opcode in ("fusion", "call", "async-start"):
                yield from self._walk(line.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)"), count, conditional)

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """How often the body of a `while` runs, where the compiler says so or the loop counts from 0 in steps of 1."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"?(\d+)'):
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        test = _root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        counter, bound = (_copied(condition, name) for name in test.operands)
        index = counter.attribute(r"index=(\d+)")
        body = self.computations[loop.attribute(r"body=%?([\w.\-]+)")]
        begun, after = _copied(self.computations[computation], loop.operands[0]), _root(body)
        if not index or bound.opcode != "constant" or {begun.opcode, after.opcode} != {"tuple"}:
            return None
        start = _copied(self.computations[computation], begun.operands[int(index)])
        step = _copied(body, after.operands[int(index)])
        added = {_term(_copied(body, name)) for name in step.operands}
        counts = (start.opcode, start.inside, step.opcode) == ("constant", "0", "add") and added == {"1", f"[{index}]"}
        return int(bound.inside) if counts else None


def modules(text: str) -> Iterator[Module]:
    """The modules of a program."""
    return (Module(part) for part in re.split(r"(?m)^(?=HloModule )", text) if part.strip())


def nbytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    """The bytes of all of them; an array of 4-bit integers counts as of 8-bit ones."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def _root(lines: dict[str, Instruction]) -> Instruction:
    return next(line for line in lines.values() if line.is_root)


def _copied(lines: dict[str, Instruction], name: str) -> Instruction:
    """The instruction of that name, or what it is a copy of."""
    line = lines[name]
    return _copied(lines, line.operands[0]) if line.opcode == "copy" else line


def _term(line: Instruction) -> str:
    """A constant, or the part of a tuple that a line takes, as one word."""
    return line.inside if line.opcode == "constant" else "[" + line.attribute(r"index=(\d+)") + "]"


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    shape, text = _closed(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, rest = text.strip().partition("(")
    inside, rest = _closed("(" + rest)
    return Instruction(name, _arrays(shape), opcode, inside[1:-1], rest, is_root)


def _closed(text: str) -> tuple[str, str]:
    """Text that begins with a parenthesis, in two: up to where that is closed, and the rest."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    return text, ""


@functools.cache
def _arrays(text: str) -> Arrays:
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
