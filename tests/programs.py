"""Random programs that use weights as models do: leaves go through moves, are consumed, in any control flow.

A program is data: shapes, and the source of a function that anyone could have written, so that one that fails can be
read, and pasted. `programs()` draws one, statement by statement, from three registries of small functions: `MOVES` from
weight to weight, `CONSUMERS` from weight to activation, and `BLOCKS` of control flow. Each draws its parameters
and returns an expression; what it needs of its weight is in `when`.

The writer knows of each weight which axes of which leaf each dimension is made of, and writes nothing that cannot be
kept factored: no reshape that splits an axis unevenly, no slice of merged axes, no sum of a weight scaled by what
has a gradient. A leaf's uses always have an axis that is summed over and one that stays, so that it can be adapted.
"""

from __future__ import annotations

import dataclasses
import itertools
import linecache
import math
import re
import textwrap
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

FREE = (11, 13)  # sizes that activations alone have, so that no array of theirs is as large as a weight by chance


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of weights w0, w1, ... and inputs: x0, x1, ... (activations) and v0, v1, ... (scales of weights).

    Attributes:
      source: The function, `def program(w0, ..., x0, ...)`, which returns a number.
      leaves: The weights' shapes.
      inputs: The inputs' shapes.
      rank: The adapters' rank.
      under: Names in TRANSFORMS, of what is done to the function before it is lifted.
      over: And after.
      tolerance: The error allowed; more than rounding in float64 only where the program itself casts to less.
      sides: For each leaf the dimensions that its first use sums over, and those its result has, if known.
      moves: The names of all functions that took part in writing it.
    """

    source: str
    leaves: dict[str, tuple[int, ...]]
    inputs: dict[str, tuple[int, ...]]
    rank: int = 1
    under: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    tolerance: float = 1e-10
    sides: dict[str, tuple[set[int], set[int]]] = dataclasses.field(default_factory=dict)
    moves: tuple[str, ...] = ()

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:] if f.name != "moves"}
        fields = "".join(f"    {name}={value!r},\n" for name, value in values.items() if value)
        return f'Program(\n    """\n{self.source}""",\n{fields})'

    def function(self) -> Callable[..., jax.Array]:
        """The function itself, of two dicts: weights and inputs."""
        source = textwrap.dedent(self.source)
        name = f"program_{zlib.crc32(source.encode()):08x}.py"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        space = {"jax": jax, "jnp": jnp, "lax": lax, "readout": readout, "own_derivative": own_derivative}
        exec(compile(source, name, "exec"), space)
        return lambda weights, inputs: space["program"](**weights, **inputs)


def readout(y):
    """A small number in which every entry counts differently."""
    return (jnp.sin(y) * np.cos(np.arange(y.size) + 1.0).reshape(y.shape)).sum() / (10 * y.size**0.5)


def own_derivative(block):
    """The block as a function with a derivative of its author's: its own."""
    function = jax.custom_jvp(block)
    function.defjvp(lambda primals, tangents: jax.jvp(block, primals, tangents))
    return function


class Atom(NamedTuple):
    """An axis of a weight, or a part of one."""

    roots: tuple[tuple[str, int], ...]  # its leaf and dimension, several once leaves are joined; none if it came later
    size: int


@dataclasses.dataclass
class Leaf:
    """A parameter, and the axes that its first use sums over and has in its result; they decide what A and B have."""

    name: str
    shape: tuple[int, ...]
    sides: tuple[set[Any], set[Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Weight:
    """A variable that holds a weight: its name in the source, its leaf, and what its dimensions are made of."""

    name: str
    leaves: tuple[Leaf, ...]
    dims: tuple[tuple[Atom, ...], ...]
    traits: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(atom.size for atom in group) for group in self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def atoms(self) -> list[Atom]:
        return [atom for group in self.dims for atom in group]

    def without(self, d: int) -> Weight:
        return dataclasses.replace(self, dims=self.dims[:d] + self.dims[d + 1 :])

    def droppable(self) -> list[int]:
        """Dimensions that are one axis, and without which two sides of a leaf are left."""
        return [d for d, group in enumerate(self.dims) if len(group) == 1 and self.without(d).has_sides()]

    def has_sides(self) -> bool:
        return all(len(roots(self.dims, leaf)) > 1 for leaf in self.leaves)

    def having(self, *traits: str) -> Weight:
        return dataclasses.replace(self, traits=self.traits | {*traits})

    def join(self, other: Weight, dims: Any) -> Weight:
        """What two weights make together, with these dims."""
        leaves = self.leaves + tuple(leaf for leaf in other.leaves if leaf not in self.leaves)
        return dataclasses.replace(self, leaves=leaves, dims=tuple(map(tuple, dims)), traits=self.traits | other.traits)


def roots(groups: Any, leaf: Leaf | None = None) -> set[Any]:
    """The leaves' axes that dimensions are made of, or those of one leaf."""
    found = {root for group in groups for atom in group for root in atom.roots}
    return {root for root in found if leaf is None or root[0] == leaf.name}


# Moves: (writer, weight) -> the expression of another weight, and that weight's dims (and traits).

MOVES: dict[str, Move] = {}
CONSUMERS: dict[str, Move] = {}


class Move(NamedTuple):
    """A registered function, and what it needs of its weight."""

    draw: Callable[..., Any]
    when: Callable[[Weight], bool]


def move(when: Callable[[Weight], Any] = lambda w: True, registry: dict[str, Move] = MOVES) -> Any:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        registry[function.__name__] = Move(function, when)
        return function

    return register


@move(lambda w: w.ndim > 1)
def transpose(write, w):
    order = write.draw(st.permutations(range(w.ndim)).filter(lambda order: order != sorted(order)))
    return f"{w}.transpose({tuple(order)})", [w.dims[d] for d in order]


@move(lambda w: w.atoms)
def reshape(write, w):
    groups = []
    for atom in [part for whole in w.atoms for part in write.parts(whole)]:
        if groups and write.flip():
            groups[-1].append(atom)
        else:
            groups.append([atom])
    return f"{w}.reshape({tuple(math.prod(a.size for a in group) for group in groups)})", groups


@move(lambda w: cuttable(w))
def cut(write, w):
    """A slice with a stride, perhaps a negative one, of one dimension."""
    d = write.pick(cuttable(w))
    n = w.shape[d]
    step = write.pick([1, 2, -1] if n > 3 else [1, -1])
    start = write.number(0, n - 1 - abs(step))
    stop = write.number(start + abs(step) + 1, n)
    size = len(range(start, stop, abs(step)))
    bounds = f"{start}:{stop}:{step}" if step > 0 else f"{stop - 1}:{start - 1 if start else ''}:-1"
    index = ", ".join([":"] * d + [bounds])
    return f"{w}[{index}]", replaced(w, d, size)


@move(lambda w: cuttable(w))
def dynamic_slice(write, w):
    d = write.pick(cuttable(w))
    size = write.number(2, w.shape[d] - 1)
    start = write.input("v", ())
    return f"lax.dynamic_slice_in_dim({w}, (jnp.abs({start}) * 3).astype(int), {size}, {d})", replaced(w, d, size)


@move(lambda w: cuttable(w))
def split(write, w):
    """One part of a weight that is split, as a fused query, key and value are."""
    d = write.pick(cuttable(w))
    at = write.number(2, w.shape[d] - 1)
    return f"jnp.split({w}, [{at}], {d})[0]", replaced(w, d, at)


@move(lambda w: w.ndim)
def flip(write, w):
    axes = write.some(range(w.ndim))
    return f"jnp.flip({w}, {axes})", w.dims


@move(lambda w: w.ndim < 5)
def expand(write, w):
    d = write.number(0, w.ndim)
    return f"jnp.expand_dims({w}, {d})", [*w.dims[:d], (), *w.dims[d:]]


@move(lambda w: () in w.dims)
def squeeze(write, w):
    d = write.pick([d for d, group in enumerate(w.dims) if not group])
    return f"{w}.squeeze({d})", w.without(d).dims


@move(lambda w: w.ndim < 5 and w.size < 500 and "broadcast" not in w.traits)
def broadcast(write, w):
    d, size = write.number(0, w.ndim), write.pick([2, 3])
    shape, kept = w.shape[:d] + (size,) + w.shape[d:], tuple(e for e in range(w.ndim + 1) if e != d)
    wide = f"jnp.broadcast_to({w}, {shape})" if d == 0 else f"lax.broadcast_in_dim({w}, {shape}, {kept})"
    return wide, [*w.dims[:d], (Atom((), size),), *w.dims[d:]], "broadcast"


@move()
def cast(write, w):
    dtype, tolerance = write.pick([("float32", 1e-4), ("float16", 0.1)])
    write.tolerance = max(write.tolerance, tolerance)
    return f"{w}.astype({dtype!r}).astype({str(jnp.dtype('float64'))!r})", w.dims


@move(lambda w: "moving" not in w.traits)
def number(write, w):
    """Scaling by a number: of the program, of the activation, or of an input."""
    form = write.pick(
        ["{w} * 1.5", "-{w}", "{w} / -0.5", "0.25 * {w}", "jnp.cos(h) * {w}", "{w} / (2.0 + jnp.sin({v}))"]
    )
    v = write.input("v", ()) if "{v}" in form else ""
    return form.format(w=w, v=v), w.dims, "scaled", *(["driven"] if v or "h" in form else [])


@move(lambda w: scales(w) and "moving" not in w.traits)
def vector(write, w):
    """Scaling by an input along some dimensions."""
    along = write.pick(scales(w))
    form = write.pick(["{w} * {v}", "{v} * {w}", "{w} / (2.0 + jnp.sin({v}))"])
    return form.format(w=w, v=write.along(w, along)), w.dims, "scaled", "driven" if len(along) < 2 else "tilted"


@move(lambda w: w.droppable())
def index(write, w):
    """One of a stack, by an index known or traced."""
    d = write.pick(w.droppable())
    i = write.number(-w.shape[d], w.shape[d] - 1)
    form = write.pick(["{w}[{at}]", "lax.dynamic_index_in_dim({w}, {i}, {d}, keepdims=False)", "{w}[{at_traced}]"])
    places = [":"] * d
    traced = f"jnp.sign({write.input('v', ())}).astype(int)" if "traced" in form else ""
    names = {"at": ", ".join([*places, str(i)]), "at_traced": ", ".join([*places, traced])}
    return form.format(w=w, i=i, d=d, **names), w.without(d).dims


@move(lambda w: w.droppable())
def rows(write, w):
    """Several of a stack, in any order."""
    d = write.pick(w.droppable())
    ids = f"{write.pick([3, 5])} * jnp.arange({FREE[0]}) % {w.shape[d]}"
    index = ", ".join([":"] * d + [ids])
    form = write.pick([f"{w}[{index}]", f'jnp.take({w}, {ids}, {d}, mode="clip")'])
    return form, replaced(w, d, FREE[0], rooted=False)


@move()
def same(write, w):
    """What leaves the value as it is."""
    forms = ["jnp.copy({w})", "lax.optimization_barrier({w})", "lax.optimization_barrier((h, {w}))[1]"]
    return write.pick(forms[: 2 if "moving" in w.traits else 3]).format(w=w), w.dims


@move()
def stopped(write, w):
    return f"lax.stop_gradient({w})", w.dims


@move()
def called(write, w):
    """A move inside a function of the weight that is jitted or checkpointed."""
    call, (inner, dims, *traits) = (
        write.pick(["jax.jit", "jax.checkpoint"]),
        write.move(w, but={"called", "mapped", "chosen", *TOGETHER}),
    )
    return f"{call}(lambda {w}: {inner})({w})", dims, *traits


@move(lambda w: w.ndim > 2 and w.dims[0] and w.without(0).has_sides())
def mapped(write, w):
    """A move of each of a stack."""
    inner, dims, *traits = write.move(w.without(0).having("vmapped"), but={"called", "mapped", "chosen", *TOGETHER})
    forms = ["jax.vmap(lambda {w}: {inner})({w})", "lax.scan(lambda _, {w}: (None, {inner}), None, {w})[1]"]
    form = write.pick(forms if len(w.dims[0]) == 1 and ".reshape" not in inner else forms[:1])
    lead = w.dims[0] if "vmap" in form else [Atom((), w.shape[0])]
    return form.format(w=w, inner=inner), [lead, *dims], *traits


# Moves of two weights, or of a weight and an array, into one.


def like(write: Any, w: Weight, but: Any = None) -> list[Weight]:
    """The weights in scope of the same shape but for one dimension, made of axes of the same sizes."""

    def sizes(x: Weight) -> list[Any]:
        return [[atom.size for atom in group] for d, group in enumerate(x.dims) if d != but]

    return [x for x in write.scope if x.ndim == w.ndim and sizes(x) == sizes(w) and not x.traits & SPECIAL]


TOGETHER = {"total", "concatenate", "stack"}  # moves that other weights may take part in
# What keeps a weight from moves that put weights together: an array was added; it is the same along some axis; it is
# scaled by what has a gradient, which joining would multiply into the base; or it has a tangent of its own.
SPECIAL = {"mixed", "broadcast", "driven", "moving"}


def merged(left: Weight, right: Weight, d: int | None = None) -> list[Any]:
    """The dims of two weights with the axes of both, but for dimension `d`."""
    return [
        tuple(Atom(tuple(dict.fromkeys(a.roots + b.roots)), a.size) for a, b in zip(*groups, strict=True))
        for e, groups in enumerate(zip(left.dims, right.dims, strict=True))
        if e != d
    ]


@move(lambda w: not w.traits & SPECIAL)
def total(write, w):
    """The sum or difference of two weights, or one of them as a number says."""
    other = write.pick([w, *like(write, w)])
    form = write.pick(["{w} + {o}", "{w} - {o}", "jnp.where({v} > 0, {w}, {o})", "lax.select_n({v} > 0, {w}, {o})"])
    v = write.input("v", ()) if "{v}" in form else ""
    return form.format(w=w, o=other, v=v), w.join(other, merged(w, other))


@move(lambda w: scales(w) and not w.traits & SPECIAL)
def shift(write, w):
    """A number or a vector added."""
    dims = write.pick([(), *scales(w)])
    v = write.along(w, dims)
    return write.pick([f"{w} + {v}", f"{v} - {w}"]), w.dims, "shifted"


@move(lambda w: not w.traits & SPECIAL)
def array(write, w):
    """A whole array added."""
    return f"{w} + jnp.cos(jnp.arange({w.size}.0)).reshape({w.shape})", w.dims, "mixed"


@move(lambda w: w.droppable() and not w.traits & SPECIAL)
def concatenate(write, w):
    """Two weights one after the other, or one and itself."""
    d = write.pick(w.droppable())
    other = write.pick([w, *(x for x in like(write, w, d) if d in x.droppable())])
    dims, sizes = merged(w, other, d), (w.shape[d], other.shape[d])
    small, roots_ = math.gcd(*sizes), tuple(dict.fromkeys(w.dims[d][0].roots + other.dims[d][0].roots))
    joined = [Atom(roots_, sum(sizes) // small), *([Atom(roots_, small)] if small > 1 else [])]
    dims.insert(d, joined)
    return f"jnp.concatenate([{w}, {other}], {d})", w.join(other, dims), "joined"


@move(lambda w: w.ndim < 4 and not w.traits & {"joined", *SPECIAL})
def stack(write, w):
    other = write.pick([w, *like(write, w)])
    d = write.number(0, w.ndim)
    dims = merged(w, other)
    dims.insert(d, [Atom((), 2)])
    return f"jnp.stack([{w}, {other}], {d})", w.join(other, dims), "joined"


@move(lambda w: cuttable(w) and not w.traits & SPECIAL)
def pad(write, w):
    d = write.pick(cuttable(w))
    around = [(write.number(0, 2), write.number(0, 2)) if e == d else (0, 0) for e in range(w.ndim)]
    return f"jnp.pad({w}, {around})", replaced(w, d, w.shape[d] + sum(around[d]))


@move(lambda w: normed(w) and not w.traits & {"tilted", "vmapped", *SPECIAL})
def norm(write, w):
    """Weight normalization or standardization: along all dimensions but one."""
    axes = write.pick(normed(w))
    forms = [
        "{w} / jnp.sqrt(1.0 + ({w} * {w}).sum({axes}, keepdims=True))",
        "{w} / (1.0 + jnp.square({w}).sum({axes}, keepdims=True))",
        "{w} * lax.rsqrt(1.0 + ({w} ** 2).mean({axes}, keepdims=True))",
        "{w} - {w}.mean({axes}, keepdims=True)",
    ]
    form = write.pick(forms)
    return form.format(w=w, axes=axes), w.dims, "scaled", "driven", "shifted"


@move(lambda w: w.ndim < 4 and "driven" not in w.traits)
def chosen(write, w):
    """A move or another, as a number says."""
    inner, dims, *traits = write.move(w, but={"called", "mapped", "chosen", "number", "vector", "norm", *TOGETHER})
    v = write.input("v", ())
    return f"lax.cond({v} > 0, lambda {w}: 2.0 * ({inner}), lambda {w}: 3.0 * ({inner}), {w})", dims, *traits


def normed(w: Weight) -> list[tuple[int, ...]]:
    """Dimensions to sum over, so that one axis at most is left."""
    kept = [d for d, group in enumerate(w.dims) if len(group) < 2]
    return [tuple(e for e in range(w.ndim) if e != d) for d in kept if w.ndim > 1]


def cuttable(w: Weight) -> list[int]:
    return [d for d, group in enumerate(w.dims) if len(group) == 1 and group[0].size > 2]


def replaced(w: Weight, d: int, size: int, rooted: bool = True) -> list[Any]:
    return [*w.dims[:d], (Atom(w.dims[d][0].roots if rooted else (), size),), *w.dims[d + 1 :]]


def scales(w: Weight) -> list[tuple[int, ...]]:
    """The dimensions that a scale can have: some, with a size above 1, and not all."""
    dims = [d for d in range(w.ndim) if w.dims[d]]
    return [some for n in (1, 2) for some in itertools.combinations(dims, n) if n < len(dims)]


# Consumers: (writer, weight) -> the expression of an activation, and which leaf axes it sums over and which it has.


def consumer(when: Callable[[Weight], Any]) -> Any:
    return move(when, CONSUMERS)


def plays(w: Weight) -> list[str]:
    """For each dimension a part: (s)ummed, (f)ree or (b)atch; all that have something summed and something free."""

    def fits(parts: tuple[str, ...]) -> bool:
        summed, free = sides(w, "".join(parts))
        return all({root for root in side if root[0] == leaf.name} for side in (summed, free) for leaf in w.leaves)

    return ["".join(parts) for parts in itertools.product("sfb", repeat=w.ndim) if fits(parts)]


def sides(w: Weight, parts: str) -> tuple[set[Any], set[Any]]:
    summed, free = (roots(g for g, p in zip(w.dims, parts, strict=True) if p == part) for part in "sf")
    return summed, free - summed


@consumer(plays)
def einsum(write, w):
    """Every dimension summed, free or a batch, in any order, on either side."""
    parts = write.pick(plays(w))
    names = "abcdefg"[: w.ndim]
    summed, free, batch = ("".join(n for n, part in zip(names, parts, strict=True) if part == p) for p in "sfb")
    spare = "yz"[: write.number(1, 2)]
    x, out = (write.shuffled(n) for n in (spare + batch + summed, spare + batch + free))
    sizes = {**dict(zip(names, w.shape, strict=True)), **dict(zip("yz", FREE, strict=True))}
    activation = f"h * {write.input('x', tuple(sizes[n] for n in x))}"
    product = f'{x},{names}->{out}", {activation}, {w}' if write.flip() else f'{names},{x}->{out}", {w}, {activation}'
    return f'jnp.einsum("{product})', *sides(w, parts)


@consumer(plays)
def dot_general(write, w):
    parts = write.pick(plays(w))
    order = write.shuffled([d for d in range(w.ndim) if parts[d] != "f"])
    summed, batch = (tuple(d for d in order if parts[d] == p) for p in "sb")
    own = write.shuffled([*batch, *summed, -1])  # which dimension of the weight each of the activation meets
    x = write.input("x", tuple(FREE[0] if d < 0 else w.shape[d] for d in own))
    x_summed, x_batch = (tuple(own.index(d) for d in group) for group in (summed, batch))
    last = write.pick(["", ", precision='highest'", ", preferred_element_type=h.dtype"])
    if write.flip():
        numbers, operands = ((summed, x_summed), (batch, x_batch)), f"{w}, h * {x}"
    else:
        numbers, operands = ((x_summed, summed), (x_batch, batch)), f"h * {x}, {w}"
    return f"lax.dot_general({operands}, {numbers}{last})", *sides(w, parts)


@consumer(lambda w: w.ndim > 1 and "b" * (w.ndim - 2) + "sf" in plays(w))
def matmul(write, w):
    """As `@` has it: stacks of matrices, or one matrix of inputs for them all."""
    lead, part = write.pick([((), "f"), (w.shape[:-2], "b")])
    return f"(h * {write.input('x', (*lead, FREE[0], w.shape[-2]))}) @ {w}", *sides(w, part * (w.ndim - 2) + "sf")


def _conv_plays(w: Weight) -> list[tuple[int, int]]:
    """Which dimension is the kernel's output, and which its input."""
    if (
        w.traits & {"driven", "joined", "tilted", "shifted"}
        or w.ndim not in (3, 4)
        or not all(atom.roots for atom in w.atoms)
    ):
        return []
    fitting = plays(w)
    kernels = {o: "".join("f" if d == o else "s" for d in range(w.ndim)) for o in range(w.ndim)}
    pairs = [(o, i) for i, o in itertools.permutations(range(w.ndim), 2) if kernels[o] in fitting]
    return [(o, i) for o, i in pairs if _one_window([g for d, g in enumerate(w.dims) if d not in (o, i)], w)]


def _one_window(window: Any, w: Weight) -> bool:
    """Whether A and B do not both have axes of the window: then the kernel would be formed."""
    for leaf in w.leaves:
        summed, free = leaf.sides or ({*range(len(leaf.shape))}, set())
        found = {d for _, d in roots(window, leaf)}
        if not (found <= summed or found <= free):
            return False
    return True


@consumer(_conv_plays)
def conv(write, w):
    """Any layout, stride, padding and dilation of input and kernel."""
    o, i = write.pick(_conv_plays(w))
    space = "HW"[: w.ndim - 2]
    places = iter(space)
    kernel = "".join("O" if d == o else "I" if d == i else next(places) for d in range(w.ndim))
    x, out = write.shuffled("N" + space + "C"), write.shuffled("N" + space + "C")

    def each(choices):
        return tuple(write.pick(choices) for _ in space)

    padding = write.pick(['"SAME"', '"VALID"', str(tuple((write.number(0, 2), write.number(0, 2)) for _ in space))])
    dilation = each([1, 2]) if write.flip() and "(" in padding else None
    spread = each([1, 2])
    sizes = {"N": FREE[1], "C": w.shape[i]}
    sizes |= {s: (w.shape[kernel.index(s)] - 1) * d + 3 for s, d in zip(space, spread, strict=True)}
    layout = f'dimension_numbers=("{x}", "{kernel}", "{out}")'
    groups = write.pick(
        [n for n in range(1, w.shape[o] + 1) if w.shape[o] % n == 0 and (n == 1 or len(w.dims[o]) == 1)]
    )
    kind = write.pick(["feature", "batch"]) if groups > 1 else ""
    sizes["C" if kind == "feature" else "N"] *= groups
    layout += f", {kind}_group_count={groups}" if kind else ""
    activation = write.input("x", tuple(sizes[n] for n in x))
    call = f"lax.conv_general_dilated(h * {activation}, {w}, {each([1, 2])}, {padding}, {dilation}, {spread}, {layout})"
    return call, roots(w.without(o).dims), roots([w.dims[o]])


@consumer(
    lambda w: (
        "vmapped" not in w.traits
        and w.ndim == len(w.atoms) == 3
        and "bsf" in plays(w)
        and all(atom.roots for atom in w.atoms)
    )
)
def ragged(write, w):
    """Rows sorted by expert."""
    first = write.number(0, FREE[0])
    counts = [first, *[0] * (w.shape[0] - 2), FREE[0] - first]
    x = write.input("x", (FREE[0], w.shape[1]))
    return f"lax.ragged_dot(h * {x}, {w}, jnp.array({counts}, jnp.int32))", *sides(w, "bsf")


@consumer(
    lambda w: (
        not w.traits & {"vmapped", "shifted"} and len(w.atoms) == 2 == w.ndim and "sf" in plays(w) and "fs" in plays(w)
    )
)
def embedding(write, w):
    d = write.number(0, 1)
    n = w.shape[d]
    ids = write.pick([f"{3} * jnp.arange({FREE[0]}) % {n}", f"jnp.arange(2 * {FREE[0]}).reshape(2, -1) % {n}"])
    forms = [f"{w}[{':, ' * d}{ids}]", f'jnp.take({w}, {ids}, {d}, mode="clip")']
    if "driven" not in w.traits:
        beyond = f"jnp.arange({FREE[0]}) + {n - 3}"
        forms += [f"jnp.take({w}, {ids}, {d})", f'{w}.at[{":, " * d}{beyond}].get(mode="fill", fill_value=0.5)']
    return write.pick(forms), roots([w.dims[d]]), roots([w.dims[1 - d]])


# Blocks of control flow: (writer, scope, depth) write a function of h, and call it.

BLOCKS: dict[str, Callable[..., bool]] = {}


def block(function: Any) -> Any:
    BLOCKS[function.__name__] = function
    return function


@block
def carry(write, scope, depth):
    """A loop that carries a weight and hands it on as it is."""
    c = dataclasses.replace(scope[0], name=write.name("c"))
    body, _ = write.nested([c, *scope[1:]], depth)
    form = write.pick(
        [
            (f"(h, {c}), _", "h, {u} = lax.scan({f}, (h, {w}), length=2)[0]", f"(h, {c}), None"),
            (f"_, h, {c}", "h, {u} = lax.fori_loop(0, 2, lambda i, h_c: {f}(i, *h_c), (h, {w}))", f"h, {c}"),
            (
                f"i, h, {c}",
                "_, h, {u} = lax.while_loop(lambda c: c[0] < 2, lambda c: {f}(*c), (0, h, {w}))",
                f"i + 1, h, {c}",
            ),
        ]
    )
    signature, call, result = form
    first = []
    if signature.startswith("("):
        signature, first = "h_c, _", [f"h, {c} = h_c"]
    f, u = write.define(signature, [*first, *body, f"return {result}"]), dataclasses.replace(c, name=write.name("u"))
    write.line(call.format(f=f, w=scope[0], u=u))
    return u


def _called_as(*forms: str) -> Callable[..., None]:
    def write_block(write, scope, depth):
        form = write.pick(forms)
        moving = "derivative" in form or "jvp" in form
        body, names = write.nested([w.having("moving") for w in scope] if moving else scope, depth)
        passed = ", ".join(["h", *(names if "own_derivative" in form else write.some_of(names))])
        name = write.define(passed, [*body, "return h"])
        v = write.input("v", ()) if "{v}" in form else ""
        write.line(form.format(f=name, passed=passed, v=v))

    return write_block


BLOCKS["call"] = _called_as(
    "h = jax.jit({f})({passed})",
    "h = jax.checkpoint({f})({passed})",
    "h = jax.checkpoint({f}, policy=jax.checkpoint_policies.dots_saveable)({passed})",
    "h = own_derivative({f})({passed})",
    "h = lax.cond({v} > 0, {f}, lambda h, *_: h / 2, {passed})",
    "h = lax.switch(jnp.argmax({v} + jnp.zeros(3)), [{f}, {f}, lambda h, *_: -h], {passed})",
    "h = jax.jvp({f}, ({passed},), ({passed},))[1]",
)


@block
def loop(write, scope, depth):
    """The same weights in each iteration."""
    body, names = write.nested(scope, depth)
    form = write.pick(
        [
            ("h, _", "h = lax.scan({f}, h, length=2)[0]", "h, None"),
            ("_, h", "h = lax.fori_loop(0, 2, {f}, h)", "h"),
            ("h, _", "h = lax.scan(jax.checkpoint({f}), h, jnp.arange(2), unroll=2)[0]", "h, None"),
            ("i_h", "h = lax.while_loop(lambda i_h: i_h[0] < 2, {f}, (0, h))[1]", "i_h[0] + 1, h"),
        ]
    )
    signature, call, result = form
    first = ["h = i_h[1]"] if signature == "i_h" else []
    write.line(call.format(f=write.define(signature, [*first, *body, f"return {result}"])))


@block
def layers(write, scope, depth):
    """A layer of a stack in each iteration."""
    stacked = [w for w in scope if w.ndim > 2 and len(w.dims[0]) == 1 and w.without(0).has_sides()]
    if not stacked:
        return _called_as("h = jax.jit({f})({passed})")(write, scope, depth)
    w = write.pick(stacked)
    row, n = dataclasses.replace(w.without(0), name=write.name("u")), w.shape[0]
    form = write.pick(
        [
            (f"h, {row}", f"h = lax.scan({{f}}, h, {w})[0]", "h, None"),
            (f"h, {row}", f"h = lax.scan(jax.checkpoint({{f}}), h, {w}, reverse=True)[0]", "h, None"),
            (f"h, {row}", f"h, same = lax.scan({{f}}, h, {w}, unroll=2)", f"h, {row}"),
            ("i, h", f"h = lax.fori_loop(0, {n}, {{f}}, h)", "h"),
            (f"h, {row}", f"h = jax.vmap({{f}})(h + jnp.arange({n}.0), {w}).mean()", "h"),
            (f"h, {row}", f"h = sum(({{f}}(h, row) for row in {w}), 0.0) / {n}", "h"),
        ]
    )
    signature, call, result = form
    inside = [row, *(other for other in scope if other != w)]
    body, _ = write.nested([w.having("vmapped") for w in inside] if "vmap" in call else inside, depth)
    first = [f"{row} = {w}[i]"] if "fori" in call else []
    write.line(call.format(f=write.define(signature, [*first, *body, f"return {result}"])))


class Writer:
    """What the registered functions draw from and write to."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.lines: list[str] = []
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.counts: dict[str, int] = {}
        self.tolerance = 1e-10
        self.moves: list[str] = []
        self.scope: list[Weight] = []

    def pick(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def flip(self) -> bool:
        return self.draw(st.booleans())

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def some(self, choices: Any) -> tuple[Any, ...]:
        """At least one of them."""
        choices = list(choices)
        return tuple(sorted(self.draw(st.sets(st.sampled_from(choices), min_size=1))))

    def some_of(self, choices: Any) -> list[Any]:
        return [choice for choice in choices if self.flip()]

    def shuffled(self, choices: Any) -> Any:
        order = self.draw(st.permutations(list(choices)))
        return "".join(order) if isinstance(choices, str) else order

    def parts(self, atom: Atom) -> list[Atom]:
        """An axis, or two that it is made of."""
        majors = [n for n in range(2, atom.size) if atom.size % n == 0]
        if not majors or not self.flip():
            return [atom]
        major = self.pick(majors)
        return [atom._replace(size=major), atom._replace(size=atom.size // major)]

    def name(self, prefix: str) -> str:
        self.counts[prefix] = self.counts.get(prefix, -1) + 1
        return f"{prefix}{self.counts[prefix]}"

    def input(self, prefix: str, shape: tuple[int, ...]) -> str:
        name = self.name(prefix)
        self.inputs[name] = shape
        return name

    def along(self, w: Weight, dims: tuple[int, ...]) -> str:
        """An input along a dimension of a weight; along several an array that has no gradient, for it is large."""
        shape = tuple(n if d in dims else 1 for d, n in enumerate(w.shape)) if dims else ()
        while shape[:1] == (1,) and self.flip():  # NumPy's broadcasting adds leading dimensions
            shape = shape[1:]
        if len(dims) < 2:
            return self.input("v", shape)
        return f"jnp.cos(jnp.arange({math.prod(shape)}.0)).reshape({shape})"

    def line(self, text: str) -> None:
        self.lines.append(text)

    def define(self, signature: str, body: list[str]) -> str:
        name = self.name("f")
        self.lines += [f"def {name}({signature}):", *(f"    {text}" for text in body)]
        return name

    def move(self, w: Weight, but: Any = ()) -> Any:
        """One move of a weight: its expression, and the dims and traits that the weight then has."""
        name = self.pick([name for name, move in MOVES.items() if name not in but and move.when(w)])
        self.moves.append(name)
        return MOVES[name].draw(self, w)

    def moved(self, w: Weight) -> Weight:
        expression, made, *traits = self.move(w)
        made = made if isinstance(made, Weight) else dataclasses.replace(w, dims=tuple(map(tuple, made)))
        new = dataclasses.replace(made, name=self.name("u"), traits=made.traits | {*traits})
        self.line(f"{new} = {expression}")
        return new

    def consumed(self, w: Weight) -> bool:
        """The activation that a weight makes joins h; whether there is any."""
        fitting = [name for name, consumer in CONSUMERS.items() if consumer.when(w)]
        if not fitting:
            return False
        name = self.pick(fitting)
        self.moves.append(name)
        expression, *found = CONSUMERS[name].draw(self, w)
        for leaf in w.leaves:
            summed, free = ({d for name, d in side if name == leaf.name} for side in found)
            leaf.sides = leaf.sides or (summed, free - summed)
        form = self.pick(["{}", "jnp.tanh({})", "jax.nn.silu({})", "jax.nn.softplus({})"])
        self.line(f"h = h + readout({form.format(expression)})")
        return True

    def nested(self, scope: list[Weight], depth: int) -> tuple[list[str], list[str]]:
        """The lines of a function's body, and the names in it that are not its own, for it to be passed."""
        outer, self.lines = self.lines, []
        self.statements(scope, depth + 1)
        body, self.lines = self.lines, outer
        known = {*self.inputs, *(w.name for w in scope)}
        return body, sorted(known & set(re.findall(r"\b[wuvxc]\d+\b", "\n".join(body))))

    def statements(self, scope: list[Weight], depth: int = 0) -> None:
        """Uses of weights, each after a few moves, and blocks of control flow."""
        outer, self.scope = self.scope, scope
        scope, used = [*scope], False
        for _ in range(3 - depth):
            kind = self.pick(["use", "stop", "move", "block"] if depth < 2 else ["use", "stop"])
            if kind == "stop":
                break
            w = self.pick(scope)
            for _ in range(3):
                if not self.flip():
                    break
                w = self.moved(w)
            if kind == "use":
                used |= self.consumed(w)
            elif kind == "move":
                scope = [w, *scope] if w not in scope else scope
            else:
                name = self.pick(BLOCKS)
                self.moves.append(name)
                new = BLOCKS[name](self, [w, *(other for other in scope if other != w)], depth)
                scope, used = [*([new] if new else []), *scope], True
        if not used:
            self.consumed(scope[0]) or self.consumed(scope[-1])
        self.scope = outer


@st.composite
def programs(draw) -> Program:
    write, leaves = Writer(draw), []
    for i in range(draw(st.integers(1, 3))):
        leaves.append(Leaf(f"w{i}", shape(draw, i, leaves)))
    scope = [Weight(x.name, (x,), tuple((Atom(((x.name, d),), n),) for d, n in enumerate(x.shape))) for x in leaves]
    write.line("h = jnp.ones(())")
    write.statements(scope)
    for w in scope:
        if w.leaves[0].sides is None:
            write.consumed(w)
    arguments = ", ".join([*(x.name for x in leaves), *write.inputs])
    body = "".join(f"    {line}\n" for line in [*write.lines, "return h"])
    under, over = transforms(draw, body, {*write.moves})
    return Program(
        source=f"def program({arguments}):\n{body}",
        leaves={x.name: x.shape for x in leaves},
        inputs=write.inputs,
        rank=draw(st.integers(1, 3)),
        under=under,
        over=over,
        tolerance=write.tolerance,
        sides={x.name: x.sides for x in leaves},
        moves=(*write.moves, *under, *over),
    )


def shape(draw, i, others):
    """The shape of an earlier leaf, perhaps with another first dimension, or one from a leaf's own choice of sizes.

    No two products of at least two of these sizes are the same, so that no part of one leaf is as large as another.
    """
    if others and draw(st.booleans()):
        old = draw(st.sampled_from(others)).shape
        return (draw(st.sampled_from([old[0], 2 * old[0]])), *old[1:])
    sizes = ([6, 5, 4, 3], [9, 3, 12], [10, 7, 8])[i]
    return tuple(draw(st.lists(st.sampled_from(sizes), min_size=2, max_size=len(sizes), unique=True)))


def transforms(draw, body, moves):
    """What is done to the whole function, under and over lift, where it can be."""

    def some(unfit):
        if not draw(st.booleans()):
            return ()
        fitting = [name for name in TRANSFORMS if name not in unfit]
        return tuple(draw(st.lists(st.sampled_from(fitting), max_size=2, unique=True)))

    unfit = {"grad"} if "while_loop" in body else set()
    unfit |= set() if "x0" in body else {"grad", "scan_data", "vmap_data", "cond"}
    unfit |= {"vmap_data", "vmap_adapters"} if "ragged" in body else set()
    inside = {*unfit, "vmap_adapters"}
    branches, scaled = re.search("lax.(cond|switch)", body), {"norm", "number", "vector", "total"} & moves
    inside |= {"grad"} if re.search(r"barrier\(\(h|cos\(h\)", body) or (branches and scaled) else set()
    inside |= {"vmap_data"} if branches or re.search("dynamic_slice|where|select_n|keepdims", body) else set()
    under = some(inside)
    if "cond" in under:
        under = tuple(name for name in under if name != "vmap_data")
    return under, some(unfit)


def _grad(f):
    """A number that the gradient by all activations goes into; not by scales, whose gradient takes a weight's."""

    def slope(weights, inputs):
        activations = {name: x for name, x in inputs.items() if name.startswith("x")}
        gradients = jax.grad(lambda xs: f(weights, {**inputs, **xs}))(activations)
        return sum(map(readout, gradients.values()), 0.0)

    return slope


# What is done to a whole function of (weights, inputs), before or after it is lifted. Those of data stack the inputs.
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan_data": lambda f: lambda weights, inputs: lax.scan(lambda h, x: (h + f(weights, x), None), 0.0, inputs)[0],
    "vmap_data": lambda f: lambda weights, inputs: jax.vmap(f, (None, 0))(weights, inputs).sum(),
    "cond": lambda f: lambda weights, inputs: lax.cond(inputs["x0"].sum() > 0, f, lambda *_: 0.5, weights, inputs),
    "grad": _grad,
    "vmap_adapters": lambda f: lambda weights, inputs: jax.vmap(f, (0, None))(weights, inputs).sum(),
}
