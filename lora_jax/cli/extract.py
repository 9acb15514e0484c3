"""`lora-jax extract`: the adapter between two checkpoints; see `lora_jax.extract`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_jax.cli import options

HELP = "the adapter that takes one checkpoint to another"
DESCRIPTION = """\
Finds the adapter of a rank that takes a base nearest to a model that was fully
fine-tuned from it: of each ΔW the largest singular values, so that none of that
rank comes nearer. Without --targets, each leaf that changed is taken: LoRA for
matrices, and the leaf itself (Full) for norms and biases. It prints how much of
‖ΔW‖ the adapter holds. One leaf of both models is in memory at a time.
"""
EXAMPLES = """\
examples:
  lora-jax extract --model base --tuned tuned --rank 16 --out adapter
  lora-jax extract --model base --tuned tuned --rank 16 --out adapter \\
    --targets '.*/attention/.*/kernel'
"""
SUBJECT = None


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    option = parser.add_argument
    option("--model", metavar="DIR", required=True, help=f"the base: {options.MODEL}")
    option("--tuned", metavar="DIR", required=True, help="what was trained of it, likewise")
    option("--rank", metavar="N", type=options.whole(1), required=True, help="of the adapter, at most")
    option("--out", metavar="DIR", type=Path, required=True, help="the folder of the new adapter")
    option("--targets", metavar="REGEX", help="of whole paths of leaves, as `lora-jax info` lists them (default: all)")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Extracts."""
    from lora_jax.algebra.between import extracted
    from lora_jax.cli.base import stored, write
    from lora_jax.cli.groups import pattern
    from lora_jax.table import table

    options.refuse_existing(arguments.out)
    options.check_new(arguments.json, arguments.out)
    base, tuned = (stored(model) for model in (arguments.model, arguments.tuned))
    lora_params, held = extracted(base.deferred(), tuned.deferred(), base.sites(), arguments.rank, arguments.targets)
    write(arguments.out, lora_params, base, arguments.model)
    groups: dict[str, list[str]] = {}
    for path in held:
        groups.setdefault(pattern(path), []).append(path)

    def line(name: str, paths: list[str]) -> tuple[str, ...]:
        delta, rest = (sum(held[path][i] for path in paths) for i in (0, 1))
        return (name, str(len(paths)), f"{delta**0.5:.3g}", f"{max(0.0, 1 - rest / delta) ** 0.5:.1%}")

    rows = [line(name, paths) for name, paths in groups.items()]
    print(table(("leaf", "count", "‖ΔW‖", "held"), rows, line("all", [*held]), numbers=(1, 2, 3)))
    each = {path: {"delta": delta**0.5, "rest": rest**0.5} for path, (delta, rest) in held.items()}
    options.write_json(arguments.json, {"each": each})
