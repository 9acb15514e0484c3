"""A plan: what a step takes, compiled for a mesh, and the smallest mesh whose devices hold it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.plan.chips import CHIPS, USABLE, Chip, Roofline, roofline
from lora_jax.plan.collectives import Collective, bytes_sent, collectives
from lora_jax.plan.flops import matrix_bytes, matrix_flops
from lora_jax.plan.memory import Memory, memory
from lora_jax.plan.step import Job, compiled, lower
from lora_jax.variants.base import FROZEN

LARGEST = 256  # devices


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes. Everything but the numbers of parameters is of one device.

    Attributes:
      job: What was asked.
      parameters: Of the model.
      trained: Numbers that train.
      memory: Bytes, by part.
      flops: In products of matrices.
      moved: Bytes that these read and write.
      collectives: Of one step.
      exact: Whether bfloat16 was compiled as such. If not, temporaries and collectives are as if of float32.
      seconds: To trace, lower and compile.
    """

    job: Job
    parameters: int
    trained: int
    memory: Memory
    flops: int
    moved: int
    collectives: tuple[Collective, ...]
    exact: bool
    seconds: float

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step."""
        return bytes_sent(self.collectives)

    def fits(self, chip: Chip) -> bool:
        """Whether a chip holds it, with a tenth to spare."""
        return self.memory.total <= USABLE * chip.memory

    def time(self, chip: Chip) -> Roofline:
        """How long a step takes at best."""
        return roofline(chip, self.flops, self.moved, self.collectives, self.job.sizes)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        times = {name: self.time(chip) for name, chip in CHIPS.items()}
        return {
            "mesh": self.job.sizes,
            "devices": self.job.devices,
            "batch": self.job.batch,
            "length": self.job.length,
            "dtype": self.job.dtype,
            "remat": self.job.remat,
            "parameters": self.parameters,
            "trained": self.trained,
            "bytes_per_device": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "flops_per_device": self.flops,
            "flops": self.flops * self.job.devices,
            "hbm_bytes_per_device": self.moved,
            "bytes_sent_per_device": self.sent,
            "collectives": by_kind(self.collectives),
            "bfloat16_compiled_as_such": self.exact,
            "chips": {
                name: {
                    "fits": self.fits(CHIPS[name]),
                    **dataclasses.asdict(found),
                    "overlapped": found.overlapped,
                    "in_turn": found.in_turn,
                }
                for name, found in times.items()
            },
            "compile_seconds": round(self.seconds, 1),
            "jax": jax.__version__,
        }


def plan(job: Job, devices: Any = None) -> Plan:
    """Trace, lower and compile a step, and read what it takes. Nothing is computed.

    Args:
      job: What is planned.
      devices: As in `lora_jax.plan.step.lower`.

    >>> from lora_jax.models.llama import Config
    >>> job = Job(Config(64, 16, 2, 4, 32), {"fsdp": 2, "tp": 2}, batch=2, length=8, dtype="float32")
    >>> with jax.numpy_dtype_promotion("standard"):  # which optax's Adam needs
    ...     found = plan(job)
    >>> found.trained, found.memory.factors  # numbers in all; bytes on each of four devices
    (8704, 17408)
    """
    began = time.perf_counter()
    step = lower(job, devices)
    program, exact = compiled(step, job.dtype)
    return Plan(
        job,
        sum(int(np.prod(x.shape)) for x in jax.tree.leaves(step.base)),
        _trained(step.lora_params),
        memory(step, program),
        matrix_flops(program),
        matrix_bytes(program),
        collectives(program),
        exact,
        time.perf_counter() - began,
    )


def _trained(lora_params: Any) -> int:
    """The numbers in factors that train; some variants have others."""
    held = (
        (x, adapter.variant.labels()[name]) for adapter in lora_params.values() for name, x in adapter.factors.items()
    )
    return sum(int(np.prod(x.shape)) for x, label in held if label != FROZEN)


def by_kind(found: tuple[Collective, ...]) -> list[dict[str, Any]]:
    """Collectives of one kind and group size together: how often, and how many bytes each device sends in all."""
    kinds = sorted({(one.kind, one.group) for one in found})
    rows = []
    for kind, group in kinds:
        own = [one for one in found if (one.kind, one.group) == (kind, group)]
        rows.append({"kind": kind, "group": group, "count": sum(x.count or 0 for x in own), "bytes": bytes_sent(own)})
    return rows


def meshes(job: Job) -> Iterator[Job]:
    """The job on 1, 2, 4 ... devices, over the batch as far as it goes, then over heads, as long as these divide it."""
    devices = 1
    while devices <= LARGEST:
        rows = next(n for n in range(min(devices, job.batch), 0, -1) if job.batch % n == 0 and devices % n == 0)
        with contextlib.suppress(ValueError):  # it does not divide the model
            yield dataclasses.replace(job, mesh={"fsdp": rows, "tp": devices // rows})
        devices *= 2


def smallest(job: Job, chips: Mapping[str, Chip] = CHIPS) -> dict[str, Plan]:
    """By chip, the plan of the fewest devices, a power of two, that hold the step; not all chips may have one.

    Args:
      job: What is planned; its mesh is not looked at.
      chips: Which.
    """
    found: dict[str, Plan] = {}
    for own in meshes(job):
        if len(found) == len(chips):
            break
        made = plan(own)
        found |= {name: made for name, chip in chips.items() if name not in found and made.fits(chip)}
    return found
