"""The plans of README.md by the compiler of a TPU v5p, which needs no TPU: python experiments/scale/tpu.py.

pip install libtpu==0.0.42.* beside JAX 0.10.2. Each takes some minutes; writes tpu.json.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "tpu.json"


def measured(model, mesh, batch, remat):
    from jax.experimental import topologies

    from lora_jax.models.llama import Config
    from lora_jax.plan.memory import memory
    from lora_jax.plan.step import Job, lower

    config = Config.from_huggingface(json.loads((HERE / f"{model}.json").read_text()))
    devices = topologies.get_topology_desc("v5p:2x2x2", platform="tpu").devices
    step, began = lower(Job(config, mesh, batch, remat=remat), devices), time.perf_counter()
    compiled = step.lowered.compile()
    found, peak = memory(step, compiled), compiled.memory_analysis().peak_memory_in_bytes
    return {**vars(found), "total": found.total, "peak": peak, "compile_seconds": round(time.perf_counter() - began)}


def main():
    if len(sys.argv) > 1:
        print(json.dumps(measured(*json.loads(sys.argv[1]))))
        return
    from run import STATED

    rows = {}
    environment = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu"}
    for model, mesh, batch, remat in STATED:
        command = [sys.executable, __file__, json.dumps([model, mesh, batch, remat])]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows[f"{model}, {mesh}, batch {batch}, remat {remat}"] = row = json.loads(done.stdout.splitlines()[-1])
        FILE.write_text(json.dumps(rows, indent=1) + "\n")
        print(model, mesh, batch, remat, row, flush=True)


if __name__ == "__main__":
    main()
