"""`lora-jax plan`: see `lora_jax.plan.command`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_jax.cli.options import add_json, whole

HELP = "what a training step takes: memory, arithmetic, network, time; and on how many chips"
DESCRIPTION = """\
What a step of LoRA on a Llama takes: the memory of each device, arithmetic,
collectives, and the time on chips by name. It needs no weights and no
accelerator: the step is compiled for a mesh of virtual devices, and read.
Without --mesh it finds the fewest chips of each kind that hold the step.
"""
EXAMPLES = """\
examples:
  lora-jax plan config.json --batch 8
  lora-jax plan config.json --mesh fsdp=8 --batch 8 --rank 64 --remat full
  lora-jax plan config.json --mesh data=2,fsdp=4,tp=8 --batch 16 --chip v5p
  lora-jax plan config.json --mesh fsdp=8 --batch 8 --variant Full
                                        full fine-tuning of these leaves
"""
SUBJECT = "--model"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    option = parser.add_argument
    option(
        "--model", metavar="CONFIG", type=Path, required=True, help="a config.json of the Llama family, or its folder"
    )
    option("--mesh", metavar="AXES", help="devices by axis, of data, fsdp and tp: fsdp=8,tp=4")
    option("--batch", metavar="N", type=whole(1), default=8, help="sequences in a step (default: %(default)s)")
    option("--length", metavar="N", type=whole(1), default=2048, help="tokens in each (default: %(default)s)")
    option("--variant", metavar="NAME", default="LoRA", help="LoRA, DoRA, Full ... (default: %(default)s)")
    option("--rank", metavar="N", type=whole(1), default=16, help="of the factors (default: %(default)s)")
    option(
        "--targets", metavar="WHICH", default="all-linear", help="all-linear (default), attention, or a regex of paths"
    )
    option("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base (default: %(default)s)")
    option(
        "--remat",
        choices=("none", "products", "full"),
        default="products",
        help="what of a layer the backward pass makes anew: nothing, all but products of weights (default), everything",
    )
    option("--chip", metavar="NAMES", help="H100,H200,v5e,v5p,v6e, or some of these (default: all)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Plans."""
    from lora_jax.plan import command

    command.run(arguments)
