"""Export: what trained as files that serve: the library's own, PEFT's where there is such a form, and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

import lora_jax as lora
from lora_jax.finetune import folder, journal
from lora_jax.finetune.figure import draw
from lora_jax.finetune.prepare import Job, opened
from lora_jax.formats import peft


def export(job: Job, task: Any, frozen: Any, lora_params: Any) -> dict[str, Any]:
    """Writes the adapter, relative to the model as it is on the disk.

    Returns:
      `peft`: why there is no folder for PEFT, or None; `parameters`: how many numbers train.

    Raises:
      OSError: A file cannot be written.
    """
    settings, out = job.settings, Path(job.settings.out)
    if job.placing.whole is not None:
        lora_params = jax.device_put(lora_params, job.placing.whole)
    inits = {str(getattr(adapter.variant, "init", "")).split("_niter")[0] for adapter in lora_params.values()}
    base = frozen
    if inits & {"pissa", "olora", "corda", "lora_ga"}:  # they begin as a part of the weights
        base = opened(settings, job.directory, job.placing, abstract=False)[1]
        lora_params = lora.relative_to(base, frozen, lora_params)
    if jax.process_index() == 0:
        lora.save(out / folder.ADAPTER, lora_params, base=base)
    why = None
    try:
        peft.save(out, lora_params, task.names, base=base, base_model_name_or_path=settings.model, task_type=task.peft)
    except ValueError as error:
        why = str(error)
    if (out / folder.LOG).is_file():
        draw(journal.read(out / folder.LOG), out / folder.FIGURE)
    trained = lora.summary(base, lora_params).trained
    return {"peft": why, "parameters": trained}
