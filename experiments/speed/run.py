"""Training steps side by side: python experiments/speed/run.py [--models ...] [--targets ...] [--steps N] [--peers]."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from contenders import CONTENDERS
from models import MODELS, TARGETS, Task
from peers import PEERS

HERE = Path(__file__).parent
FILE, TABLE, FIGURE = HERE / "results.json", HERE / "results.md", HERE / "results.png"
ALL = {**CONTENDERS, **PEERS}
FULL = "full fine-tuning"


def compiled(build, task):
    """The compiled step, its arguments, and what XLA says of it."""
    step, state, frozen = build(task, task.model.params())
    arguments = (state, frozen, task.batch)
    began = time.perf_counter()
    traced = jax.jit(step, donate_argnums=0).trace(*arguments)
    trace_s = time.perf_counter() - began
    began = time.perf_counter()
    step = traced.lower().compile()
    cost, memory = step.cost_analysis(), step.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    figures = {
        "trained": sum(x.size for x in jax.tree.leaves(state[0])) if state else 0,
        "trace_s": trace_s,
        "compile_s": time.perf_counter() - began,
        "gflop": cost["flops"] / 1e9,
        "gb_accessed": cost["bytes accessed"] / 1e9,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "peak_mb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes + new) / 1e6,
    }
    return [step, *arguments], figures


def measured(task, contenders, steps):
    """For each contender XLA's figures and the times of steps, which take turns; in seconds and over full's."""
    runs, rows = {}, {}
    for name in contenders:
        try:
            runs[name], rows[name] = compiled(ALL[name], task)
        except ImportError as error:
            print(f"  {name}: {error}")
    times = {name: [] for name in runs}
    for i in range(steps + 2):
        for name, run in runs.items():
            step, state, frozen, batch = run
            began = time.perf_counter()
            run[1], loss = jax.block_until_ready(step(state, frozen, batch))
            if i > 1:  # two steps to warm up
                times[name].append(time.perf_counter() - began)
            rows[name]["loss"] = float(loss)
    for name, row in rows.items():
        ratios = [own / full for own, full in zip(times[name], times[FULL], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        by_hand = statistics.median(own / hand for own, hand in zip(times[name], times["by hand"], strict=True))
        row |= {
            "step_s": statistics.median(times[name]),
            "ratio": middle,
            "quartiles": [low, high],
            "over_hand": by_hand,
        }
        row["fastest_s"] = min(times[name])
        rows[name] = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    return rows


def table(runs):
    """The results as Markdown, one table for each model and choice of targets."""
    lines = []
    for environment, tasks in runs.items():
        lines += [f"# {environment}", ""]
        for name, run in tasks.items():
            lines += [f"## {name}", "", f"{run['steps']} steps of each, in turns.", ""]
            columns = ("step / full", "quartiles", "fastest / full's", "step / by hand")
            columns += ("FLOPs / full", "bytes / full", "temporary / full", "trace", "compile")
            lines += [f"| | {' | '.join(columns)} |", "|---" * 10 + "|"]
            full = run["rows"][FULL]
            for contender, row in run["rows"].items():
                low, high = row["quartiles"]
                shares = (f"{row[key] / full[key]:.3f}" for key in ("gflop", "gb_accessed", "temporary_mb"))
                fastest = row["fastest_s"] / full["fastest_s"]
                words = [f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}", f"{fastest:.3f}"]
                words += [f"{row['over_hand']:.3f}", *shares]
                words += [f"{row['trace_s']:.2f} s", f"{row['compile_s']:.1f} s"]
                lines += [f"| {contender} | {' | '.join(words)} |"]
            lines += ["", f"Full fine-tuning: {full['step_s']:.2f} s, {full['gflop']:.1f} GFLOP a step.", ""]
    return "\n".join(lines)


def draw(tasks):
    """Bars of step times over full fine-tuning's."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 3.6), sharey=True, squeeze=False)
    for axis, (name, run) in zip(axes[0], tasks.items(), strict=True):
        rows = dict(reversed(run["rows"].items()))
        ratios = [row["ratio"] for row in rows.values()]
        spread = [[abs(row["quartiles"][i] - row["ratio"]) for row in rows.values()] for i in (0, 1)]
        colors = ["#d1495b" if contender == "lora_jax" else "#8d99ae" for contender in rows]
        axis.barh(list(rows), ratios, xerr=spread, color=colors, error_kw={"lw": 1})
        axis.axvline(1, color="black", lw=0.8, ls=":")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step time / full fine-tuning", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[name for name in MODELS if name != "tiny"], choices=MODELS)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peers", action="store_true", help="other libraries too, those that are installed")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    runs = json.loads(FILE.read_text()) if FILE.exists() else {}
    environment = f"Python {platform.python_version()}, JAX {jax.__version__}, {os.cpu_count()} CPU cores"
    for name in arguments.models:
        for targets in arguments.targets:
            rows = measured(Task.of(MODELS[name], targets), ALL if arguments.peers else CONTENDERS, arguments.steps)
            print(f"\n{name}, {targets}")
            for contender, row in rows.items():
                print(
                    f"  {contender:18} {row['step_s']:7.3f} s  × {row['ratio']:.3f}  {row['gflop']:8.1f} GFLOP  "
                    f"{row['gb_accessed']:7.2f} GB  temporary {row['temporary_mb']:6.0f} MB  "
                    f"trace {row['trace_s']:.2f} s  compile {row['compile_s']:.1f} s  loss {row['loss']:.4f}",
                    flush=True,
                )
            task = {"steps": arguments.steps, "rows": rows}
            runs.setdefault(environment, {})[f"{name}, {targets}"] = task
            if not arguments.dry_run:
                FILE.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n")
                TABLE.write_text(table(runs))
    if not arguments.dry_run:
        with contextlib.suppress(ImportError):
            draw(runs[environment])


if __name__ == "__main__":
    main()
