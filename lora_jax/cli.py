"""The command line: `lora-jax demo` and `lora-jax plan`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

DEMO = """\
Fine-tunes a pretrained sentence encoder (MiniLM, 22.6 million parameters) to
tell whether two neighboring words of a sentence have been swapped. The
sentences are those of Python's own documentation, so nothing is downloaded.
A linear probe, LoRA on query and value, and LoRA on all linear layers train
on the same sentences and are tested on others, from other files. It takes
some four minutes on two CPU cores.
"""
EXAMPLES = """\
It writes into the output folder: the adapters (*.safetensors, for
lora_jax.load), results.json, and figure.png.

examples:
  lora-jax demo                         the whole comparison
  lora-jax demo --quick                 all of it in a minute, too short to learn
  lora-jax demo --full                  full fine-tuning too, in two more minutes
  lora-jax demo --rank 2 --seed 1       a smaller adapter, another draw
  lora-jax demo --model ~/bert-base     a BERT of yours
  lora-jax demo --model hf://google-bert/bert-base-uncased
                                        one that is downloaded

It uses all devices of the machine, and of several machines when started on each
of them, by srun, mpirun or with JAX_COORDINATOR_ADDRESS=host:port,
JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment.
"""
PLAN = """\
What a step of LoRA on a Llama takes: the memory of each device, arithmetic,
collectives, and the time on chips by name. It needs no weights and no
accelerator: the step is compiled for a mesh of virtual devices, and read.
Without --mesh it finds the fewest chips of each kind that hold the step.
"""
PLAN_EXAMPLES = """\
CONFIG is a Hugging Face config.json, or the directory that it is in.

examples:
  lora-jax plan config.json --batch 8
  lora-jax plan config.json --mesh fsdp=8 --batch 8 --rank 64 --remat full
  lora-jax plan config.json --mesh data=2,fsdp=4,tp=8 --batch 16 --chip v5p
  lora-jax plan config.json --mesh fsdp=8 --batch 8 --variant Full
                                        full fine-tuning of these leaves
"""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: The arguments; None for those of the process.

    Returns:
      The exit status: 0, 2 for a user's mistake (in one line on stderr), 130 if interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (OSError, ValueError, ModuleNotFoundError) as error:  # how the library says what to do differently
        if arguments.debug:
            raise
        print(f"lora-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora-jax: interrupted", file=sys.stderr)
        return 130
    return 0


def demo(arguments: argparse.Namespace) -> None:
    """The demo: see `lora_jax.demo.job`."""
    _need({"rich", "tokenizers"} if arguments.no_figure else {"rich", "tokenizers", "matplotlib"}, extra="demo")
    from lora_jax import distributed
    from lora_jax.demo import encoder, job, report

    distributed.initialize()
    quick = {"steps": 20, "sentences": 300, "lengths": (24,)} if arguments.quick else {}
    given = {"steps": arguments.steps} if arguments.steps else {}
    settings = job.Settings(seed=arguments.seed, rank=arguments.rank, full=arguments.full, **(quick | given))
    pretrained = encoder.load(arguments.model)
    widest = pretrained.model.config.hidden_size
    if arguments.rank > widest:
        raise ValueError(f"--rank {arguments.rank}: the encoder's layers have {widest} features, so that is the most")
    with distributed.output(arguments.out) as out:
        out.mkdir(parents=True, exist_ok=True)
        with report.progress() as watch:
            found = job.run(settings, pretrained, out, watch)
        report.show(found)
        report.write(found, out / "results.json")
        if not arguments.no_figure:
            report.draw(found, out / "figure.png")
        figure = "" if arguments.no_figure else "figure.png, "
        print(f"\nWritten to {out}: {figure}results.json, and the adapters, *.safetensors")


def plan(arguments: argparse.Namespace) -> None:
    """The planning tool: see `lora_jax.plan.command`."""
    from lora_jax.plan import command

    command.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lora-jax", description="LoRA for any JAX function over any pytree.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    _add_demo(commands)
    _add_plan(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="adapt a pretrained sentence encoder, and compare LoRA with what else one could train",
        description=DEMO,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=demo)
    option = parser.add_argument
    option("--model", metavar="DIR", help="a BERT encoder in Hugging Face's layout, or hf://NAME to download one")
    option("--out", metavar="DIR", type=Path, default=Path("demo"), help="where results go (default: %(default)s)")
    option("--seed", metavar="N", type=_whole(0), default=0, help="for all that is random (default: %(default)s)")
    option("--steps", metavar="N", type=_whole(1), help="of 32 sentences each (default: 300; with --quick 20)")
    option("--rank", metavar="N", type=_whole(1), default=8, help="LoRA's rank (default: %(default)s)")
    option("--full", action="store_true", help="full fine-tuning too")
    option("--quick", action="store_true", help="few sentences and few steps, to see that it works")
    option("--no-figure", action="store_true", help="no figure.png, for which matplotlib is needed")
    option("--debug", action="store_true", help="show where an error comes from")


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a training step takes: memory, arithmetic, network, time; and on how many chips",
        description=PLAN,
        epilog=PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=plan)
    option = parser.add_argument
    option("config", metavar="CONFIG", type=Path, help="a config.json of the Llama family")
    option("--mesh", metavar="AXES", help="devices by axis, of data, fsdp and tp: fsdp=8,tp=4")
    option("--batch", metavar="N", type=_whole(1), default=8, help="sequences in a step (default: %(default)s)")
    option("--length", metavar="N", type=_whole(1), default=2048, help="tokens in each (default: %(default)s)")
    option("--variant", metavar="NAME", default="LoRA", help="LoRA, DoRA, Full ... (default: %(default)s)")
    option("--rank", metavar="N", type=_whole(1), default=16, help="of the factors (default: %(default)s)")
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
    option("--json", metavar="FILE", type=Path, help="all numbers, for programs")
    option("--debug", action="store_true", help="show where an error comes from")


def _whole(least: int) -> Any:
    """An argument that is a whole number, `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {least} or more")
        return int(text)

    return parse


def _need(modules: set[str], extra: str) -> None:
    """Raises where modules of an extra are missing."""
    missing = sorted(name for name in modules if importlib.util.find_spec(name) is None)
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} not installed: pip install 'lora-jax[{extra}]'")


if __name__ == "__main__":
    sys.exit(main())
