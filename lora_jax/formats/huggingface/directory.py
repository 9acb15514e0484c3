"""A model's directory as transformers keeps it: which files hold the weights, what is beside them, how to get one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.formats.huggingface.tensors import LARGEST, CheckpointError, Tensor, digest, headers, parsed

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
HUB = "hf://"
PLAIN = re.compile(r"[\w.,+=@ -]{1,200}\.safetensors", re.ASCII)  # no folder, and nothing that a file system may mind
# What is beside the weights: how to generate, and tokenizers of all kinds.
OTHERS = ("generation_config.json", "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json")
OTHERS += ("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
OTHERS += ("*.tiktoken", "tekken.json", "chat_template.json", "chat_template.jinja")


def download(name: str, revision: str | None = None) -> Path:
    """A model of Hugging Face's hub, downloaded or found in its cache: safetensors, JSON and tokenizer files alone.

    Args:
      name: As in "org/name".
      revision: A branch, a tag, or best a commit, whose files stay the same; None for the newest.

    Returns:
      The directory, for the `load` of a model.

    Raises:
      ModuleNotFoundError: huggingface_hub is not installed.
      OSError: The hub has no such model, or does not answer.
    """
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        remedy = "pip install 'lora-jax[hub]', or give a directory"
        raise ModuleNotFoundError(f"'{name}' needs huggingface_hub to be downloaded: {remedy}") from error
    patterns = ["model*.safetensors", INDEX, CONFIG, *OTHERS]
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"'{name}' could not be downloaded ({reason}): correct it, or give a directory") from error
    return Path(found)


def directory_of(model: str | Path) -> Path:
    """The directory of a model: itself, or "hf://ORG/NAME", which `download` gets.

    Raises:
      FileNotFoundError: There is no such directory.
      OSError: The hub has no such model, or does not answer.

    >>> directory_of("no/such")
    Traceback (most recent call last):
    FileNotFoundError: 'no/such' is no directory: give one of a model, or hf://ORG/NAME to download it
    """
    if str(model).startswith(HUB):
        return download(str(model).removeprefix(HUB))
    if not Path(model).is_dir():
        raise FileNotFoundError(f"'{model}' is no directory: give one of a model, or {HUB}ORG/NAME to download it")
    return Path(model)


def tensors_of(directory: Path, sha256: str | Mapping[str, str] | None = None) -> list[Tensor]:
    """The tensors of a directory's files, each name once, by their headers alone.

    Raises:
      FileNotFoundError: The weights or a shard is not there.
      CheckpointError: A file is unreadable or has another digest, or index and shards disagree.
    """
    files, listed = _weights(directory)
    if sha256 is not None:
        _check_digests(files, sha256)
    found = [tensor for file in files for tensor in headers(file)]
    if listed is not None:
        held = {(tensor.name, tensor.file.name) for tensor in found}
        wrong = [f"'{name}' is not in '{file}', where the index lists it" for name, file in sorted(listed - held)]
        wrong += [f"'{name}' is in '{file}', where the index does not list it" for name, file in sorted(held - listed)]
        raise_if(wrong, f"'{directory}': index and shards do not belong together; download all of them anew")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: It is not there.
      CheckpointError: It is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"'{file}' is missing: copy it from where the weights come from")
    if file.stat().st_size > LARGEST:
        raise CheckpointError(f"'{file}' is larger than {LARGEST >> 20} MB, which no such file is: download it anew")
    return parsed(file.read_bytes(), file)


def others(directory: Path) -> list[Path]:
    """The files beside the weights that belong to the model, but for config.json.

    Raises:
      CheckpointError: One is a link to somewhere else.
    """
    found = sorted({file for pattern in OTHERS for file in directory.glob(pattern) if file.is_file()})
    for file in found:
        _check_inside(file)
    return found


def raise_if(problems: list[str], summary: str) -> None:
    """Raises CheckpointError with a line for each problem, if there are any."""
    if problems:
        raise CheckpointError("\n  ".join([f"{summary}:", *problems]))


def _weights(directory: Path) -> tuple[list[Path], set[tuple[str, str]] | None]:
    """The weights files, and the (tensor, file) pairs that the index lists; None where one file holds everything."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.is_file():
        return [single], None
    if not index.is_file():
        remedy = "download one of them, or convert .bin files with transformers' save_pretrained"
        raise FileNotFoundError(f"'{directory}' has neither {single.name} nor {index.name}: {remedy}")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"'{index}' has no weight_map from names to files: download it anew")
    if odd := sorted(name for name in {*listed.values()} if not PLAIN.fullmatch(name)):
        raise CheckpointError(f"'{index}' lists {odd[0][:200]!r}, and a shard is a file beside it: download it anew")
    files = [directory / name for name in sorted({*listed.values()})]
    absent = ", ".join(f"'{file.name}'" for file in files if not file.is_file())
    if absent or not files:
        raise FileNotFoundError(f"'{index}' lists {absent or 'no shards'}, not found beside it: download them")
    for file in files:
        _check_inside(file)
    return files, {*listed.items()}


def _check_digests(files: list[Path], sha256: str | Mapping[str, str]) -> None:
    expected = {files[0].name: sha256} if isinstance(sha256, str) else sha256
    got = {file.name: digest(file) for file in files}
    pairs = {name: (expected.get(name, "none").lower(), got.get(name, "no such file")) for name in {*expected, *got}}
    wrong = [f"'{name}': expected {pair[0]}, got {pair[1]}" for name, pair in sorted(pairs.items()) if len({*pair}) > 1]
    raise_if(wrong, f"'{files[0].parent}': other sha256 digests than expected; download anew, or correct the digests")


def _check_inside(file: Path) -> None:
    """Raises where a file is a link out of its directory, but for those into the blobs of the hub's cache."""
    directory, target = file.parent.resolve(), file.resolve()
    cached = directory.parent.name == "snapshots" and target.is_relative_to(directory.parent.parent / "blobs")
    if not cached and not target.is_relative_to(directory):
        raise CheckpointError(f"'{file}' is a link to '{target}', outside of its directory: put the file itself there")
