"""What competes: each arm trains all linear layers its own way, with as many parameters as LoRA of rank 8.

An arm is rules, the learning rates that are tried first, and an optimizer of a schedule. VeRA, IA3 and biases alone
have far fewer parameters by nature, and full fine-tuning has all. The head trains in every arm.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import lora_jax as lora

HEAD = r".*/head/.*"
LOW, MIDDLE, HIGH, HIGHER = (1e-4, 3e-4), (1e-3, 3e-3), (3e-3, 1e-2), (1e-2, 3e-2)


def adamw(schedule):
    return lora.optimizer(optax.adamw(schedule))


class Arm(NamedTuple):
    rules: Any
    rates: tuple[float, ...] = MIDDLE
    optimizer: Callable = adamw
    informed: Callable | None = None  # makes rules of rules, from the loss, the parameters and some batches
    target_rank: int | None = None  # of AdaLoRA's budget


def everywhere(variant):
    """The variant on every linear layer, found by use, not by name."""

    def rule(path, site):
        if "/head/" in path:
            return lora.Full()
        return variant if site.kind == "linear" else None

    return rule


ARMS = {
    "LoRA": Arm(everywhere(lora.LoRA(8))),
    "rsLoRA": Arm(everywhere(lora.LoRA(8, alpha=8, scaling="rank_stabilized"))),
    "LoRA+": Arm(everywhere(lora.LoRA(8)), optimizer=lambda schedule: lora.lora_plus(optax.adamw, schedule)),
    "LoRA, PiSSA": Arm(everywhere(lora.LoRA(8, init="pissa")), LOW),
    "LoRA, OLoRA": Arm(everywhere(lora.LoRA(8, init="olora")), LOW),
    "LoRA, EVA": Arm(everywhere(lora.LoRA(8)), informed=lora.eva),
    "DoRA": Arm(everywhere(lora.DoRA(8))),
    "AdaLoRA": Arm(everywhere(lora.AdaLoRA(12)), target_rank=8),
    "LoRA-FA": Arm(everywhere(lora.LoRAFA(16))),
    "LoRA-XS": Arm(everywhere(lora.LoRAXS(96))),
    "LoHa": Arm(everywhere(lora.LoHa(4))),
    "LoKr": Arm(everywhere(lora.LoKr(32, factor=4))),
    "VeRA": Arm(everywhere(lora.VeRA(256)), HIGH),
    "IA3": Arm(everywhere(lora.IA3()), HIGH),
    "biases": Arm({r".*/bias": lora.Full(), HEAD: lora.Full()}, HIGHER),
    "full fine-tuning": Arm({".*": lora.Full()}, LOW),
    "linear probe": Arm({HEAD: lora.Full()}, HIGHER),
}
