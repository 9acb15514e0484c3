"""The text of a compiled program: its instructions, each with how often it runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


def modules(compiled: Any) -> list[Module]:
    """The modules of a compiled program, of which there is one but on some platforms.

    Args:
      compiled: What `jax.jit(fun).lower(*args).compile()` returns.

    Raises:
      ValueError: The program has no text to read.
    """
    text = compiled.as_text()
    if not text:
        raise ValueError(f"{type(compiled).__name__} on {jax.default_backend()!r} has no text to read")
    return [Module(part) for part in re.split(r"(?m)^(?=HloModule )", text) if part.strip()]


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction, the arrays that it takes, and how often it runs: None in a loop of an unknown number of rounds.

    `conditional` is whether it is in a branch of a conditional, where it may not run.
    """

    line: Instruction
    operands: tuple[jax.ShapeDtypeStruct, ...]
    count: int | None
    conditional: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: `%name = shape opcode(operands), attributes`."""

    name: str
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def attribute(self, pattern: str) -> str:
        """What a regular expression's group matches after the operands; "" if nothing does."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


class Module:
    """A module's computations, each a list of instructions."""

    def __init__(self, text: str):
        self.title, *_ = text.split("\n", 1)
        self.entry, self.computations = "", {}
        lines: list[Instruction] = []
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                lines = self.computations[head[2]] = []
                self.entry = head[2] if head[1] else self.entry
            elif body := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
                lines.append(_instruction(*body.groups()))

    def walk(self) -> Iterator[Run]:
        """Every instruction of the entry, and of what it calls, loops over and branches to."""
        return self._of(self.entry, 1, False)

    def _of(self, computation: str, count: int | None, conditional: bool) -> Iterator[Run]:
        lines = self.computations[computation]
        arrays = {line.name: line.arrays for line in lines}
        for line in lines:
            yield Run(line, tuple(x for name in line.operands for x in arrays.get(name, ())), count, conditional)
            if line.opcode == "while":
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

    def header(self, name: str) -> int:
        """A number in the module's first line, such as `num_partitions`; 1 where it is not given."""
        found = re.search(rf"{name}=(\d+)", self.title)
        return int(found[1]) if found else 1


def _instruction(name: str, text: str) -> Instruction:
    shape, text = _closed(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, rest = text.strip().partition("(")
    operands, rest = _closed("(" + rest)
    return Instruction(name, _arrays(shape), opcode, tuple(re.findall(r"%([\w.\-]+)", operands)), rest)


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


def bytes_of(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    """The bytes of arrays together."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
