"""Llama-3-8B's shapes on one GPU in bfloat16: python experiments/gpu/run.py [--tiny] [--steps N]; writes results.json.

Each case runs in a process of its own, so that its peak of memory is its own.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "results.json"
SPEED = HERE.parent / "speed"
CONTENDERS = ("lora_jax", "by hand", "W + A·B formed", "full fine-tuning")
# Name: sequences, how a layer is kept, and the number of layers, where not all fit: full fine-tuning of 8 of 32.
CASES = {
    f"{contender}, {batch} × 2048, {kept}, {layers} layers": (contender, batch, kept, layers)
    for contender in CONTENDERS
    for batch in (1, 4)
    for kept in ("save_products", "checkpoint")
    for layers in ((8,) if contender == "full fine-tuning" else (32, 8) if contender == "lora_jax" else (32,))
    if batch == 1 or contender in ("lora_jax", "by hand")
}


def matrix_rate(size):
    """FLOP/s of a large product in bfloat16, measured."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    began = time.perf_counter()
    for _ in range(20):
        y = product(x)
    y.block_until_ready()
    return 20 * 2 * size**3 / (time.perf_counter() - began)


def measured(name, tiny, steps):
    """One case: tokens per second, FLOPs, and the peak of memory."""
    sys.path.insert(0, str(SPEED))
    import contenders
    import jax
    import jax.numpy as jnp
    from models import Task, Transformer

    from lora_jax.recipes import cross_entropy, save_products

    contender, batch, kept, layers = CASES[name]
    build = contenders.CONTENDERS[contender]
    if tiny:
        model = Transformer(2, 64, 4, 2, 128, batch, 32, vocab=101, gated=True, dtype="bfloat16")
    else:
        model = Transformer(layers, 4096, 32, 8, 14336, batch, 2048, vocab=128256, gated=True, dtype="bfloat16")
    recipes = {
        "kept": functools.partial(jax.checkpoint, policy=save_products if kept == "save_products" else None),
        "next_token": cross_entropy,
    }
    task = Task.of(model, "all_r16", **recipes)
    keys = iter(jax.random.split(jax.random.key(0), 1000))

    @functools.partial(jax.jit, static_argnums=1)
    def drawn(key, shape):
        return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)

    def stacked(*layers):
        shape = (len(layers), *layers[0].shape)
        return jnp.ones(shape, jnp.bfloat16) if len(shape) == 2 else drawn(next(keys), shape)

    params = model.params(lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    params["layers"] = jax.tree.map(stacked, *params["layers"])
    for name in ("embed", "positions"):
        params[name] = drawn(next(keys), params[name].shape)
    step, state, frozen = build(task, params)
    del params
    began = time.perf_counter()
    step = jax.jit(step, donate_argnums=0).lower(state, frozen, task.batch).compile()
    compile_s, memory = time.perf_counter() - began, step.memory_analysis()
    losses, times = [], []
    for _ in range(steps + 3):
        began = time.perf_counter()
        state, loss = jax.block_until_ready(step(state, frozen, task.batch))
        times.append(time.perf_counter() - began)
        losses.append(float(loss))
    times = sorted(times[3:])
    tokens = model.batch * model.length
    return {
        "step_s": times[len(times) // 2],
        "fastest_s": times[0],
        "slowest_s": times[-1],
        "tokens_per_s": tokens / times[len(times) // 2],
        "flops_per_token": flops_per_token(model, task, contender),
        "compile_s": compile_s,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "peak_gib": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "losses": [losses[0], losses[-1]],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matrix_flops_per_s": matrix_rate(256 if tiny else 8192),
    }


def flops_per_token(model, task, contender):
    """The closed form of what has to be done: 4dk + 6r(d + k) or 6dk for each weight, attention and the head.

    The formed variant counts as LoRA does, so that its fraction of the ceiling is of the same work.
    """
    d, hidden, inner = model.width, model.hidden, model.width // model.heads * model.kv_heads
    shapes = {"q": (d, d), "k": (d, inner), "v": (d, inner), "o": (d, d)}
    shapes |= {"gate": (d, hidden), "up": (d, hidden), "down": (hidden, d)}
    attention = 6 * model.length * d  # causal: half of 12·length·width
    if contender == "full fine-tuning":
        return model.layers * (sum(6 * a * b for a, b in shapes.values()) + attention) + 6 * d * model.vocab
    per_layer = sum(4 * a * b + 6 * task.rank * (a + b) for a, b in shapes.values())
    return model.layers * (per_layer + attention) + 4 * d * model.vocab


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes on any device: writes nothing")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=460, help="seconds after which no further case is begun")
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(arguments.case, arguments.tiny, arguments.steps)))
        return
    began, rows = time.perf_counter(), {}
    for name in CASES:
        if time.perf_counter() - began > arguments.budget:
            print(f"{name}: no time left")
            continue
        command = [sys.executable, __file__, "--case", name, "--steps", str(arguments.steps)]
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        run = subprocess.run(
            [*command, *(["--tiny"] if arguments.tiny else [])],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if run.returncode:
            rows[name] = {"error": run.stderr.strip().splitlines()[-1][:500]}
            print(f"{name}: {rows[name]['error']}", flush=True)
        else:
            row = rows[name] = json.loads(run.stdout.strip().splitlines()[-1])
            row["share_of_ceiling"] = row["tokens_per_s"] * row["flops_per_token"] / row["matrix_flops_per_s"]
            print(
                f"{name}: {row['tokens_per_s']:.0f} tokens/s, {row['share_of_ceiling']:.1%} of the ceiling, peak "
                f"{row['peak_gib']:.1f} GiB, compiled in {row['compile_s']:.0f} s",
                flush=True,
            )
        if not arguments.tiny:
            arguments.out.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
