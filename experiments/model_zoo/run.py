"""Models that others wrote, lifted: python experiments/model_zoo/run.py [NAME ...]; adds to results.json and its table.

A name is a model's, such as transformers/bert, or a library's, such as haiku. Each model has a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results.json", HERE / "results.md"
ZOO = {
    "transformers": ["bert", "gpt2", "llama", "vit", "resnet"],
    "tunix": ["llama3", "llama3_remat", "qwen3", "qwen3_experts", "gemma3"],
    "haiku": ["transformer", "layer_stack", "layer_stack_remat", "resnet18"],
    "equinox": ["mlp", "attention", "conv2d", "conv2d_grouped"],
    "flax": ["nnx_scan", "nnx_remat", "linen_scan", "linen_conv"],
}
NAMES = [f"{library}/{model}" for library, models in ZOO.items() for model in models]
PACKAGES = ["jax", "jaxlib", "flax", "transformers", "google-tunix", "dm-haiku", "equinox"]
TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", metavar="NAME", nargs="*", help="models or libraries (default: all)")
    parser.add_argument("--row", action="store_true", help="measure one model here, and print its row as JSON")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in (*NAMES, *ZOO)]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join((*ZOO, *NAMES))}")
    if arguments.row:
        print(json.dumps(row(arguments.names[0])))
        return 0
    environments = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    here = environments.setdefault(f"Python {platform.python_version()}, JAX {version('jax')}", {})
    here.update(versions={package: version(package) for package in PACKAGES}, models=here.get("models", {}))
    failed = False
    for name in NAMES:
        if not arguments.names or name in arguments.names or name.split("/")[0] in arguments.names:
            here["models"][name] = found = in_a_process(name)
            print(line(name, found), flush=True)
            failed |= has_failed(found)
            here["models"] = {name: here["models"][name] for name in NAMES if name in here["models"]}
            RESULTS.write_text(json.dumps(dict(sorted(environments.items())), indent=1) + "\n")
            TABLE.write_text("\n\n".join(table(title, one) for title, one in sorted(environments.items())) + "\n")
    return int(failed)


def in_a_process(name: str) -> dict[str, Any]:
    """The row of a model, measured in a process of its own on the CPU."""
    command = [sys.executable, __file__, "--row", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    sys.stderr.write(done.stderr)
    return {"failure": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


def row(name: str) -> dict[str, Any]:
    """The row of a model; of a library that is not installed, the name of what is missing."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    library, model = name.split("/")
    try:
        import measure

        return measure.of(getattr(importlib.import_module(f"models_{library}"), model))
    except ModuleNotFoundError as error:
        missing = (error.name or "lora_jax").split(".")[0]
        if importlib.util.find_spec(missing) is not None:
            raise
        return {"not installed": missing}


def has_failed(found: dict[str, Any]) -> bool:
    return "failure" in found or any(error > TOLERANCE for error in errors(found).values())


def errors(found: dict[str, Any]) -> dict[str, float]:
    """Of value and gradients, in the widest dtype they were compared in."""
    return list(found["errors"].values())[-1] if "errors" in found else {}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(title: str, environment: dict[str, Any]) -> str:
    versions = [f"{package} {number}" for package, number in environment["versions"].items() if number]
    columns = ["model", "sites", "adapted", "materialized", "error of value", "error of gradients"]
    columns += ["FLOPs / full", "FLOPs / bound", "the same, unfused"]
    head = "| " + " | ".join(columns) + " |"
    rows = [line(name, found) for name, found in environment["models"].items()]
    return "\n".join([f"## {title}", "", ", ".join(versions) + ".", "", head, "|---" * len(columns) + "|", *rows])


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    library, model = name.split("/")
    if "sites" not in found:
        ((what, value),) = found.items()
        return f"| {library} {model} | {what}: {value} " + "| " * 7 + "|"
    kinds = ", ".join(f"{found['sites'][kind]} {kind}" for kind in sorted(found["sites"]))
    fused, unfused = found["flops"], found["flops_unfused"]
    cells = [
        f"{library} {model}",
        kinds,
        found["adapted"],
        len(found["materialized"]),
        *(f"{error:.1e}" + (" (float64)" if "float64" in found["errors"] else "") for error in errors(found).values()),
        f"{fused['lifted'] / fused['full']:.3f}" + (" (unrolled)" if found["unrolled"] else ""),
        f"{fused['lifted'] / fused['bound']:.3f}",
        f"{unfused['lifted'] / unfused['bound']:.3f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    sys.exit(main())
