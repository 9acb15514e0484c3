"""How products with an adapted weight are made, forward and backward: chosen by cost from the shapes, or by the user.

For X[n,d]·(W + A·B)[d,k] of rank r, in FLOPs of a training step whose base is frozen:

| strategy | FLOPs | what it holds |
|---|---|---|
| "factored" | 4ndk + 6nr(d+k) | x·A |
| "hybrid" | 4ndk + 4nr(d+k) + 2drk | W + A·B, for each weight |

The hybrid takes W + A·B for the result and for the gradient of x, and the factors for their own gradients. It saves
when n > dk/(d+k), and then about r/d of the FLOPs. (Differentiating through W + A·B takes 6ndk + 6drk: no strategy.)

Source: Cherniuk et al. 2023, RunLoRA, https://arxiv.org/abs/2312.03415.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from lora_jax.order import Order, order

Strategy = Literal["factored", "hybrid"] | Callable[..., Order]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A strategy, as the rules ask for it.

    Attributes:
      order: What chooses the order of the products of an activation with factors.
      hybrid: Whether W + A·B may be formed, where that takes fewer FLOPs.
    """

    order: Callable[..., Order] = order
    hybrid: bool = False

    def forms(self, forming: int, low_rank: int) -> bool:
        """Whether to form W + A·B, from the FLOPs of forming it and of the factors' products with the activation.

        >>> n, d, k, r = 2048, 512, 512, 8
        >>> Plan(hybrid=True).forms(2 * d * r * k, 2 * n * r * (d + k)), Plan().forms(0, 1)
        (True, False)
        """
        return self.hybrid and forming < low_rank


def planned(strategy: Strategy) -> Plan:
    """The plan of a strategy.

    Raises:
      ValueError: There is none of that name.
    """
    if callable(strategy):
        return Plan(order=strategy)
    if strategy not in ("factored", "hybrid"):
        raise ValueError(f"strategy={strategy!r}: it is 'factored', 'hybrid', or a function like lora_jax.order.order")
    return Plan(hybrid=strategy == "hybrid")
