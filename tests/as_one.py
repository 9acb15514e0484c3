"""Training as several processes, of which none holds a weight whole, is training as one on one device.

`process` is what each of them does, and `agree` what is then asked; tests/test_checkpoint_mesh.py starts them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

RNG = np.random.default_rng(0)
PARAMS = {
    name: RNG.normal(0, 0.2, shape).astype("float32") for name, shape in {"up": (16, 32), "down": (32, 16)}.items()
}
SPECS = {"up": P("fsdp"), "down": P(None, "fsdp")}
BATCH = RNG.normal(0, 1, (2, 16, 16)).astype("float32")
VARIANTS = {"LoRA": lora.LoRA(4), "DoRA": lora.DoRA(4)}


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2)


@functools.partial(jax.jit, static_argnums=3)
def trained(frozen, lora_params, batch, places):
    """Five steps of Adam, each leaving the factors where they lay."""
    tx = lora.optimizer(optax.adam(1e-2))

    def step(carry, _):
        lora_params, state = carry
        value, grads = jax.value_and_grad(lambda lp: lora.lift(loss)(lora.attach(frozen, lp), batch))(lora_params)
        updates, state = tx.update(grads, state)
        carry = optax.apply_updates(lora_params, updates), state
        return (carry if places is None else jax.lax.with_sharding_constraint(carry, places())), value

    (lora_params, _), losses = jax.lax.scan(step, (lora_params, tx.init(lora_params)), length=5)
    return lora_params, losses


def found(params, batch, variant):
    """What a run finds: how its losses fell, what trained, the merged weights, and the adapters themselves."""
    frozen, lora_params = lora.split(jax.random.key(0), params, {".*": variant})
    places = None
    if not isinstance(params["up"], np.ndarray):
        state = lora_params, jax.eval_shape(lora.optimizer(optax.adam(1e-2)).init, lora_params)
        places = functools.partial(lora.shardings, state, params)
    after, losses = trained(frozen, lora_params, batch, places)
    return after, np.array(losses), str(lora.summary(frozen, lora_params)), lora.merge(frozen, after), lora_params


def process(folder):
    """One of several processes: FSDP by two across processes, and data parallel by what is left."""
    mesh = Mesh(np.reshape(jax.devices(), (2, -1)), ("fsdp", "data"))

    def part(array, spec):
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), array.__getitem__)

    params = {path: part(array, SPECS[path]) for path, array in PARAMS.items()}
    batch = part(BATCH, P(None, ("data", "fsdp")))
    base = lora.fingerprint(params)
    assert base == lora.fingerprint(PARAMS) and lora.fingerprint([params, BATCH]) == lora.fingerprint([PARAMS, BATCH])
    for name in VARIANTS:
        after, losses, summary, merged, before = found(params, batch, VARIANTS[name])
        places = lora.shardings(after, params)
        for factors in (before, after):
            lies = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), factors, places)
            assert jax.tree.all(lies), lies
        assert all(merged[path].sharding.is_equivalent_to(x.sharding, x.ndim) for path, x in params.items())
        for array in (before["up"].factors["A"], before["down"].factors["B"], *params.values()):
            assert not array.is_fully_addressable and not array.is_fully_replicated

        file = folder / f"{name}.safetensors"
        with pytest.raises(ValueError, match="'down' has factor B spread over several processes.* in all of them"):
            lora.save(file, after)
        assert not file.exists()
        whole = jax.device_put((after, merged), NamedSharding(mesh, P()))
        with pytest.raises(ValueError, match="in all of them, base = lora.fingerprint"):
            lora.save(file, whole[0], params)
        own = folder / f"{name}_{jax.process_index()}.safetensors"
        lora.save(own, whole[0], base)  # each could; one is enough
        loaded = jax.device_put(lora.load(own, base), places)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, after))
        np.savez(folder / f"{name}_{jax.process_index()}.npz", losses=losses, summary=summary, **whole[1])


@functools.cache
def one_device(name):
    return found(PARAMS, BATCH, VARIANTS[name])


def agree(folder, count):
    """What so many processes found is what one device finds."""
    for name in VARIANTS:
        after, losses, summary, merged, _ = one_device(name)
        assert losses[-1] < 0.97 * losses[0]
        for i in range(count):
            its = np.load(folder / f"{name}_{i}.npz")
            np.testing.assert_allclose(its["losses"], losses, rtol=0, atol=1e-5)
            assert str(its["summary"]) == summary
            for path in PARAMS:
                np.testing.assert_allclose(its[path], merged[path], rtol=0, atol=1e-5)
            saved = lora.load(folder / f"{name}_{i}.safetensors", PARAMS)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), saved, after)
