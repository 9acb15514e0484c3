"""`lora-jax plan`: from arguments to a plan in words, and in JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax

import lora_jax as lora
from lora_jax.cli.options import check_new, write_json
from lora_jax.models.llama import Config
from lora_jax.plan.chips import CHIPS, Chip
from lora_jax.plan.plan import LARGEST, plan, smallest
from lora_jax.plan.report import report, report_smallest
from lora_jax.plan.step import TARGETS, Job

# Programs are compiled to be read, and not run: without LLVM's optimizations that takes a third of the time.
FLAGS = "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0"


def run(arguments: argparse.Namespace) -> None:
    """Plans, prints, and writes the file that `--json` names.

    Raises:
      OSError: There is no such file.
      ValueError: An argument does not make sense, or does not fit the model.
    """
    check_new(arguments.json)
    mesh = _mesh(arguments.mesh)
    chips = _chips(arguments.chip)
    pattern = TARGETS.get(arguments.targets, arguments.targets)
    variant = _variant(arguments.variant, arguments.rank)
    job = Job(
        _config(arguments.model),
        mesh,
        arguments.batch,
        arguments.length,
        rules={pattern: variant},
        what=f"{_words(variant)} on {arguments.targets}",
        dtype=arguments.dtype,
        remat=arguments.remat,
    )
    _virtual_devices(job.devices if arguments.mesh else LARGEST)
    if arguments.mesh:
        found = plan(job)
        print(report(found, chips))
        written: Any = found.as_dict()
    else:
        by_chip = smallest(job, chips)
        print(report_smallest(job, by_chip, chips))
        written = {name: made.as_dict() for name, made in by_chip.items()}
    write_json(arguments.json, written)


def _virtual_devices(number: int) -> None:
    """Makes this process have so many CPU devices, if JAX has not begun to use any."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS.format(number)}".strip()
    jax.config.update("jax_platforms", "cpu")


def _config(path: Path) -> Config:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        what = f"there is no config.json in '{path}'" if path.is_dir() else f"'{path}' is no file and no directory"
        raise FileNotFoundError(f"{what}: give a Hugging Face config.json, or a directory that has one")
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is no JSON ({error}): give a Hugging Face config.json") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' holds no JSON object: give a Hugging Face config.json")
    return Config.from_huggingface(content)


def _mesh(text: str | None) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else ():
        axis, _, size = part.strip().partition("=")
        if not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise ValueError(f"--mesh {text}: {part!r} is no axis with its size, once: write it like fsdp=8,tp=4")
        sizes[axis] = int(size)
    return sizes


def _chips(text: str | None) -> dict[str, Chip]:
    names = text.split(",") if text else [*CHIPS]
    if unknown := [name for name in names if name not in CHIPS]:
        raise ValueError(f"--chip {unknown[0]}: the chips are {', '.join(CHIPS)}")
    return {name: CHIPS[name] for name in names}


def _variant(name: str, rank: int) -> lora.Variant:
    kind: Any = lora.Variant.registry.get(name)
    if kind is None:
        raise ValueError(f"--variant {name}: the variants are {', '.join(lora.Variant.registry)}")
    fields = {field.name for field in dataclasses.fields(kind)}
    return kind(rank=rank) if "rank" in fields else kind()


def _words(variant: lora.Variant) -> str:
    rank = getattr(variant, "rank", None)
    return type(variant).__name__ + (f" of rank {rank}" if rank else "")
