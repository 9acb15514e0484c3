"""Steps of training side by side: python experiments/speed/run.py [--models ...] [--targets ...] [--steps N]."""

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from contenders import CONTENDERS
from models import MODELS, TARGETS, targets_of

HERE = Path(__file__).parent


def compiled(build, model, names, rank):
    """The compiled step with its arguments, and what XLA says of it."""
    step, state, frozen = build(model, model.params(), names, rank)
    arguments = (state, frozen, model.data())
    began = time.perf_counter()
    traced = jax.jit(step, donate_argnums=0).trace(*arguments)
    trace_s = time.perf_counter() - began
    began = time.perf_counter()
    step = traced.lower().compile()
    compile_s = time.perf_counter() - began
    cost, memory = step.cost_analysis(), step.memory_analysis()
    figures = {
        "trace_s": trace_s,
        "compile_s": compile_s,
        "gflop": cost["flops"] / 1e9,
        "gb_accessed": cost["bytes accessed"] / 1e9,
        "temp_mb": memory.temp_size_in_bytes / 1e6,
        "peak_mb": memory.peak_memory_in_bytes / 1e6,
        "trained": sum(x.size for x in jax.tree.leaves(state[0])) if state else 0,
    }
    return step, arguments, figures


def measured(model, targets, contenders, steps):
    names, rank = targets_of(model, targets)
    runs, rows = {}, {}
    for name in contenders:
        runs[name], rows[name] = (lambda s, a, f: ([s, *a], f))(*compiled(CONTENDERS[name], model, names, rank))
    times = {name: [] for name in contenders}
    for i in range(steps + 2):
        for name, run in runs.items():
            step, state, frozen, batch = run
            began = time.perf_counter()
            state, loss = jax.block_until_ready(step(state, frozen, batch))
            if i > 1:
                times[name].append(time.perf_counter() - began)
            run[1] = state
            rows[name]["loss"] = float(loss)
    for name, row in rows.items():
        quarter = statistics.quantiles(times[name], n=4)
        row |= {"step_s": quarter[1], "step_quartiles_s": quarter[::2]}
        base = times.get("full fine-tuning")
        if base:
            ratios = [a / b for a, b in zip(times[name], base, strict=True)]
            row["ratio"] = statistics.median(ratios)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[name for name in MODELS if name != "tiny"], choices=MODELS)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    for name in arguments.models:
        for targets in arguments.targets:
            rows = measured(MODELS[name], targets, arguments.contenders, arguments.steps)
            print(f"\n{name}, {targets}")
            for contender, row in rows.items():
                print(
                    f"  {contender:18} {row['step_s']:7.3f} s  x {row.get('ratio', 0):.3f}  {row['gflop']:9.1f} GFLOP"
                    f"  {row['gb_accessed']:7.2f} GB  temp {row['temp_mb']:7.0f} MB  peak {row['peak_mb']:7.0f} MB"
                    f"  trace {row['trace_s']:.2f} s  compile {row['compile_s']:.1f} s  loss {row['loss']:.4f}"
                )


if __name__ == "__main__":
    main()
