"""What lifting adds to tracing a model: python experiments/tracing/run.py [--rounds N]."""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

import lora_jax as lora

FILE = Path(__file__).parent / "results.json"
LAYERS, WIDTH, HEADS = 48, 64, 4
ADAPTED = ("q", "k", "v", "o", "gate", "up", "down")


def normalized(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def layer(p, x):
    """A decoder layer: attention and a gated MLP, 7 products with weights."""
    batch, length, _ = x.shape
    h = normalized(x, p["norm1"])
    q, k, v = ((h @ p[name]).reshape(batch, length, HEADS, -1) for name in "qkv")
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / (WIDTH // HEADS) ** 0.5
    seen = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
    x = x + jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(seen, -1), v).reshape(x.shape) @ p["o"]
    h = normalized(x, p["norm2"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def unrolled(params, x):
    for p in params:
        x = layer(p, x)
    return (x**2).mean()


def jitted(params, x):
    step = jax.jit(layer)  # traced once, called 48 times
    for p in params:
        x = step(p, x)
    return (x**2).mean()


MODELS = {"unrolled": unrolled, "each layer a call of one jitted function": jitted}


def made():
    shapes = dict.fromkeys(ADAPTED, (WIDTH, WIDTH)) | {"gate": (WIDTH, 2 * WIDTH), "up": (WIDTH, 2 * WIDTH)}
    shapes |= {"down": (2 * WIDTH, WIDTH), "norm1": (WIDTH,), "norm2": (WIDTH,)}
    params = [{name: jnp.ones(shape) for name, shape in shapes.items()} for _ in range(LAYERS)]
    return params, jnp.ones((2, 16, WIDTH))


def seconds(fun, *args):
    """The time to trace a function that was never traced before, in a process that has traced nothing."""
    jax.clear_caches()
    began = time.perf_counter()
    jax.make_jaxpr(lambda *args: fun(*args))(*args)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    params, x = made()
    rules = {rf"\d+/({'|'.join(ADAPTED)})": lora.LoRA(rank=4)}
    frozen, lora_params = lora.split(jax.random.key(0), params, rules)

    def lifted(model):
        return lambda lora_params, x: lora.lift(model)(lora.attach(frozen, lora_params), x)

    rows = []
    for name, model in MODELS.items():
        for what, of in (("forward", lambda f: f), ("gradient", jax.grad)):
            pairs = [
                (seconds(of(model), params, x), seconds(of(lifted(model)), lora_params, x)) for _ in range(rounds + 1)
            ][1:]  # the first warms up
            ratios = [b / a for a, b in pairs]
            row = {
                "model": name,
                "traced": what,
                "plain_s": statistics.median(a for a, _ in pairs),
                "lifted_s": statistics.median(b for _, b in pairs),
                "ratio": statistics.median(ratios),
                "quartiles": statistics.quantiles(ratios, n=4)[::2],
            }
            rows.append({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()})
            row = rows[-1]
            print(f"{name}, {what}: {row['plain_s']:.2f} s, lifted {row['lifted_s']:.2f} s, × {row['ratio']:.2f}")
    runs = json.loads(FILE.read_text()) if FILE.exists() else {}
    runs[f"Python {platform.python_version()}, JAX {jax.__version__}"] = {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "layers": LAYERS,
        "rounds": rounds,
        "rows": rows,
    }
    FILE.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
