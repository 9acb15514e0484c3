"""A plan in words, 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from lora_jax.plan.chips import ASSUMED, CHIPS, USABLE, Chip, Roofline
from lora_jax.plan.plan import Plan, by_kind, meshes
from lora_jax.plan.step import Job
from lora_jax.table import quantity, size, table

PARTS = {
    "base": "base weights, frozen",
    "factors": "factors",
    "optimizer": "their optimizer state",
    "batch": "tokens",
    "temporaries": "activations and all else that a step makes",
    "other": "the loss, and padding",
}
TEMPORARIES = (
    "Memory is what XLA's buffers take on CPUs. GPUs and TPUs fuse more, above all in attention: for what a step makes "
    "they need about as much, or less."
)
NOT_EXACT = (
    "XLA's compiler for CPUs holds bfloat16 activations and gathered weights as float32 here: what a step makes, and "
    "what collectives send, is up to twice what other platforms take. JAX 0.12 compiles bfloat16 as it is, where no "
    "product has a single row or column, as those of rank 1 have."
)
FLOAT32 = (
    "Products of float32 are taken to be as fast as of bfloat16: on TPUs they are, at JAX's default precision; GPUs "
    "take twice as long."
)


def report(plan: Plan, chips: Mapping[str, Chip] = CHIPS) -> str:
    """One plan: memory, arithmetic and collectives of a device, and what this is on each kind of chip."""
    return "\n\n".join([_asked(plan), _mesh(plan), _memory(plan), _work(plan), _chips(plan, chips), _notes([plan])])


def report_smallest(job: Job, found: Mapping[str, Plan], chips: Mapping[str, Chip] = CHIPS) -> str:
    """The fewest chips of each kind that hold a step, as `smallest` has found them."""
    rows = []
    most = max(own.devices for own in meshes(job))
    for name, chip in chips.items():
        if (plan := found.get(name)) is None:
            rows.append((name, size(chip.memory), f"more than {most}", "", "", ""))
        else:
            times = plan.time(chip)
            needed = size(plan.memory.total)
            rows.append((name, size(chip.memory), str(plan.job.devices), _axes(plan), needed, _span(times)))
    head = ("chip", "memory", "how many", "mesh", "needs of each", "a step takes")
    some = list(found.values())
    drawn = table(head, rows, numbers=(1, 2, 4, 5))
    return "\n\n".join([*([_asked(some[0])] if some else []), drawn, _notes(some)])


def _asked(plan: Plan) -> str:
    job = plan.job
    share = plan.trained / plan.parameters
    lines = (
        f"{_number(plan.parameters)} parameters; {_number(plan.trained)} train ({share:.2%}): {job.what}",
        f"{job.batch} × {job.length:,} tokens a step; base in {job.dtype}; remat: {job.remat}",
    )
    return "\n".join(line for text in lines for line in textwrap.wrap(text, 80, break_on_hyphens=False))


def _mesh(plan: Plan) -> str:
    return f"On {plan.job.devices} devices ({_axes(plan)}), each:" if plan.job.devices > 1 else "On one device:"


def _memory(plan: Plan) -> str:
    parts = [(words, getattr(plan.memory, name)) for name, words in PARTS.items()]
    rows = [(words, size(count)) for words, count in parts if count]
    return table(("holds", ""), rows, ("together", size(plan.memory.total)), numbers=(1,))


def _work(plan: Plan) -> str:
    tokens = plan.job.batch * plan.job.length
    whole = plan.flops * plan.job.devices
    rows = [("products of matrices", "", "", f"{quantity(plan.flops)}FLOP")]
    for row in by_kind(plan.collectives):
        rows.append((row["kind"], str(row["count"]), f"among {row['group']}", size(row["bytes"])))
    foot = ("all collectives", "", "", size(plan.sent))
    drawn = table(("computes and sends in a step", "times", "", ""), rows, foot, numbers=(1, 3))
    return f"{drawn}\n\n{quantity(whole)}FLOP on all devices together, {quantity(whole / tokens)}FLOP a token."


def _chips(plan: Plan, chips: Mapping[str, Chip]) -> str:
    rows = []
    for name, chip in chips.items():
        times = plan.time(chip)
        fits = "yes" if plan.fits(chip) else "no"
        each = (f"{1e3 * x:,.0f} ms" for x in (times.compute, times.memory, times.network))
        rows.append((name, size(chip.memory), fits, *each, _span(times)))
    head = ("chip", "memory", "fits", "products", "HBM", "network", "a step takes")
    return table(head, rows, numbers=(1, 3, 4, 5, 6))


def _notes(plans: Sequence[Plan]) -> str:
    lines = [
        f"A step fits where it needs at most {USABLE:.0%} of the memory. {TEMPORARIES}",
        *([NOT_EXACT] if any(not plan.exact for plan in plans) else []),
        f"A step takes from (all collectives behind arithmetic) to (none): {' '.join(ASSUMED)}.",
        *([FLOAT32] if any(plan.job.dtype == "float32" for plan in plans) else []),
    ]
    return "\n".join(textwrap.fill(line, 80) for line in lines)


def _axes(plan: Plan) -> str:
    return ",".join(f"{axis}={size}" for axis, size in plan.job.mesh.items() if size > 1) or "one"


def _number(number: int) -> str:
    unit, word = (1e9, " billion") if number >= 1e9 else (1e6, " million") if number >= 1e6 else (1, "")
    return f"{number / unit:.4g}{word}" if word else f"{number:,}"


def _span(times: Roofline) -> str:
    low, high = (f"{1e3 * x:,.0f}" for x in (times.overlapped, times.in_turn))
    return f"{low} ms" if low == high else f"{low} to {high} ms"
