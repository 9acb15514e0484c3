"""The interpreter: a loop over a jaxpr's equations, with Factored values flowing through it.

An equation that no Factored value touches is evaluated as it stands; one that a Factored value touches goes to the rule
of its primitive (see `rules/`); and where there is no rule, or the rule cannot keep the factors apart, the whole matrix
would have to be formed, which is an error unless it is allowed. Nothing is formed silently.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import compat
from lora_jax.axes import Axis
from lora_jax.explicit import sharded_alike, under_automatic_axes
from lora_jax.factored import Factored, is_factored
from lora_jax.materialize import cost_of, materialize, total
from lora_jax.order import Cost
from lora_jax.strategy import Plan
from lora_jax.uses import Use, dimensions

Rule = Callable[..., Any]

RULES: dict[str, Rule] = {}
TYPED: set[str] = set()


class MaterializeError(TypeError):
    """A primitive needs the whole matrix W + ΔW, which `lift` forms only where it is allowed to."""


def rule(*primitives: str, typed: bool = False) -> Callable[[Rule], Rule]:
    """Registers `rule(interpreter, eqn, *operands)` for these primitives.

    At least one operand is Factored. The rule returns the equation's result (a list of them where the primitive has
    several), or NotImplemented where the factors cannot be kept apart. It sees no explicit mesh axes (see `explicit`),
    unless it is `typed`: then arrays keep their types, as the user's body that it interprets expects.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        TYPED.update(primitives if typed else ())
        return function

    return register


@dataclasses.dataclass
class Interpreter:
    """What the rules share during one interpretation.

    Attributes:
      allow: Whether a whole matrix may be formed.
      plan: How products with adapted weights are made.
      uses: What has consumed which leaf so far, as pairs of path and use.
      names: The real paths of leaves that have other names here, in the body of a call.
      line: The user's line that called the function being interpreted, for equations that know none.
      around: The equations of loops and branches within it that are being interpreted, the innermost last.
      times: How often that function is called, by the loops around it.
      bodies: What `call` has traced so far.
      spread: Arrays that were broadcast, by identity, with what they were before.
    """

    allow: bool
    plan: Plan = Plan()
    uses: list[tuple[str, Use]] = dataclasses.field(default_factory=list)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    line: str = ""
    around: tuple[Any, ...] = ()
    times: int = 1
    bodies: dict[Any, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    spread: dict[int, Any] = dataclasses.field(default_factory=dict)

    def evaluate(self, jaxpr: Any, *operands: Any) -> list[Any]:
        """The results of a jaxpr, open or closed, on operands of which any may be Factored; so may the results."""
        jaxpr, consts = compat.parts(jaxpr)
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *operands), strict=True))
        outer, self.spread = self.spread, {**self.spread}

        def read(atom: Any) -> Any:
            return atom.val if compat.is_literal(atom) else env[atom]

        for eqn, dead in zip(jaxpr.eqns, compat.last_uses(jaxpr), strict=True):
            with compat.context(eqn):
                results = self._equation(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
            for variable in dead:
                self.spread.pop(id(env.pop(variable)), None)
        self.spread = outer
        return [read(v) for v in jaxpr.outvars]

    def arrays(self, eqn: Any, jaxpr: Any, *operands: Any) -> list[Any]:
        """The results of a jaxpr as arrays, as branches and loop bodies must return them."""
        return [self.form(y, eqn) if is_factored(y) else y for y in self.evaluate(jaxpr, *operands)]

    def _equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
        if not any(map(is_factored, operands)):
            results = compat.bind(eqn, operands)
            if eqn.primitive.name == "broadcast_in_dim":
                self.spread[id(results[0])] = results[0], eqn.params["broadcast_dimensions"], operands[0]
            return results
        outer, self.around = self.around, (*self.around, eqn)
        try:
            results = self._ruled(eqn, operands)
        finally:
            self.around = outer
        if results is not NotImplemented:
            return results
        return compat.bind(eqn, [self.form(x, eqn) if is_factored(x) else x for x in operands])

    def _ruled(self, eqn: Any, operands: list[Any]) -> Any:
        """What the rule of an equation makes of it, as a list; under automatic axes, if any are explicit."""

        def ruled(eqn: Any, operands: list[Any]) -> Any:
            rule = RULES.get(eqn.primitive.name)
            out = rule(self, eqn, *operands) if rule else NotImplemented
            if out is NotImplemented:
                return out
            before = next(filter(is_factored, operands))
            results = out if eqn.primitive.multiple_results else [out]
            return [self.settled(y, before, eqn) if is_factored(y) else y for y in results]

        if eqn.primitive.name in TYPED or compat.explicit_mesh(operands) is None:
            return ruled(eqn, operands)
        spread = {i: self.spread[id(x)] for i, x in enumerate(operands) if id(x) in self.spread}

        def automatic(operands: list[Any], small: dict[int, Any]) -> Any:
            self.spread |= {id(operands[i]): (operands[i], spread[i][1], x) for i, x in small.items()}
            return ruled(compat.without_shardings(eqn), operands)

        types = [v.aval.sharding for v in eqn.outvars]
        return under_automatic_axes(automatic, operands, {i: x for i, (*_, x) in spread.items()}, out=types)

    def call(self, eqn: Any, transform: Callable[[Any], Any], settings: Any, *operands: Any) -> list[Any]:
        """The results of `transform` of an equation's body, which is traced once for all leaves of the same form.

        Within, leaves go by their number, and what consumes them is noted for each call under its own paths.
        """
        real = dict.fromkeys(path for x in operands if is_factored(x) for path in x.paths)
        numbers = {path: f"#{i}" for i, path in enumerate(real)}
        back = {number: path for path, number in numbers.items()}
        operands = tuple(x.renamed(numbers) if is_factored(x) else x for x in operands)
        jaxpr = eqn.params["jaxpr"]
        roots = tuple(axis.roots for x in operands if is_factored(x) for axis in x.axes)
        key = (id(jaxpr), eqn.primitive.name, settings, jax.tree.structure(operands), roots)
        if key not in self.bodies:
            inner = Interpreter(self.allow, self.plan, bodies=self.bodies)
            self.bodies[key] = inner, transform(functools.partial(inner._body, jaxpr)), jaxpr  # keeps the id taken
        inner, function, _ = self.bodies[key]
        inner.line = self.where(eqn)
        inner.names = {number: self.names.get(path, path) for number, path in back.items()}
        results = function(*operands)
        for number, use in inner.uses:
            paths = tuple(back[name] for name in use.paths)
            use = dataclasses.replace(use, where=use.where or self._where(eqn), paths=paths)
            self._note(back[number], use)
        return [y.renamed(back) if is_factored(y) else y for y in results]

    def _body(self, jaxpr: Any, *operands: Any) -> list[Any]:
        self.uses.clear()
        return self.evaluate(jaxpr, *operands)

    def where(self, eqn: Any) -> str:
        """The user's line behind an equation."""
        return self._where(eqn) or self.line or "an unknown line"

    def _where(self, eqn: Any) -> str:
        return next(filter(None, map(compat.where, (eqn, *reversed(self.around)))), "")

    def repeated(self, times: int, body: Callable[..., Any]) -> Callable[..., Any]:
        """The body of a loop: what it uses is used in each round, and noted once even if JAX traces it twice."""
        start = len(self.uses)

        def traced(*args: Any) -> Any:
            del self.uses[start:]
            outer, self.times = self.times, self.times * times
            try:
                return body(*args)
            finally:
                self.times = outer

        return traced

    def record(
        self,
        value: Factored,
        eqn: Any,
        kind: str,
        in_axes: Sequence[Axis] = (),
        out_axes: Sequence[Axis] = (),
        cost: Cost | None = None,
        window: Sequence[Axis] = (),
    ) -> None:
        """Notes that an equation consumes a value; the leaf's dimensions in neither group are batch axes."""
        for path in value.paths:
            sides = dimensions(in_axes, path), dimensions(out_axes, path)
            use = Use(kind, *sides, eqn.primitive.name, self._where(eqn), 1, cost or Cost(), value.paths)
            self._note(path, dataclasses.replace(use, window_axes=dimensions(window, path)))

    def hand_on(self, values: Iterable[Factored]) -> None:
        """Notes what the function returns factored: rows of a leaf without factors are tokens, as far as is known."""
        for value in values:
            for path in value.paths if value.picked and not value.adapted else ():
                sides = dimensions(value.picked, path), dimensions(value.axes, path)
                self._note(path, Use("embedding", *sides, "gather", "", paths=value.paths))

    def _note(self, path: str, use: Use) -> None:
        n = self.times
        self.uses.append((path, dataclasses.replace(use, times=n * use.times, cost=use.cost.times(n))))

    def narrow(self, array: Any) -> jax.Array:
        """An array with dimensions of size 1 where it is the same all along, as far as is known."""
        if id(array) not in self.spread:
            return jnp.asarray(array)
        _, positions, small = self.spread[id(array)]  # which holds the array too, so that no other has its identity
        sizes = dict(zip(positions, jnp.shape(small), strict=True))
        return jnp.reshape(small, [sizes.get(d, 1) for d in range(array.ndim)])

    def settled(self, value: Factored, before: Factored, eqn: Any) -> Factored | jax.Array:
        """A value, or the array that it is once an equation took a vector out of a matrix: a row that was looked up."""
        if before.is_vector or not value.is_vector:
            return value
        if eqn.primitive.name in ("gather", "dynamic_slice"):
            self.record(value, eqn, "embedding", [axis for axis in before.axes if axis not in value.axes], value.axes)
        else:
            self.record(value, eqn, "vector")
        return sharded_alike(total, value)

    def form(self, value: Factored, eqn: Any) -> jax.Array:
        """The whole matrix, for an equation that cannot do without it; or a vector, which is no more than its factors.

        Raises:
          MaterializeError: A matrix is not allowed to be formed.
        """
        if value.picked and not value.adapted:
            self.record(value, eqn, "embedding", value.picked, value.axes)
        else:
            self.record(value, eqn, "vector" if value.is_vector else "other", cost=cost_of(value))
        if not self.allow and not value.is_vector:
            mib = value.size * np.dtype(value.dtype).itemsize / 2**20
            name = value.renamed(self.names).name
            raise MaterializeError(
                f"{name} {value.shape} reaches {eqn.primitive.name!r} at {self.where(eqn)}, which needs the whole "
                f'matrix W + ΔW ({mib:.2g} MiB). Pass materialize="allow" to lift() if that is what you want, or leave '
                "this path out of the rules."
            )
        return materialize(value)
