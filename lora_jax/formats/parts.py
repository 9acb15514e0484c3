"""A training state as named arrays, in two parts: the adapters, and all else but the base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from lora_jax import tree
from lora_jax.factors import Adapter, LoraParams
from lora_jax.placement import on_mesh


class Parts(NamedTuple):
    """Arrays by name: of factors `path:factor`, of all else the path in the state. PRNG keys are held as their data."""

    adapter: dict[str, Any]
    rest: dict[str, Any]


def take_apart(state: Any, frozen: Any, lora_params: LoraParams) -> tuple[Parts, Callable[[Parts], Any]]:
    """The arrays of a state, and a function that makes a state like it of other arrays.

    Args:
      state: Any pytree that has `lora_params` in it, the object itself.
      frozen: The base. A part of the state that has its structure is left out, and stays as it is in what is rebuilt.
      lora_params: The adapters.

    Raises:
      ValueError: The adapters are not in the state; or the base is, in a tree of another structure; or an array is of a
        kind that cannot be written.
    """
    base, structure = tree.flatten(frozen)

    def is_base(node: Any) -> bool:
        if type(node) is not type(frozen) or structure.num_nodes == 1:
            return False
        return jax.tree.structure(node) == structure and _shapes(node) == _shapes(frozen)

    leaves, treedef = tree.flatten(state, is_leaf=lambda node: node is lora_params or is_base(node))
    if not any(x is lora_params for x in leaves.values()):
        raise ValueError("the adapters are no part of the state: give lora_params=, a function from a state to them")
    rest = {
        path: x for path, x in leaves.items() if x is not frozen and (tree.is_array(x) or isinstance(x, int | float))
    }
    _refuse_base(rest, base)

    def rebuilt(parts: Parts) -> Any:
        def adapter(path: str, like: Adapter) -> Adapter:
            factors = {name: _like(x, parts.adapter[f"{path}:{name}"]) for name, x in like.factors.items()}
            return dataclasses.replace(like, factors=factors)

        adapters = {path: adapter(path, like) for path, like in lora_params.items()}
        others = {path: _like(x, parts.rest[path]) for path, x in rest.items()}
        filled = {p: adapters if x is lora_params else others.get(p, x) for p, x in leaves.items()}
        return tree.unflatten(treedef, filled)

    factors = {f"{path}:{name}": x for path, a in lora_params.items() for name, x in a.factors.items()}
    parts = Parts(factors, {path: _data(x) for path, x in rest.items()})
    for path, x in (*parts.adapter.items(), *parts.rest.items()):
        _check_has_form(path, x)
    return parts, rebuilt


def _check_has_form(path: str, x: Any) -> None:
    """Raises where orbax could not write an array, and would say so late and without its path."""
    try:
        tensorstore.dtype(x.dtype.name)
        cause = "" if np.size(x) else "has no entries"
    except ValueError:
        cause = f"is {x.dtype.name}"
    if cause:
        raise ValueError(f"{path!r} {cause}, which a checkpoint cannot hold: take it out of the state, or cast it")


def adapters_of(state: Any, lora_params: Callable[[Any], LoraParams]) -> tuple[Any, LoraParams]:
    """The state, and the adapters in it, which are there once: an average, say, may begin as the same object.

    Raises:
      ValueError: The function does not find them.
    """
    state = jax.tree.map(lambda x: x, state)
    try:
        found, cause = lora_params(state), "what is found is none"
    except (AttributeError, LookupError, TypeError) as error:
        found, cause = None, error
    if not isinstance(found, Mapping) or not all(isinstance(x, Adapter) for x in found.values()):
        raise ValueError(
            f"no adapters are found in a {type(state).__name__} ({cause}): give Checkpoints lora_params=, a function "
            "from a state to the adapters in it"
        )
    return state, found


def _data(x: Any) -> Any:
    """An array that can be written."""
    if isinstance(x, int | float):  # as wide as it may become
        return np.asarray(x, np.int64 if isinstance(x, int) and abs(x) < 2**63 else None)
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    if not isinstance(x, jax.ShapeDtypeStruct):
        return jax.random.key_data(x)
    data = jax.eval_shape(jax.random.key_data, x)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)


def _like(like: Any, data: Any) -> Any:
    """The inverse of `_data`."""
    if isinstance(like, int | float | np.generic):
        return type(like)(data)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(data, impl=_impl(like))
    return data


def _impl(key: Any) -> Any:
    """As `jax.random.key_impl`, of a `jax.ShapeDtypeStruct` too."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found.pop()


def _shapes(node: Any) -> list[Any]:
    return [getattr(x, "shape", None) for x in jax.tree.leaves(node)]


def _refuse_base(rest: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Raises where an array of the state is a leaf of the base, by the end of its path and its shape."""
    shapes = {np.shape(x) for x in base.values()} - {()}
    for path, x in rest.items():
        parts = path.split("/") if np.shape(x) in shapes else []
        for end in ("/".join(parts[i:]) for i in range(len(parts))):
            if end in base and np.shape(x) == np.shape(base[end]):
                raise ValueError(
                    f"the state has the base's {end!r} at {path!r}, and checkpoints hold no base weights: keep only "
                    "lora_params in the state, or the base as a whole, in a tree like `frozen`"
                )


def check_finite(what: str, factors: Mapping[str, Any]) -> None:
    """Raises ValueError where a factor has entries that are not finite; of several processes, none looks."""
    if jax.process_count() > 1:  # of which one might find what others do not
        return
    for name, x in factors.items():
        wide = np.promote_types(x.dtype, np.float32)
        if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(np.asarray(x, wide)).all():
            raise ValueError(
                f"{what} was not saved, because its factors are not finite, {name!r} first: training has diverged; go "
                "on from the one before, with a smaller learning rate"
            )


@jax.jit
def _copies(arrays: Any) -> Any:
    return jax.tree.map(jnp.copy, arrays)


def copied(parts: Parts) -> Parts:
    """What a step may then donate, or others change: copied where it lies, without waiting for it to be there."""

    def of(part: Mapping[str, Any]) -> dict[str, Any]:
        groups: dict[Any, dict[str, Any]] = {}  # a program for all arrays on the same devices
        for name, x in part.items():
            if isinstance(x, jax.Array):
                groups.setdefault(getattr(x.sharding, "mesh", x.sharding), {})[name] = x
        copies = {name: x for group in groups.values() for name, x in _copies(group).items()}
        return {name: copies[name] if name in copies else np.array(x) for name, x in part.items()}

    return Parts(*map(of, parts))


def templates(part: Mapping[str, Any]) -> dict[str, Any]:
    """How orbax is to give each array: as it lies on a mesh, or else NumPy's."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        if (place := on_mesh(x))
        else np.empty(x.shape, x.dtype)
        for name, x in part.items()
    }


def placed(part: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays on the device that those of a part lie on."""

    def place(like: Any, x: Any) -> Any:
        if on_mesh(like) or isinstance(like, np.ndarray | np.generic):
            return x
        return jax.device_put(x, like.sharding if getattr(like, "committed", False) else None)

    return {name: place(like, found[name]) for name, like in part.items()}
