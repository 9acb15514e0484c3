"""Peak memory of `lora-jax merge` on a checkpoint of 2 GB: python experiments/merge_memory/run.py [--layers N]."""

import argparse
import functools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

HERE = Path(__file__).parent
# TinyLlama's sizes, in bfloat16: 2.2 GB at its 22 layers.
CONFIG = {"vocab_size": 32_000, "hidden_size": 2_048, "intermediate_size": 5_632, "num_attention_heads": 32}
CONFIG |= {"num_key_value_heads": 4, "max_position_embeddings": 2_048, "tie_word_embeddings": False}
SHARD = 500_000_000
RANK = 16
CASES = {
    "start": None,
    "merge": [],
    "merge, --round stochastic": ["--round", "stochastic"],
    "merge, --dtype float32": ["--dtype", "float32"],
    "merge, DoRA": [],
    "naive": None,
}


def model_of(layers):
    from lora_jax.models import llama

    return llama.Llama(llama.Config(num_hidden_layers=layers, **CONFIG))


def make(folder, layers):
    """A checkpoint of random weights, and an adapter on all of its linear layers, the head too, of LoRA and of DoRA."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import lora_jax as lora
    from lora_jax import models, tree
    from lora_jax.formats import huggingface

    def drawn(name, shape, dtype):
        draws = np.random.default_rng(zlib.crc32(name.encode()))
        return (0.02 * draws.standard_normal(shape, np.float32)).astype(dtype)

    model = model_of(layers)
    shapes = jax.eval_shape(model.clone(scan=False).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), jnp.bfloat16), x.shape), shapes)
    tensors = {
        name: huggingface.Lazy(x.shape, x.dtype, functools.partial(drawn, name, x.shape, x.dtype))
        for name, x in huggingface.export(zeros, models.names(model)).items()
    }
    config = {**models.writing.config_of(model), "torch_dtype": "bfloat16"}
    huggingface.write(folder / "model", tensors, config=config, max_shard_size=SHARD)

    base = models.Stored.of(folder / "model", *models.load(folder / "model", abstract=True))
    for name, variant in (("adapter", lora.LoRA(RANK, alpha=32)), ("dora", lora.DoRA(RANK, alpha=32))):
        lora_params = lora.factors.LoraParams()
        leaves = tree.flatten(base.params)[0]
        for path, site in base.sites().items():
            if site.kind == "linear":
                batch, inner, outer = site.sizes()
                shapes = {"A": (*batch, *inner, RANK), "B": (*batch, RANK, *outer)}
                factors = {n: drawn(f"{path}:{n}", shape, np.float32) for n, shape in shapes.items()}
                if name == "dora":
                    factors["magnitude"] = np.full((*batch, *outer), 0.02 * np.prod(inner) ** 0.5, np.float32)
                lora_params[path] = lora.Adapter(factors, variant, site)
        assert {*lora_params} < {*leaves}
        lora.save(folder / f"{name}.safetensors", lora_params, base.fingerprint())


def run(case, folder, out):
    """One case, in this process."""
    import jax

    if case == "start":
        import lora_jax.formats.huggingface  # noqa: F401  (imported for its memory, which is what this case measures)

        jax.block_until_ready(jax.numpy.zeros(1))
        return 0
    if case == "naive":
        import lora_jax as lora
        from lora_jax import models

        model, params = models.load(folder / "model")
        models.save(out, model, lora.merge(params, lora.load(folder / "adapter.safetensors")), source=folder / "model")
        return 0
    from lora_jax import cli

    adapter = folder / ("dora.safetensors" if "DoRA" in case else "adapter.safetensors")
    return cli.main(["merge", "--model", f"{folder}/model", "--adapter", str(adapter), "--out", str(out), *CASES[case]])


def child(case, folder, out):
    start, used = time.perf_counter(), time.process_time()
    if run(case, folder, out):
        sys.exit(1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - start, "cpu": time.process_time() - used}))


def measured(case, folder, out, layers):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, __file__, "--case", case, "--folder", str(folder), "--out", str(out)]
    done = subprocess.run([*command, "--layers", str(layers)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case}: {done.stderr}")
    said = [line for line in (*done.stdout.splitlines()[:-1], *done.stderr.splitlines()) if "update" in line]
    return json.loads(done.stdout.splitlines()[-1]) | ({"said": said[0]} if said else {})


def same_weights(one, other):
    """Whether two directories hold the same tensors; and if not, the share of entries that differ."""
    import numpy as np

    from lora_jax.formats import huggingface

    pairs = [huggingface.open_checkpoint(folder).tensors for folder in (one, other)]
    assert {*pairs[0]} == {*pairs[1]}
    differing = sum(int((np.asarray(pairs[0][n]) != np.asarray(pairs[1][n])).sum()) for n in pairs[0])
    return differing / sum(int(np.prod(x.shape)) for x in pairs[0].values())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--cases", nargs="+", default=[*CASES])
    for name in ("case", "folder", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case == "make":
        return make(Path(given.folder), given.layers) or print("{}")
    if given.case:
        return child(given.case, Path(given.folder), Path(given.out))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "base")
        folder.mkdir()
        measured("make", folder, "", given.layers)
        files = sorted((folder / "model").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"{len(files)} shards, {size / 1e6:.0f} MB")
        kept = {}
        for number, case in enumerate(given.cases):
            out = Path(temporary, str(number))
            rows.append({"case": case, **measured(case, folder, out, given.layers)})
            row = rows[-1]
            print(case, f"{row['peak'] / 1e6:.0f} MB", f"{row['seconds']:.0f} s, {row['cpu']:.0f} s of CPU", flush=True)
            if case in ("merge", "naive"):
                kept[case] = out
            elif out.exists():
                shutil.rmtree(out)
        differing = same_weights(*kept.values()) if len(kept) == 2 else None
        print("entries that differ from lora_jax.merge's:", differing)
    versions = {name: __import__(name).__version__ for name in ("jax", "numpy", "safetensors")}
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **versions,
    }
    found = {**about, "bytes": size, "differing": differing, "rows": rows}
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
