"""`lora-jax combine`: several adapters as one; see `lora_jax.combine`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_jax.algebra.combine import METHODS
from lora_jax.cli import options

HELP = "several adapters of one base as one"
DESCRIPTION = """\
Makes one adapter of several, ΔW ≈ Σ w ΔW. By "cat", which is exact, ranks add
up; "svd" is the best adapter of a rank for the sum. TIES and DARE prune each
ΔW first; TIES then takes a vote on signs. A leaf that was trained as a whole
(Full: biases, norms, heads) becomes base + Σ w (weight - base).
"""
EXAMPLES = """\
examples:
  lora-jax combine --model base --adapter law=0.7 --adapter fr=0.3 --out both
  lora-jax combine --model base --adapter law --adapter french --out both \\
    --method svd --rank 16
  lora-jax combine --model base --adapter law --adapter french --out both \\
    --method ties_svd --density 0.2
"""
SUBJECT = None


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    option = parser.add_argument
    option("--model", metavar="DIR", required=True, help=options.MODEL)
    option(
        "--adapter",
        metavar="A[=WEIGHT]",
        type=options.weighted,
        action="append",
        required=True,
        help=f"{options.ADAPTER}; again for each",
    )
    option("--out", metavar="DIR", type=Path, required=True, help="the folder of the new adapter")
    option("--method", choices=METHODS, default="cat", metavar="NAME", help=f"{', '.join(METHODS)} (default: cat)")
    option("--rank", metavar="N", type=options.whole(1), help="of svd and those that end in it, at most")
    option("--density", metavar="SHARE", type=float, help="of those that prune: the share of entries that is kept")
    option("--seed", metavar="N", type=options.whole(0), help="of dare: which entries (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    """Combines."""
    import jax

    import lora_jax as lora
    from lora_jax.cli.base import adapters_of, write

    dare = arguments.method.startswith("dare")
    if arguments.seed is not None and not dare:
        raise ValueError(f"--seed does nothing with --method {arguments.method}: leave it out")
    options.refuse_existing(arguments.out)
    base, adapters = adapters_of(arguments.model, [given.path for given in arguments.adapter])
    combined = lora.combine(
        adapters,
        [given.weight for given in arguments.adapter],
        method=arguments.method,
        rank=arguments.rank,
        density=arguments.density,
        key=jax.random.key(arguments.seed or 0) if dare else None,
        base=base.deferred(),
    )
    write(arguments.out, combined, base, arguments.model)
