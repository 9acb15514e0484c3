"""Fingerprint: which base is this? Told by paths, shapes, dtypes and a few entries, while the leaves stay in place."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lora_jax import tree

SAMPLES = 64


def fingerprint(params: Any) -> dict[str, str]:
    """What tells a tree of weights from another: each array's dtype and shape, and a hash of some of its entries.

    Up to 64 entries of each leaf are read, spread over the whole of it, its first and its last among them. Their bits
    count, so that weights which were trained on, cast, or are another checkpoint's are told apart. A change of a few
    entries between those that are read is not seen: to prove that two trees are equal, compare them.

    The same weights give the same strings as NumPy's arrays and as JAX's, wherever they lie, in every release. Only the
    entries move, and no leaf is gathered. On a mesh of several processes, all of them call this together.

    Args:
      params: Any pytree of arrays, of any dtypes; leaves that are no arrays do not count.

    Returns:
      A dict from path to a string, in the order of the tree. JSON holds it, with 60 or so bytes for each leaf.

    Raises:
      ValueError: A leaf has no values: it is traced, a `jax.ShapeDtypeStruct`, or lies in other processes alone.

    >>> fingerprint({"dense": {"kernel": np.ones((8, 4), np.float32), "bias": np.zeros(4, np.float32)}})
    {'dense/bias': 'float32[4] a2888613', 'dense/kernel': 'float32[8,4] e3cb6243'}
    """
    leaves = {path: leaf for path, leaf in tree.flatten(params)[0].items() if _has_bits(leaf)}
    for path, leaf in leaves.items():
        _check_has_values(path, leaf)
    with jax.set_mesh(Mesh(np.empty((), object), ())):  # what is read lies on one device, whatever mesh is set
        read = jax.device_get([[*_read(leaf)] for leaf in leaves.values()])
        sums = np.array([sum(map(_sum, parts)) % 2**32 for parts in read], np.uint32)
        spread = np.array([isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves.values()], bool)
        if spread.any():
            parts = multihost_utils.process_allgather(sums)
            sums = np.where(spread, np.asarray(parts).sum(0, dtype=np.uint32), sums)
    pairs = zip(leaves.items(), sums.tolist(), strict=True)
    return {path: _spelled(leaf.dtype, leaf.shape, found) for (path, leaf), found in pairs}


def fingerprint_of(dtype: Any, shape: tuple[int, ...], read: Callable[[np.ndarray], np.ndarray]) -> str:
    """What `fingerprint` says of an array that is elsewhere.

    Args:
      dtype: Its dtype.
      shape: Its shape.
      read: The entries at positions of it, which are counted as it lies in C order.

    >>> fingerprint_of(np.dtype("float32"), (4,), np.zeros(4, np.float32).take)
    'float32[4] a2888613'
    """
    positions = _positions(math.prod(shape))
    return _spelled(dtype, shape, _sum((positions, read(positions))) % 2**32)


def check_base(what: str, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises where two fingerprints differ.

    Args:
      what: Whose base it is, for the message: a file.
      expected: The fingerprint of the base that it was made for.
      found: That of the base that is there.

    Raises:
      ValueError: They differ; it names the first path that does, how many do, the cause and the remedy.
    """
    paths = [path for path in (*expected, *(path for path in found if path not in expected))]
    differing = [path for path in paths if expected.get(path) != found.get(path)]
    if not differing:
        return
    path = differing[0]
    (was, _, _), (form, _, _) = (of.get(path, "").rpartition(" ") for of in (expected, found))
    if path not in found:
        cause = f"this base has no such leaf{tree.close_to(path, found)}"
        remedy = "give the whole tree of the model that it was made for"
    elif path not in expected:
        cause = f"that base had no such leaf{tree.close_to(path, expected)}"
        remedy = "give the tree of the model that it was made for, and nothing else"
    elif was != form:
        cause, remedy = f"it was {was} and is {form}", "give the model that it was made for, in the dtypes it had then"
    else:
        cause = f"the same {form} with other values"
        remedy = "give the weights that it was made for: that checkpoint, and of it what `split` returned as frozen"
    raise ValueError(
        f"{what}: made for another base, from which this one differs in {len(differing)} of {len(paths)} leaves. "
        f"The first is {path!r}: {cause}. To go on, {remedy}"
    )


def _spelled(dtype: Any, shape: tuple[int, ...], found: int) -> str:
    return f"{dtype.name}[{','.join(map(str, shape))}] {found:08x}"


def _has_bits(leaf: Any) -> bool:
    return tree.is_array(leaf) and not getattr(leaf.dtype, "hasobject", False)


def _check_has_values(path: str, leaf: Any) -> None:
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"{path!r} is traced, and has no values to tell it by: call fingerprint outside of jax.jit")
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(f"{path!r} is a ShapeDtypeStruct, and has no values to tell it by: give the arrays themselves")
    if isinstance(leaf, jax.Array) and not leaf.sharding.addressable_devices:
        raise ValueError(
            f"{path!r} lies in other processes alone: give each process those leaves of which it holds a part"
        )


@functools.cache
def _positions(size: int) -> np.ndarray:
    """Which entries of an array are read: one from each of 64 equal parts, at a place that looks random."""
    if size <= SAMPLES:
        return np.arange(size)
    edges = [size * i // SAMPLES for i in range(SAMPLES + 1)]
    places = [a + int.from_bytes(_digest(a, b"")) % (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    return np.array([0, *places[1:-1], size - 1])


def _read(leaf: Any) -> Iterator[tuple[np.ndarray, Any]]:
    """Of each part of a leaf that counts here: which entries are read, and the array that begins with them."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    positions = _positions(math.prod(leaf.shape))
    where = np.array(np.unravel_index(positions, leaf.shape or (1,)), np.int64)[: leaf.ndim]
    if not isinstance(leaf, jax.Array):
        yield positions, np.asarray(leaf)[tuple(where)].reshape(-1)
        return
    for shard in leaf.addressable_shards:
        ends = [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)]
        start, stop = np.array(ends, np.int64).reshape(-1, 2, 1).swapaxes(0, 1)
        inside = np.flatnonzero(((start <= where) & (where < stop)).all(0))
        if shard.replica_id == 0 and inside.size:
            yield positions[inside], _entries(shard.data, (where - start)[:, inside])


def _entries(array: jax.Array, where: np.ndarray) -> Any:
    """Entries of an array on one device, and perhaps some more."""
    (device,) = array.devices()
    # In a processor's own memory, what NumPy has is a view.
    return np.asarray(array)[tuple(where)].reshape(-1) if device.platform == "cpu" else _gathered(array, where)


def _gathered(array: jax.Array, where: np.ndarray) -> jax.Array:
    """64 entries, of which the first are those asked for: as many for each array, so that few programs are made."""
    (device,) = array.devices()
    padded = np.resize(where.T, (SAMPLES, len(where))).T.astype(np.int32)
    return _take(jax.device_put(array, device), padded)  # out of the host's memory, where it was offloaded there


@jax.jit
def _take(array: jax.Array, where: jax.Array) -> jax.Array:
    return array.at[tuple(where)].get(mode="promise_in_bounds").reshape(-1)


def _sum(part: tuple[np.ndarray, np.ndarray]) -> int:
    """The sum of the entries' hashes, each with its place, for which neither order nor parts make a difference."""
    positions, entries = part
    entries = entries[: len(positions)]
    entries = entries.astype(entries.dtype.newbyteorder("<"))
    return sum(int.from_bytes(_digest(p, x.tobytes())) for p, x in zip(positions.tolist(), entries, strict=True))


def _digest(position: int, bits: bytes) -> bytes:
    return hashlib.blake2b(position.to_bytes(8, "little") + bits, digest_size=4).digest()
