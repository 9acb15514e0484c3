"""Programs that are run as several processes, which find each other over loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds, on a machine that does other things too


def variables(count, process, port):
    """What a shell loop sets."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(process),
    }


def slurm(count, process, port):
    """What Slurm's srun sets, and, since this machine is not its own, a port."""
    return {
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def run(folder, count, *command, devices=2, environment=variables):
    """Runs `python *command` as so many processes, of so many devices each.

    If one fails, or all take too long, none is left behind, and what the first of them said is the error.

    Returns:
      What each has printed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with contextlib.ExitStack() as stack:
        running = []
        for i in range(count):
            said = stack.enter_context(open(folder / f"said_{i}", "w"))
            own = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path, **environment(count, i, port)}
            process = subprocess.Popen([sys.executable, *command], env=own, stdout=said, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append(process)
        end = time.monotonic() + PATIENCE
        statuses = [None]
        while None in statuses and not any(statuses) and time.monotonic() < end:
            time.sleep(0.05)
            statuses = [process.poll() for process in running]
    said = [(folder / f"said_{i}").read_text() for i in range(count)]
    for i, status in enumerate(statuses):
        assert not status, f"process {i} of {count} ended with {status}:\n{said[i]}"
    assert None not in statuses, f"{count} processes took more than {PATIENCE} s:\n{said[0]}"
    return said
