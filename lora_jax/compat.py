"""The only file that knows JAX's versions and internals: JAX 0.10 to 0.12."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax._src import source_info_util
from jax._src.interpreters import partial_eval
from jax._src.lax import parallel
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

_HERE = os.path.dirname(os.path.abspath(__file__))

# Equations are the same in the supported versions, but for what this file absorbs. JAX 0.12 has one class
# for open and closed jaxprs, where 0.10 has `ClosedJaxpr` with a `.jaxpr` inside; and `scan` counts its operands in the
# tree `ft_in`, where 0.10 has `num_consts` and `num_carry`. The functions for shard_map have changed names, too.


def trace(fun: Callable[..., Any], *args: Any) -> Any:
    """The closed jaxpr of `fun`, which takes and returns flat lists of arrays."""
    return jax.make_jaxpr(fun)(*args)


def parts(closed: Any) -> tuple[Any, Sequence[Any]]:
    """An open jaxpr and its constants, from an open jaxpr, a closed one, or the class that is both."""
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def keeps_bfloat16() -> bool:
    """Whether XLA can compile bfloat16 for the CPU as it is: JAX 0.10 has no product of it, and converts to float32."""
    return jax.__version_info__ >= (0, 12)


def is_literal(atom: Any) -> bool:
    """Whether an equation's operand is a constant written in place."""
    return isinstance(atom, jax.extend.core.Literal)


def last_uses(jaxpr: Any) -> list[list[Any]]:
    """For each equation of an open jaxpr, the variables that nothing after it reads."""
    seen = {v for v in jaxpr.outvars if not is_literal(v)}
    dead: list[list[Any]] = []
    for eqn in reversed(jaxpr.eqns):
        variables = {v for v in (*eqn.invars, *eqn.outvars) if not is_literal(v)} - seen
        dead.append(list(variables))
        seen |= variables
    return dead[::-1]


def with_results(closed: Any, wanted: list[bool]) -> Any:
    """A closed jaxpr of the same arguments, with those results alone that are wanted, and what they need."""
    jaxpr, consts = parts(closed)
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, wanted, instantiate=True)
    return jax.extend.core.ClosedJaxpr(jaxpr, consts)


def unread(closed: Any) -> list[bool]:
    """For each argument of a closed jaxpr, whether no result depends on it."""
    jaxpr, _ = parts(closed)
    _, read = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return [not yes for yes in read]


def placeholders(jaxpr: Any) -> list[bool]:
    """For each result of a jaxpr, whether it is an array of no value, as derivatives of `cond` have them."""
    jaxpr, _ = parts(jaxpr)
    empty: set[Any] = set()
    for eqn in jaxpr.eqns:
        copied = eqn.primitive.name == "broadcast_in_dim" and not is_literal(eqn.invars[0]) and eqn.invars[0] in empty
        if copied or eqn.primitive.name in ("empty", "empty2"):
            empty.update(eqn.outvars)
    return [not is_literal(v) and v in empty for v in jaxpr.outvars]


def forwarded(jaxpr: Any) -> list[int | None]:
    """For each result of a jaxpr, the number of the argument that it is, unchanged; None where it is none."""
    jaxpr, _ = parts(jaxpr)
    source = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("copy", "copy_p", "optimization_barrier"):
            same: Sequence[int | None] = range(len(eqn.invars))
        elif eqn.primitive.name in ("jit", "pjit", "remat", "remat2", "checkpoint"):
            same = forwarded(eqn.params["jaxpr"])
        else:
            continue
        for out, i in zip(eqn.outvars, same, strict=True):
            if i is not None and not is_literal(eqn.invars[i]) and eqn.invars[i] in source:
                source[out] = source[eqn.invars[i]]
    return [None if is_literal(v) else source.get(v) for v in jaxpr.outvars]


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Evaluate one equation as it stands, inside whatever trace is current; its results as a list."""
    out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def context(eqn: Any) -> Iterator[None]:
    """New equations get the old one's names, its line in the user's source, and the settings it was traced under."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def where(eqn: Any) -> str:
    """The user's line behind an equation, e.g. `model.py:41 (attention)`: the innermost one outside all libraries.

    Empty inside a function that a library jitted: JAX keeps no line of its caller there.
    """
    frames = [f for f in source_info_util.user_frames(eqn.source_info.traceback) if not _is_ours(f.file_name)]
    if not frames:
        return ""
    frame = next((f for f in frames if "site-packages" not in f.file_name), frames[0])
    function = frame.function_name.rsplit("<locals>.", 1)[-1]
    return f"{_name_of(frame.file_name)}:{frame.start_line} ({function})"


def _name_of(file_name: str) -> str:
    """A file's name, or that of a notebook's cell, such as In[3]."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    cell = getattr(getattr(shell, "compile", None), "format_code_name", lambda _: None)(file_name)
    return cell[1] if cell else os.path.basename(file_name)


def _is_ours(file_name: str) -> bool:
    folder = os.path.dirname(file_name)
    return folder == _HERE or folder == os.path.join(_HERE, "rules")


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan equation are constants, and how many are carried."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def jvp_jaxpr(eqn: Any, n: int) -> tuple[Any, list[bool]]:
    """The rule of a `custom_jvp_call`, a jaxpr of `n` primals and `n` tangents, and which tangents out are zero."""
    jaxpr, consts, out_zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*[False] * n)
    return jax.extend.core.ClosedJaxpr(jaxpr, consts), out_zeros


def is_zero(tangent: Any) -> bool:
    """Whether a tangent is known to be zero."""
    return isinstance(tangent, SymbolicZero)


def instantiate(tangent: Any) -> Any:
    """A tangent as an array."""
    return jnp.zeros(tangent.shape, tangent.dtype) if is_zero(tangent) else tangent


def varying(array: Any) -> frozenset[str]:
    """The mesh axes that an array varies over, inside shard_map."""
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def may_vary(array: Any, names: Any) -> bool:
    """Whether an array may differ between the devices along these mesh axes, as far as shard_map keeps account."""
    names = names if isinstance(names, tuple) else (names,)
    accounted = jax.typeof(jax.lax.axis_index(names)).manual_axis_type.varying
    return not accounted or bool(varying(array) & set(names))


def axis_size(names: Any) -> int:
    """The number of devices along these mesh axes, inside shard_map."""
    return jax.lax.axis_size(names)


def over_devices(tree: Any) -> bool:
    """Whether the compiler splits arrays of a tree over several devices, as it does outside shard_map on a mesh."""
    meshes = {jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)} | {jax.sharding.get_abstract_mesh()}
    return any(mesh.shape[name] > 1 for mesh in meshes for name in {*mesh.axis_names} - {*mesh.manual_axes})


def all_gather_invariant(array: Any, names: Any) -> Any:
    """The arrays of all devices along a new first axis, known to be the same on all of them."""
    if not varying(array):
        return jax.lax.all_gather(array, names)
    # JAX 0.12 has it under the first name, JAX 0.10 under the second.
    gather = getattr(parallel, "all_gather_invariant", None) or parallel._all_gather_invariant  # pyright: ignore
    return gather(array, names, axis=0, tiled=False)


def explicit_mesh(tree: Any) -> Any:
    """The mesh over whose explicit axes arrays of a tree are sharded by their types; None where there is none."""
    for leaf in jax.tree.leaves(tree):
        mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        if mesh is not None and mesh.explicit_axes:
            return mesh
    return None


@contextlib.contextmanager
def automatic_axes(mesh: Any) -> Iterator[Any]:
    """The same mesh with its explicit axes made automatic, as that of new equations."""
    automatic = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))
    with jax.sharding.use_abstract_mesh(automatic):
        yield automatic


def without_shardings(eqn: Any) -> Any:
    """An equation that does not say how its result is sharded over explicit axes."""
    said = [name for name in ("out_sharding", "sharding") if eqn.params.get(name) is not None]
    return eqn.replace(params={**eqn.params, **dict.fromkeys(said)}) if said else eqn
