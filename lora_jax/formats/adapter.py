"""An adapter, in whichever form it is on the disk: a native file, PEFT's folder, or checkpoints of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax import tree
from lora_jax.factors import Adapter, LoraParams, check_fits
from lora_jax.fingerprint import check_base
from lora_jax.formats import atomic, native, peft
from lora_jax.formats.names import Names
from lora_jax.initial.names import changes_base

NATIVE = "adapter.safetensors"  # in a folder
PEFT = "adapter_config.json"
CHECKPOINTS = "checkpoints"
HINT = "give an adapter's file or folder"


class Found(NamedTuple):
    """Where an adapter is.

    Attributes:
      form: "native", "peft" or "checkpoints".
      path: The native file, or the folder.
    """

    form: str
    path: Path


def find(path: str | os.PathLike[str]) -> Found:
    """Which form an adapter has.

    Args:
      path: A native file; or a folder with an adapter.safetensors, PEFT's files, or checkpoints of a run, whichever of
        them is there first: a native file has all bits of any variant, and a run that was cut off has neither.

    Raises:
      FileNotFoundError: There is no adapter; the message says what there is instead.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such adapter: {HINT}")
    if not path.is_dir():
        return Found("native", path)
    if (path / NATIVE).is_file():
        return Found("native", path / NATIVE)
    if (path / PEFT).is_file():
        return Found("peft", path)
    for folder in (path, path / CHECKPOINTS):
        if folder.is_dir() and any(x.name.isdecimal() and x.is_dir() for x in folder.iterdir()):
            return Found("checkpoints", folder)
    if (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: a model's directory, and no adapter: {HINT}")
    raise FileNotFoundError(f"{path}: neither {NATIVE} nor {PEFT} nor checkpoints are in it: {HINT}")


def load(
    path: str | os.PathLike[str],
    params: Any,
    names: Names,
    *,
    base: Callable[[str | None], Mapping[str, str]] | None = None,
) -> LoraParams:
    """Reads an adapter of a model.

    Args:
      path: As `find` takes it.
      params: The model's parameters, or their shapes, or what `huggingface.deferred` returns.
      names: The model's name map.
      base: The model's fingerprint in a dtype, or for None in that of its files, as `huggingface.fingerprint` gives it;
        without it, that the adapter was made for this base is not checked. PEFT's folders do not know theirs.

    Raises:
      FileNotFoundError: There is no adapter.
      ValueError: It is damaged, does not fit, or was made for another base.
    """
    form, path = find(path)
    if form == "peft":
        return peft.load(path, params, names)
    if form == "native":
        lora_params, made_for = native.load(path), native.about(path)[1]
    else:
        from lora_jax.formats import orbax

        lora_params, made_for = orbax.load(path), orbax.found(path)[2]["base"]
    if base is not None and made_for is not None:
        _check(path, made_for, base)
    try:
        check_fits(lora_params, tree.flatten(params)[0])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return lora_params


def _check(path: Path, made_for: Mapping[str, str], base: Callable[[str | None], Mapping[str, str]]) -> None:
    """Raises where an adapter was made for another base; one that was loaded in another dtype is the same."""
    stored = base(None)
    if made_for == stored:
        return
    dtypes = {form.partition("[")[0] for form in made_for.values()}
    if len(dtypes) == 1 and dtypes != {form.partition("[")[0] for form in stored.values()}:
        (dtype,) = dtypes
        if dtype in ("float32", "bfloat16", "float16"):
            stored = base(dtype)
    check_base(str(path), made_for, stored)


def save(
    directory: str | os.PathLike[str],
    lora_params: Mapping[str, Adapter],
    names: Names,
    *,
    base: Any,
    fingerprint: Mapping[str, str],
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    portable: bool = False,
) -> str | None:
    """Writes an adapter's folder: adapter.safetensors, and PEFT's two files where PEFT can say what it is.

    Args:
      directory: The folder; one that is not there appears with all files at once, where its own folder exists. In one
        that is there, an adapter is replaced and other files stay.
      lora_params: What trains. After PiSSA and others that change the base, what `relative_to` returns.
      names: The model's name map.
      base: The model's parameters as Hugging Face has them, or their shapes, or what `huggingface.deferred` returns.
        Values are read where PEFT saves more of a module than trains here.
      fingerprint: The base's, as `huggingface.fingerprint` has it of its files, or `lora_jax.fingerprint` of arrays.
      base_model_name_or_path: Where PEFT finds the model.
      task_type: PEFT's word for it, such as "CAUSAL_LM".
      portable: As in `peft.save`.

    Returns:
      None; or why there are no files of PEFT's.

    Raises:
      ValueError: The adapters have no form in a file, or are of a base that is nowhere.
      OSError: The files cannot be written.

    >>> import jax, jax.numpy as jnp, tempfile, lora_jax as lora
    >>> params, names = {"head": {"kernel": jnp.ones((8, 4))}}, [("head", "lm_head", "linear")]
    >>> _, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(rank=2)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/new", lora_params, names, base=params, fingerprint=lora.fingerprint(params))
    ...     sorted(file.name for file in Path(folder, "new").iterdir())
    ['adapter.safetensors', 'adapter_config.json', 'adapter_model.safetensors']
    """
    directory = Path(directory)
    for path, adapter in lora_params.items():
        if changes_base(init := getattr(adapter.variant, "init", None)):
            raise ValueError(
                f"'{path}': init={init!r} took a part of the base into the factors, and files have the whole base: "
                "save what `relative_to(params, frozen, lora_params)` returns"
            )
    if not directory.exists():
        with atomic.directory(directory) as new:
            return save(
                new,
                lora_params,
                names,
                base=base,
                fingerprint=fingerprint,
                base_model_name_or_path=base_model_name_or_path,
                task_type=task_type,
                portable=portable,
            )
    native.save(directory / NATIVE, lora_params, fingerprint)
    about = {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    try:
        peft.save(directory, lora_params, names, base=base, portable=portable, **about)
    except ValueError as error:
        return str(error).removeprefix(f"{directory}: ")
    return None


def paths(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The leaves that an adapter says it is for; PEFT's names none of ours."""
    form, path = find(path)
    if form == "native":
        return (*native.about(path)[0],)
    if form == "checkpoints":
        from lora_jax.formats import orbax

        return (*orbax.found(path)[2]["adapters"],)
    return ()
