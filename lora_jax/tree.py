"""Paths: a flat, ordered view of any pytree by the addresses of its leaves."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], Any]:
    """The leaves of `tree` by path, in order, and its treedef.

    Args:
      tree: Any pytree.
      is_leaf: As in `jax.tree.flatten`.

    Returns:
      A dict from path to leaf, and the treedef that `unflatten` takes.

    Raises:
      ValueError: Two leaves have the same path, which happens when keys contain "/".

    >>> flatten({"dense": {"kernel": 1, "bias": 2}})[0]
    {'dense/bias': 2, 'dense/kernel': 1}
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    leaves: dict[str, Any] = {}
    for key, leaf in flat:
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        if path in leaves:
            raise ValueError(f"two leaves of the tree have the same path {path!r}: rename a key, or take '/' out of it")
        leaves[path] = leaf
    return leaves, treedef


def unflatten(treedef: Any, leaves: dict[str, Any]) -> Any:
    """The inverse of `flatten`."""
    return jax.tree.unflatten(treedef, list(leaves.values()))


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one: NumPy's, JAX's, a tracer, a `jax.ShapeDtypeStruct`."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def nbytes(tree: Any) -> int:
    """The bytes that the arrays of a tree take; leaves that are no arrays take none.

    >>> nbytes({"a": np.zeros((3, 2), np.float32), "name": "b"})
    24
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if is_array(leaf))


def close_to(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the names most like `name`, or nothing where none is.

    >>> close_to("dense/kernle", ["dense/kernel", "dense/bias"])
    '; close matches: dense/kernel, dense/bias'
    """
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; close matches: {', '.join(matches)}" if matches else ""
