"""Placing: where base, state and batches of a run lie: on one device, or on a mesh of data, fsdp and tp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.models import llama

AXES = ("data", "fsdp", "tp")


class Placing(NamedTuple):
    """Where things lie.

    Attributes:
      sizes: Devices along each axis.
      mesh: None for one device.
    """

    sizes: Mapping[str, int]
    mesh: Mesh | None

    @property
    def groups(self) -> int:
        """In how many parts a batch is split."""
        return self.sizes["data"] * self.sizes["fsdp"]

    @property
    def rows(self) -> NamedSharding | None:
        """Where batches lie, split along their first axis; None for one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    @property
    def whole(self) -> NamedSharding | None:
        """Where that lies which each device has all of; None for one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def base(self, model: Any) -> Any:
        """Where a model's weights lie, as `lora_jax.models.load` takes it.

        Raises:
          ValueError: Weights are to be split, and the model has no rules for that.
        """
        if self.mesh is None:
            return None
        if self.sizes["fsdp"] * self.sizes["tp"] == 1:
            return self.whole
        if not isinstance(model, llama.Llama):
            raise ValueError(
                f"--mesh: {type(model).__name__} has no rules by which its weights are split: take data={self.groups} "
                "alone, which splits batches"
            )
        specs, mesh = llama.partition_rules(model.config), self.mesh
        return lambda shapes: lora.match_partition_rules(specs, shapes, mesh)

    def batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """A batch where it belongs; each process puts there what its devices hold."""
        rows = self.rows
        if rows is None:
            return {**batch}
        if len(next(iter(batch.values()))) % self.groups:
            rows = self.whole
        return {
            name: jax.make_array_from_callback(x.shape, rows, x.__getitem__)  # pyright: ignore[reportArgumentType]
            for name, x in batch.items()
        }

    def shapes(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch's shapes, with where it lies."""
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows) for name, x in batch.items()}


def placing(text: str | None, batch: int, accumulate: int) -> Placing:
    """Where things lie on the devices that there are.

    Args:
      text: As "data=2,fsdp=2"; None for all devices on data if they divide the batch, and else one.
      batch: The rows of a step.
      accumulate: In how many parts it is taken.

    Raises:
      ValueError: It is no mesh, of more devices than there are, or does not divide the batch.
    """
    if batch % accumulate:
        raise ValueError(f"--batch {batch} does not divide into --accumulate {accumulate} parts: take a multiple of it")
    devices = jax.devices()
    if text is None:
        number = len(devices)
        sizes = {"data": 1 if batch % (accumulate * number) else number, "fsdp": 1, "tp": 1}
    else:
        sizes = {axis: 1 for axis in AXES} | parsed(text)
    number, groups = math.prod(sizes.values()), sizes["data"] * sizes["fsdp"]
    if number > len(devices):
        raise ValueError(
            f"--mesh {text}: it has {number} devices, and there are {len(devices)}: take fewer (on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={number} makes as many)"
        )
    if batch % (accumulate * groups):
        raise ValueError(
            f"--batch {batch} does not divide into --accumulate {accumulate} parts on data × fsdp = {groups} devices: "
            f"take a multiple of {accumulate * groups}"
        )
    if number == 1:
        return Placing(sizes, None)
    grid = np.array(devices[:number]).reshape(*sizes.values())
    return Placing(sizes, Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def parsed(text: str) -> dict[str, int]:
    """The axes of a mesh.

    >>> parsed("data=2,tp=4")
    {'data': 2, 'tp': 4}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise ValueError(
                f"--mesh {text}: {part.strip()!r} is none of {', '.join(AXES)} with its size, once: write it like "
                "data=2,fsdp=4"
            )
        sizes[axis] = int(size)
    return sizes
