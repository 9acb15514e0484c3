"""How processes find the others; what they do then is in tests/test_checkpoint_mesh.py."""

from __future__ import annotations

import jax
import pytest

from lora_jax import distributed

THREE = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # in a job, but not started by srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, (None, None, None)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "JAX_COORDINATOR_ADDRESS": "host:1"}, ("host:1", None, None)),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, (None, None, None)),
        (THREE, ("host:1", 4, 3)),
    ],
)
def test_the_environment_names_the_others(environment, expected, monkeypatch):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, cluster_detection_method: given.append(args))
    distributed.initialize(environment)
    assert given == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES set, but not JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host has no port"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two is no whole number"),
    ],
)
def test_an_environment_that_names_half_of_it_is_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize({**THREE, **wrong})


def test_a_launcher_that_jax_cannot_follow_is_an_error(monkeypatch):
    """As Open MPI's fifth version is to JAX 0.10."""

    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"JAX does not know who takes part .*: set JAX_COORDINATOR_ADDRESS, JAX_NUM"):
        distributed.initialize({"OMPI_COMM_WORLD_SIZE": "2"})
