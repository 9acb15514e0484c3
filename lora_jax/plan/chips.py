"""Chips by name, and how long a step takes on them at best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from lora_jax.plan.collectives import Collective, bytes_sent

EFFICIENCY = 0.6  # of the peak, which large products in bfloat16 reach
USABLE = 0.9  # of the memory: the rest is the runtime's, and lost between buffers


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a vendor says of a chip.

    Attributes:
      flops: The peak of dense products in bfloat16, FLOP/s.
      memory: Bytes of HBM.
      bandwidth: Of the HBM, bytes/s.
      link: What it sends to its neighbors at once, bytes/s, on all of its links in one direction.
      node: How many chips are linked so.
      network: What it sends beyond these, bytes/s.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    node: int
    network: float


# H100: https://www.nvidia.com/en-us/data-center/h100 (SXM; BF16 1,979 TFLOPS with sparsity, half of it without; NVLink
# 900 GB/s in both directions together). H200: https://www.nvidia.com/en-us/data-center/h200. Eight of them are a node,
# with 400 Gb/s of network for each: https://docs.nvidia.com/dgx/dgxh100-user-guide.
# TPUs: https://cloud.google.com/tpu/docs/v5e, v5p and v6e, which give interconnect for both directions together. The
# network is that of their pods over the number of chips: 6.4 Tb/s and 25.6 Tb/s over 256; 50 Gb/s for each v5p.
CHIPS: Mapping[str, Chip] = {
    "H100": Chip(989.5e12, 80e9, 3.35e12, 450e9, 8, 50e9),
    "H200": Chip(989.5e12, 141e9, 4.8e12, 450e9, 8, 50e9),
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 256, 3.1e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 8960, 6.2e9),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 256, 12.5e9),
}
ASSUMED = (
    f"{EFFICIENCY:.0%} of the peak in bfloat16; each product reads and writes HBM once; collectives at the",
    "full speed of all links, on GPUs at the network's where a group may leave its node of 8",
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step, by what it waits for."""

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        """With all collectives behind the arithmetic."""
        return max(self.compute, self.memory, self.network)

    @property
    def in_turn(self) -> float:
        """With none."""
        return max(self.compute, self.memory) + self.network


def roofline(
    chip: Chip, flops: float, moved: float, collectives: Iterable[Collective], mesh: Mapping[str, int]
) -> Roofline:
    """How long a step takes, by `ASSUMED`.

    Args:
      chip: Of which kind the devices are.
      flops: Of one device.
      moved: Bytes that one device reads from its memory and writes there.
      collectives: Of one device.
      mesh: Sizes by axis; neighbors are the devices along the last one that has more than one.

    >>> found = roofline(CHIPS["H100"], 989.5e12, 3.35e12, (), {"fsdp": 8})
    >>> round(found.compute, 2), found.memory, found.network
    (1.67, 1.0, 0)
    """
    *outer, inner = [size for size in mesh.values() if size > 1] or [1]
    devices, others = inner, set()
    for size in outer:
        others |= {size, *(size * other for other in others)}
        devices *= size

    def speed(one: Collective) -> float:
        stays = devices <= chip.node or (one.group == inner <= chip.node and inner not in others)
        return chip.link if stays else chip.network

    network = sum(bytes_sent([one]) / speed(one) for one in collectives)
    return Roofline(flops / (EFFICIENCY * chip.flops), moved / chip.bandwidth, network)
