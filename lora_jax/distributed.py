"""A program as N processes: they find each other by their environment, and what they write is written once."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Calls `jax.distributed.initialize` where the environment says that this process is one of several.

    It says so by three variables, set for each process by whoever starts it. In a shell, on one machine:

        export JAX_COORDINATOR_ADDRESS=localhost:1234 JAX_NUM_PROCESSES=2
        JAX_PROCESS_ID=0 lora-jax demo & JAX_PROCESS_ID=1 lora-jax demo; wait

    (Processes that share a machine's GPUs need `JAX_LOCAL_DEVICE_IDS`, too.) Or by what `srun`, Open MPI's `mpirun` and
    TPU pods set, which JAX reads itself. Otherwise nothing is done.

    Args:
      environment: Variables by name.

    Raises:
      ValueError: Some of the three variables are set, and others neither set nor known from a launcher; or one of them
        is no address, or no number.
      RuntimeError: JAX has computed already, or the processes do not reach each other.
    """
    given = {name: environment[name] for name in NAMES if environment.get(name)}
    if jax.distributed.is_initialized() or not (given or _launched(environment)):
        return
    if len(given) < len(NAMES) and not _launched(environment):
        missing = [name for name in NAMES if name not in given]
        raise ValueError(
            f"{' and '.join(given)} set, but not {' and '.join(missing)}: set {', '.join(NAMES)} for each process, or "
            "none of them to run as one process"
        )
    address, numbers = given.get(NAMES[0]), [given.get(name) for name in NAMES[1:]]
    if address and not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"{NAMES[0]}={address} has no port: give host:port, such as localhost:1234")
    for name, number in zip(NAMES[1:], numbers, strict=True):
        if number and not number.isdecimal():
            raise ValueError(f"{name}={number} is no whole number")
    count, process = (int(number) if number else None for number in numbers)
    try:
        # Where all is given, JAX asks no launcher for it.
        method = "deactivate" if len(given) == len(NAMES) else None
        jax.distributed.initialize(address, count, process, cluster_detection_method=method)
    except ValueError as error:
        raise ValueError(f"JAX does not know who takes part ({error}): set {', '.join(NAMES)}") from error


def _launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several processes."""
    counts = (environment.get(name) or "1" for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(count != "1" for count in counts) or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def check_alone(environment: Mapping[str, str] = os.environ) -> None:
    """Raises where the environment says that this process is one of several.

    Raises:
      ValueError: It does.

    >>> check_alone({"JAX_NUM_PROCESSES": "1"})
    """
    if (environment.get("JAX_NUM_PROCESSES") or "1") != "1" or _launched(environment):
        raise ValueError(
            "this is started as one of several processes, and runs as one, on all of its devices: start it once, or "
            "write a program with lora_jax.training, which runs as several"
        )


@contextlib.contextmanager
def output(folder: Path) -> Iterator[Path]:
    """The folder for this process to write to: process 0 has the one given; others have one that is deleted afterwards.

    All compute the same, so nothing is lost. Nor do others print, but for errors, which are raised.
    """
    if jax.process_index() == 0:
        yield folder
        return
    with tempfile.TemporaryDirectory() as own, open(os.devnull, "w") as nothing:
        with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            yield Path(own)
