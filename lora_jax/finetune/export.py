"""Export: what trained as files that serve: the library's own, PEFT's where there is such a form, and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

import lora_jax as lora
from lora_jax.finetune import folder, journal
from lora_jax.finetune.base import write_labels
from lora_jax.finetune.figure import draw
from lora_jax.finetune.prepare import Job, opened
from lora_jax.formats import adapter
from lora_jax.initial.names import changes_base


def export(job: Job, task: Any, frozen: Any, lora_params: Any) -> dict[str, Any]:
    """Writes the adapter, relative to the model as it is on the disk.

    Returns:
      `peft`: why there is no folder for PEFT, or None; `parameters`: how many numbers train; `labels`: the classes.

    Raises:
      OSError: A file cannot be written.
    """
    settings, out = job.settings, Path(job.settings.out)
    if job.placing.whole is not None:
        lora_params = jax.device_put(lora_params, job.placing.whole)
    base = frozen
    if any(changes_base(getattr(own.variant, "init", None)) for own in lora_params.values()):
        base = opened(job).params
        lora_params = lora.relative_to(base, frozen, lora_params)
    about = {"base_model_name_or_path": settings.model, "task_type": task.peft}
    why = adapter.save(out, lora_params, task.names, base=base, fingerprint=lora.fingerprint(base), **about)
    if job.data.labels:
        write_labels(out, job.data.labels)
    if (out / folder.LOG).is_file():
        draw(journal.read(out / folder.LOG), out / folder.FIGURE)
    trained = lora.summary(base, lora_params).trained
    return {"peft": why, "parameters": trained, "labels": [*job.data.labels]}
