"""The step that is planned: the library's own straight line on a Llama of no weights, lowered for a mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax import compat
from lora_jax.models.llama import Config, Llama, partition_rules
from lora_jax.recipes import save_products

AXES = ("data", "fsdp", "tp")
REMAT = {"none": False, "products": save_products, "full": True}
TARGETS = {
    "all-linear": r".*/layers/.*/(query|key|value|output|gate|up|down)/kernel",
    "attention": r".*/layers/attention/(query|key|value|output)/kernel",
}
# Next to nothing trains, and a gradient passes through all that one passes through when factors do.
FROZEN = {".*/layers/attention_norm/scale": lora.Full()}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be planned.

    Attributes:
      config: The model's.
      mesh: The number of devices along each of the axes "data", "fsdp" and "tp"; 1 where it is not named.
      batch: Sequences in a step, on all devices together.
      length: Tokens in a sequence.
      rules: What trains, as `lora_jax.split` has it; `FROZEN` for the model's own forward and backward pass.
      what: The same in words.
      dtype: Of the base, and of activations.
      remat: What a layer keeps for its backward pass: "none" of it is made anew, all but "products" of weights, or
        the "full" layer.
    """

    config: Config
    mesh: Mapping[str, int]
    batch: int = 8
    length: int = 2048
    rules: Any = dataclasses.field(default_factory=lambda: {TARGETS["all-linear"]: lora.LoRA(rank=16)})
    what: str = "LoRA(16) of all-linear"
    dtype: str = "bfloat16"
    remat: str = "products"

    def __post_init__(self) -> None:
        config, sizes = self.config, self.sizes
        rows = sizes["data"] * sizes["fsdp"]
        if self.batch % rows:
            raise ValueError(f"a batch of {self.batch} is split over data × fsdp = {rows}: take a multiple of that")
        for axis, name in (
            ("tp", "num_key_value_heads"),
            ("tp", "intermediate_size"),
            ("tp", "vocab_size"),
            ("fsdp", "hidden_size"),
        ):
            if (size := getattr(config, name)) % sizes[axis]:
                raise ValueError(f"{axis}={sizes[axis]} does not divide {name}, {size}: take a number that does")
        if self.length > config.max_position_embeddings:
            raise ValueError(f"a length of {self.length} is more than {config.max_position_embeddings} positions")

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh with all of its axes."""
        if unknown := [axis for axis in self.mesh if axis not in AXES]:
            raise ValueError(f"the mesh has an axis {unknown[0]!r}: its axes are {', '.join(AXES)}")
        return {axis: self.mesh.get(axis, 1) for axis in AXES}

    @property
    def devices(self) -> int:
        """How many there are."""
        return int(np.prod([*self.sizes.values()]))


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step that is lowered, and its operands: trees of `jax.ShapeDtypeStruct` with shardings."""

    lowered: Any
    base: Any
    lora_params: Any
    state: Any
    tokens: Any


def lower(job: Job, devices: Any = None) -> Step:
    """Trace the step and lower it; nothing is computed, and no array is made.

    Args:
      job: What is planned.
      devices: As many as the mesh has; None for the first of `jax.devices()`.

    Raises:
      ValueError: There are fewer devices than the mesh has; or as `lora_jax.split`.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < job.devices:
        raise ValueError(
            f"the mesh has {job.devices} devices and JAX {len(devices)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={job.devices} before JAX is imported"
        )
    sizes = job.sizes
    grid = np.array(devices[: job.devices]).reshape(*sizes.values())
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    model = Llama(job.config, param_dtype=job.dtype, remat=REMAT[job.remat], sharding=rows)
    tokens = jax.ShapeDtypeStruct((job.batch, job.length), jnp.int32, sharding=rows)
    chunk = 512 * sizes["data"] * sizes["fsdp"]

    def loss_fn(params: Any, tokens: jax.Array, recompute: bool = True) -> Any:
        return model.apply(params, tokens, method="loss", chunk=chunk, recompute=recompute)

    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    frozen = _on(params, lora.match_partition_rules(partition_rules(job.config), params, mesh))
    sites = lora.sites(loss_fn, frozen, tokens)
    lora_params = jax.eval_shape(lambda tree: lora.split(jax.random.key(0), tree, job.rules, sites=sites)[1], frozen)
    lora_params = _on(lora_params, lora.shardings(lora_params, frozen))
    head = "params/embeddings/embedding" if job.config.tie_word_embeddings else "params/head/kernel"
    loss_of = functools.partial(loss_fn, recompute=head in lora_params)
    tx = lora.optimizer(optax.adamw(1e-4))
    state = jax.eval_shape(tx.init, lora_params)
    state = _on(state, lora.shardings(state, frozen))

    def step(lora_params: Any, state: Any, frozen: Any, tokens: jax.Array) -> Any:
        def objective(lora_params: Any) -> jax.Array:
            return lora.lift(loss_of)(lora.attach(frozen, lora_params), tokens)

        loss, grads = jax.value_and_grad(objective)(lora_params)
        updates, state = tx.update(grads, state, lora_params)
        return optax.apply_updates(lora_params, updates), state, loss

    shardings = jax.tree.map(lambda x: x.sharding, (lora_params, state))
    # Unused are weights that a trained copy stands in for: they lie there all the same.
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, None), keep_unused=True)
    return Step(jitted.lower(lora_params, state, frozen, tokens), frozen, lora_params, state, tokens)


def compiled(step: Step, dtype: str) -> tuple[Any, bool]:
    """The step as XLA compiles it for the devices, and whether it computes in the dtypes that the step has.

    XLA's CPU backend has a pass that makes float32 of all bfloat16, weights and activations alike. It is left out where
    the backend can do without: JAX 0.12's has products of bfloat16, but for those of a single row or column.
    """
    if dtype == "bfloat16" and compat.keeps_bfloat16():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return step.lowered.compile(compiler_options={"xla_disable_hlo_passes": "float-normalization-bf16"}), True
    return step.lowered.compile(), dtype != "bfloat16"


def _on(shapes: Any, shardings: Any) -> Any:
    """Shapes with shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
