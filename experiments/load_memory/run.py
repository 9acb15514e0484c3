"""Peak memory of loading and saving a checkpoint of 2 GB: python experiments/load_memory/run.py [--layers N]."""

import argparse
import filecmp
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
# TinyLlama's sizes, in bfloat16: 2.2 GB at its 22 layers.
VOCABULARY, WIDTH, HIDDEN, KEYS = 32_000, 2_048, 5_632, 256
SHARD = 500_000_000
CASES = ("start", "naive", "load", "load, layers apart", "load, fsdp=8", "load and save", "load and save, fsdp=8")
CASES += ("load as float32", "load and save, layers apart")

MODULES = {
    "attention/query": ("self_attn.q_proj", WIDTH, WIDTH),
    "attention/key": ("self_attn.k_proj", WIDTH, KEYS),
    "attention/value": ("self_attn.v_proj", WIDTH, KEYS),
    "attention/output": ("self_attn.o_proj", WIDTH, WIDTH),
    "mlp/gate": ("mlp.gate_proj", WIDTH, HIDDEN),
    "mlp/up": ("mlp.up_proj", WIDTH, HIDDEN),
    "mlp/down": ("mlp.down_proj", HIDDEN, WIDTH),
}
LAYER = r"layers(?:_(?P<layer>\d+))?/"
NAMES = [
    ("embeddings", "model.embed_tokens", "embedding"),
    ("head", "lm_head", "linear"),
    ("last_norm", "model.norm", "vector"),
    (LAYER + "attention_norm", "model.layers.{layer}.input_layernorm", "vector"),
    (LAYER + "mlp_norm", "model.layers.{layer}.post_attention_layernorm", "vector"),
    *((LAYER + ours, "model.layers.{layer}." + theirs, "linear") for ours, (theirs, _, _) in MODULES.items()),
]


def shapes(layers, stacked):
    """The parameters' shapes by path, with all layers in one or each in its own."""
    import jax

    each = {f"{ours}/kernel": (inner, outer) for ours, (_, inner, outer) in MODULES.items()}
    each |= {"attention_norm/scale": (WIDTH,), "mlp_norm/scale": (WIDTH,)}
    found = {
        "embeddings/embedding": (VOCABULARY, WIDTH),
        "head/kernel": (WIDTH, VOCABULARY),
        "last_norm/scale": (WIDTH,),
    }
    for path, shape in each.items():
        found |= (
            {f"layers/{path}": (layers, *shape)} if stacked else {f"layers_{i}/{path}": shape for i in range(layers)}
        )
    return {path: jax.ShapeDtypeStruct(shape, "bfloat16") for path, shape in found.items()}


def make(folder, layers):
    """A checkpoint of random weights."""
    import zlib

    import numpy as np

    from lora_jax.formats import huggingface

    def drawn(name, shape, dtype):
        draws = np.random.default_rng(zlib.crc32(name.encode()))
        return draws.standard_normal(shape, np.float32).astype(dtype)

    zeros = {
        path: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for path, leaf in shapes(layers, False).items()
    }
    tensors = {
        name: huggingface.Lazy(x.shape, x.dtype, functools.partial(drawn, name, x.shape, x.dtype))
        for name, x in huggingface.export(zeros, NAMES).items()
    }
    huggingface.write(folder, tensors, config={"torch_dtype": "bfloat16"}, max_shard_size=SHARD)


def run(case, folder, layers, out):
    """One case, in this process."""
    import jax

    if case == "start":
        from lora_jax.formats import huggingface

        return jax.block_until_ready(jax.numpy.zeros(1))
    stacked = "apart" not in case
    if case == "naive":
        import numpy as np
        from safetensors.numpy import load_file

        tensors = {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}
        params = {}
        for ours, (theirs, _, _) in MODULES.items():
            kernels = [tensors[f"model.layers.{i}.{theirs}.weight"].T for i in range(layers)]
            params[ours] = jax.numpy.asarray(np.stack(kernels))
        params["embeddings"] = jax.numpy.asarray(tensors["model.embed_tokens.weight"])
        params["head"] = jax.numpy.asarray(tensors["lm_head.weight"].T)
        return jax.block_until_ready(params)

    from jax.sharding import PartitionSpec as P

    import lora_jax as lora
    from lora_jax.formats import huggingface

    rules = {"layers/.*/kernel": P(None, "fsdp"), "(embeddings|head)/.*": P("fsdp"), ".*": P()}
    mesh = jax.make_mesh((8,), ("fsdp",)) if "fsdp" in case else None
    where = functools.partial(lora.match_partition_rules, rules, mesh=mesh) if mesh else None
    checkpoint = huggingface.open_checkpoint(folder)
    dtype = "float32" if "float32" in case else None
    params = huggingface.fill(shapes(layers, stacked), checkpoint, NAMES, dtype, shardings=where)
    if "save" in case:
        huggingface.save(out, params, NAMES, source=checkpoint, max_shard_size=SHARD)


def child(case, folder, layers, out):
    start, used = time.perf_counter(), time.process_time()
    run(case, folder, layers, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - start, "cpu": time.process_time() - used}))


def measured(case, folder, layers, out):
    devices = "--xla_force_host_platform_device_count=8" if "fsdp" in case else ""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    command = [
        sys.executable,
        __file__,
        "--case",
        case,
        "--folder",
        str(folder),
        "--out",
        str(out),
        "--layers",
        str(layers),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--cases", nargs="+", default=CASES)
    for name in ("case", "folder", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case == "make":
        return make(Path(given.folder), given.layers) or print("{}")
    if given.case:
        return child(given.case, Path(given.folder), given.layers, Path(given.out))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        measured("make", folder, given.layers, "")
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"{len(files)} shards, {size / 1e6:.0f} MB")
        for number, case in enumerate(given.cases):
            out = Path(temporary, str(number))
            row = {"case": case, **measured(case, folder, given.layers, out)}
            row["loaded"] = 0 if case == "start" else size * (2 if "float32" in case else 1)
            row["beyond"] = row["peak"] - row["loaded"]
            if out.exists():
                row["same_files"] = all(filecmp.cmp(file, out / file.name, shallow=False) for file in folder.iterdir())
            rows.append(row)
            sizes = [f"{row[name] / 1e6:.0f} MB" for name in ("peak", "beyond")]
            print(case, *sizes, f"{row['seconds']:.0f} s, {row['cpu']:.0f} s of CPU", row.get("same_files"), flush=True)
    versions = {name: __import__(name).__version__ for name in ("jax", "numpy", "safetensors")}
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **versions,
    }
    (HERE / "results.json").write_text(json.dumps({**about, "bytes": size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
