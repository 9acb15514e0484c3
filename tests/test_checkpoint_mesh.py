"""Checkpoints of state that lies on a mesh: restored on others, by other numbers of processes, bit for bit."""

from __future__ import annotations

import faulthandler
import functools
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import as_one
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import processes
import pytest
from checks import randomized
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import distributed, tree
from lora_jax.formats import manifest, orbax
from lora_jax.training import Interrupted, State, evaluate, fit, make_step

pytestmark = pytest.mark.standard_promotion

RNG = np.random.default_rng(0)
PARAMS = {
    name: RNG.normal(0, 0.2, shape).astype("float32") for name, shape in {"up": (16, 32), "down": (32, 16)}.items()
}
SPECS = {"up": P("fsdp", "tp"), "down": P("tp", "fsdp")}
RULES = {"up": lora.LoRA(4), "down": lora.DoRA(4)}
BATCHES = RNG.normal(0, 1, (6, 2, 16, 16)).astype("float32")
TX = lora.optimizer(optax.adam(1e-2))
SAVED, LAST = 3, 5


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2)


class Data:
    """Batches without end, whose position is saved."""

    def __init__(self, mesh):
        self.mesh, self.position = mesh, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return placed(BATCHES[self.position % len(BATCHES)], P(None, "fsdp"), self.mesh)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def placed(array, spec, mesh):
    if mesh is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), array.__getitem__)


class Run:
    """What a run on a mesh, or on one device, has."""

    def __init__(self, mesh):
        params = {path: placed(array, SPECS[path], mesh) for path, array in PARAMS.items()}
        self.mesh, self.data, self.losses = mesh, Data(mesh), []
        self.frozen, lora_params = lora.split(jax.random.key(0), params, RULES)
        self.state = State.create(jax.random.key(1), lora_params, TX)
        self.places = lora.shardings(self.state, self.frozen) if mesh else None
        self.step = make_step(loss, TX, shardings=self.places)

    def checkpoints(self, folder):
        return orbax.Checkpoints(folder, self.frozen, every=1)

    def fit(self, steps, checkpoints=None):
        def note(step, state, metrics):
            self.losses.append(float(metrics["loss"]))

        self.state = fit(
            self.step, self.state, self.frozen, self.data, steps=steps, hooks=[note], checkpoints=checkpoints
        )

    def whole(self):
        """All arrays of the state, as this process alone has them, and what is lost on three batches."""
        state = self.state if self.mesh is None else jax.device_put(self.state, NamedSharding(self.mesh, P()))
        arrays = jax.tree.leaves((state.lora_params, state.opt_state, state.step, jax.random.key_data(state.key)))
        batches = [placed(batch, P(None, "fsdp"), self.mesh) for batch in BATCHES[:3]]
        return [
            *map(np.asarray, arrays),
            np.float32(evaluate(loss, self.frozen, self.state.lora_params, batches)["loss"]),
        ]


def four(folder):
    """Two by four devices of four processes: saves after each step, and goes on both ways."""
    run = Run(Mesh(np.reshape(jax.devices(), (2, 4)), ("fsdp", "tp")))
    (moments, *_) = run.state.opt_state.inner_states["trained"].inner_state
    for array in (run.state.lora_params["up"].factors["B"], moments.mu["down"].factors["A"]):
        assert not array.is_fully_addressable and not array.is_fully_replicated
    with run.checkpoints(folder / "run") as checkpoints:
        run.fit(SAVED, checkpoints)
    saved = run.whole()
    run.fit(LAST)
    undisturbed = run.whole()
    if jax.process_index() == 0:
        np.savez(folder / "found", losses=run.losses, **{f"saved_{i}": x for i, x in enumerate(saved)})
        shutil.copytree(folder / "run", folder / "damaged")
        (folder / "damaged" / str(SAVED) / "lora_jax.json").write_text("{")
    multihost_utils.sync_global_devices("damaged")

    with run.checkpoints(folder / "run") as checkpoints:
        run.state = checkpoints.restore(run.state)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding == place, run.state, run.places))
    np.testing.assert_equal(run.whole(), saved)
    run.data.position = SAVED
    run.fit(LAST)
    np.testing.assert_equal(run.whole(), undisturbed)

    with run.checkpoints(folder / "damaged") as checkpoints:
        assert checkpoints.read(run.state).step == SAVED - 1
        checkpoints.save(SAVED, run.state, position={"process": jax.process_index()})
        found = checkpoints.read(run.state)
    assert (found.step, found.position) == (SAVED, {"process": jax.process_index()})


def goes_on(run, folder):
    """The state as it was saved, and the losses that follow."""
    with run.checkpoints(folder / "run") as checkpoints:
        run.fit(SAVED, checkpoints)  # takes no step
        before = run.whole()
    assert run.losses == []
    run.fit(LAST)
    found = np.load(folder / "found.npz")
    for i, array in enumerate(before[:-1]):
        np.testing.assert_array_equal(array, found[f"saved_{i}"], strict=True)
    np.testing.assert_allclose(run.losses, found["losses"][SAVED:], rtol=0, atol=1e-5)


def two(folder):
    """Two by two devices of two processes, which train as one does; then with the mesh set."""
    as_one.process(folder)
    run = Run(Mesh(np.reshape(jax.devices(), (2, 2)).T, ("fsdp", "tp")))
    with jax.set_mesh(run.mesh):
        goes_on(run, folder)
    if jax.process_index() == 1:  # the other need not know
        loaded = orbax.load(folder / "run", SAVED)
        found = np.load(folder / "found.npz")
        for i, array in enumerate(jax.tree.leaves(loaded)):
            np.testing.assert_array_equal(array, found[f"saved_{i}"], strict=True)
    stops(run, folder / "stopped")
    with run.checkpoints(folder / "damaged") as checkpoints:
        with pytest.raises(ValueError, match="4 processes saved different positions in their data, and now .* 2"):
            checkpoints.read(run.state)


def stops(run, folder):
    """A signal to one of them stops both after the same step, which JAX's runtime takes a while to agree on."""

    def hook(step, *_):
        if (step, jax.process_index()) == (LAST + 1, 1):
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.01)

    with orbax.Checkpoints(folder, run.frozen, every=10**6) as checkpoints, pytest.raises(Interrupted) as found:
        fit(run.step, run.state, run.frozen, run.data, steps=10**6, hooks=[hook], checkpoints=checkpoints)
    assert found.value.code == 128 + signal.SIGTERM
    steps = multihost_utils.process_allgather(np.int32(found.value.step))
    assert manifest.steps(folder) == [steps[0]] == [steps[1]]


def test_a_checkpoint_of_four_processes_goes_on_with_two_that_train_as_one_and_with_one(tmp_path):
    processes.run(tmp_path, 4, __file__, str(tmp_path), "four", environment=processes.slurm)
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"2", "3", "damaged-3"}
    processes.run(tmp_path, 2, __file__, str(tmp_path), "two")
    as_one.agree(tmp_path, 2)
    run = Run(Mesh(np.reshape(jax.devices(), (4, 2)), ("fsdp", "tp")))
    goes_on(run, tmp_path)
    goes_on(Run(None), tmp_path)
    assert {name: adapter.variant for name, adapter in orbax.load(tmp_path / "run").items()} == RULES


SHAPES = {"up": (16, 32), "down": (32, 16), "side": (16, 32)}


@functools.cache
def shared_and_keyed():
    """A state on one device: of LoRA, DoRA, VeRA, which shares factors, and a typed key."""
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    frozen, lora_params = lora.split(jax.random.key(0), params, {**RULES, "side": lora.VeRA(4)})
    return frozen, State.create(jax.random.key(7, impl="rbg"), randomized(lora_params), TX)


def test_a_state_goes_from_mesh_to_mesh(tmp_path):
    """Each checkpoint is saved where the one before was restored; the last is what the first was."""
    auto, explicit = ((kind,) * 2 for kind in (AxisType.Auto, AxisType.Explicit))
    meshes = [
        jax.make_mesh((8, 1), ("fsdp", "tp"), axis_types=auto),
        jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=auto),
        None,
        jax.make_mesh((2, 4), ("tp", "fsdp"), axis_types=explicit),
    ]
    frozen, first = shared_and_keyed()
    state = first
    for step, mesh in enumerate(meshes):
        frozen = {name: placed(frozen[name], SPECS.get(name, P(None, "fsdp")), mesh) for name in frozen}
        places = lora.shardings(first, frozen) if mesh else jax.tree.map(lambda x: x.sharding, first)
        empty = jax.tree.map(lambda x: jax.random.key(0, impl="rbg") if is_key(x) else jnp.zeros_like(x), first)
        like = jax.device_put(empty, places) if mesh else empty
        if step % 2:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        with orbax.Checkpoints(tmp_path, frozen) as checkpoints:
            checkpoints.save(step, state)
            state = checkpoints.restore(like)
        jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), *map(bits, (state, first)))
        assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, state)) == jax.tree.leaves(places)


def test_a_checkpoint_holds_factors_moments_and_scalars_alone(tmp_path):
    frozen, state = shared_and_keyed()
    with orbax.Checkpoints(tmp_path, frozen) as checkpoints:
        checkpoints.save(1, state)
    saved = json.loads((tmp_path / "1" / "lora_jax.json").read_text())["manifest"]["arrays"]
    shapes = {name: [tuple(shape) for _, shape in arrays.values()] for name, arrays in saved.items()}
    own = [x.shape for x in jax.tree.leaves(state.lora_params)]
    trained = [x.shape for name, x in tree.flatten(state.lora_params)[0].items() if not name.startswith("shared")]
    assert sorted(shapes["adapter"]) == sorted(own)
    assert sorted(shapes["rest"]) == sorted([*trained, *trained, (), (), (4,)])  # two moments, two counts, and a key
    with ocp.StandardCheckpointer() as checkpointer:  # what orbax itself says is there
        found = {name: checkpointer.metadata(tmp_path / "1" / name).item_metadata for name in shapes}
    assert {n: [x.shape for x in jax.tree.leaves(dict(found[n].items()))] for n in found} == shapes
    assert not {x.shape for x in jax.tree.leaves(frozen)} & {shape for each in shapes.values() for shape in each}

    arrays = jax.tree.leaves(bits(state))
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < sum(x.nbytes for x in arrays) + 1024 * len(arrays)


def test_two_folders_at_a_time_and_arrays_here_and_there(tmp_path):
    frozen, state = shared_and_keyed()
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    places = dict(zip("abc", [NamedSharding(mesh, P("fsdp")), jax.devices()[3], None], strict=True))
    state = {"state": state, "host": np.arange(8.0)} | {n: jax.device_put(jnp.ones(8), x) for n, x in places.items()}
    first, second = (
        orbax.Checkpoints(tmp_path / name, frozen, lora_params=lambda state: state["state"].lora_params)
        for name in ("first", "second")
    )
    with first, second:
        for step in range(2):
            first.save(step, state), second.save(step, state)
        state["host"][:] = 0
        for found in (first.restore(state), second.restore(state)):
            np.testing.assert_array_equal(found["host"], np.arange(8.0))
            assert [found[name].sharding for name in places] == [state[name].sharding for name in places]


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def bits(state):
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), state)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(processes.PATIENCE, exit=True)  # should it outlive who started it
    distributed.initialize()
    {"four": four, "two": two}[sys.argv[2]](Path(sys.argv[1]))
