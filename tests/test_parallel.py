"""Training on any mesh is training on one device: the losses of 20 steps, and where factors and their moments lie."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import optax
import pytest
from checks import all_adaptable
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from parallel import MODELS, within

import lora_jax as lora

pytestmark = pytest.mark.standard_promotion

VARIANTS = {
    "LoRA": lora.LoRA(4),
    "DoRA": lora.DoRA(4),
    "rsLoRA": lora.LoRA(4, scaling="rank_stabilized"),
    "Full": lora.Full(),
}
DP, FSDP, TP = {"data": 8}, {"fsdp": 8}, {"tp": 8}
FSDP_TP, DP_FSDP_TP = {"fsdp": 4, "tp": 2}, {"data": 2, "fsdp": 2, "tp": 2}
EP, EP_TP = {"data": 2, "expert": 4}, {"data": 2, "expert": 2, "tp": 2}
SP, SP_TP = {"data": 2, "sequence": 4}, {"sequence": 4, "tp": 2}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

TX = lora.optimizer(optax.adam(1e-2))

# model, mesh, variant, kind of axes
CASES = [
    ("mlp", DP, "LoRA", AUTO),
    ("mlp", FSDP, "DoRA", EXPLICIT),
    ("mlp", TP, "LoRA", EXPLICIT),
    ("mlp", FSDP_TP, "rsLoRA", AUTO),
    ("mlp", DP_FSDP_TP, "DoRA", EXPLICIT),
    ("mlp by hand", TP, "DoRA", AUTO),
    ("mlp by hand", {"data": 2, "tp": 4}, "LoRA", EXPLICIT),
    ("linen", DP, "Full", EXPLICIT),
    ("linen", FSDP, "LoRA", AUTO),
    ("linen", TP, "DoRA", AUTO),
    ("nnx", FSDP, "rsLoRA", EXPLICIT),
    ("nnx", FSDP_TP, "Full", AUTO),
    ("nnx", DP_FSDP_TP, "LoRA", AUTO),
    ("experts", EP, "LoRA", EXPLICIT),
    ("experts", EP_TP, "DoRA", AUTO),
    ("ragged experts", EP, "rsLoRA", AUTO),
    ("attention", SP, "LoRA", AUTO),
    ("attention", SP_TP, "DoRA", EXPLICIT),
    ("attention by hand", SP, "DoRA", AUTO),
]


def steps_of(gradients):
    """20 steps as one program, from `gradients(lora_params, frozen, batch)`: what they end in, and the losses."""

    def step(frozen, batch, carried, _):
        lora_params, state = carried
        value, grads = gradients(lora_params, frozen, batch)
        updates, state = TX.update(grads, state)
        return (optax.apply_updates(lora_params, updates), state), value

    def steps(lora_params, frozen, batch):
        begin = lora_params, TX.init(lora_params)
        return lax.scan(functools.partial(step, frozen, batch), begin, length=20)

    return steps


def plainly(loss):
    def gradients(lora_params, frozen, batch):
        return jax.value_and_grad(lambda lp: lora.lift(loss)(lora.attach(frozen, lp), *batch))(lora_params)

    return gradients


@functools.cache
def on_one_device(name, variant):
    """What is trained, and the losses."""
    model = MODELS[name]
    sites = lora.sites(model.loss, model.params, *model.batch)
    rules = {".*": VARIANTS[variant]} if variant == "Full" else all_adaptable(VARIANTS[variant])
    frozen, lora_params = lora.split(jax.random.key(0), model.params, rules, sites=sites)
    _, losses = jax.jit(steps_of(plainly(model.loss)))(lora_params, frozen, model.batch)
    assert losses[-1] < 0.9 * losses[0]
    return frozen, lora_params, losses


def label(case):
    name, sizes, variant, kind = case
    return f"{name}-{'x'.join(f'{axis}{n}' for axis, n in sizes.items())}-{variant}-{kind.name}"


def laid(case):
    """What is trained on a mesh, from where one device starts; and how what comes out is to lie."""
    name, sizes, variant, kind = case
    model = MODELS[name]
    frozen, lora_params, _ = on_one_device(name.removesuffix(" by hand"), variant)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
    lies = jax.tree.map(lambda spec: NamedSharding(mesh, within(spec, mesh)), model.specs, is_leaf=is_spec)
    frozen = jax.device_put(frozen, lies)
    lora_params = jax.device_put(lora_params, lora.shardings(lora_params, frozen))
    batch = jax.device_put(model.batch, NamedSharding(mesh, within(model.batch_spec, mesh)))
    state = jax.eval_shape(TX.init, lora_params)
    return mesh, (lora_params, frozen, batch), lora.shardings((lora_params, state), frozen)


def is_spec(x):
    return isinstance(x, P)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_under_jit(case):
    name, _, variant, kind = case
    *_, expected = on_one_device(name.removesuffix(" by hand"), variant)
    mesh, args, wanted = laid(case)
    # What comes out lies as what goes in: by its type, or because the compiler is told.
    told = (wanted, None) if kind is AUTO else None
    with jax.set_mesh(mesh):
        trained, losses = jax.jit(steps_of(plainly(MODELS[name].loss)), out_shardings=told)(*args)
    assert max(abs(np.asarray(losses) - expected)) < 1e-5
    same = jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), trained, wanted)
    assert all(jax.tree.leaves(same))


def test_explicit_axes_move_what_automatic_ones_do():
    moved = []
    for kind in (AUTO, EXPLICIT):
        mesh, args, (own, _) = laid(("mlp", FSDP_TP, "LoRA", kind))
        gradients = jax.jit(plainly(MODELS["mlp"].loss), out_shardings=(None, own) if kind is AUTO else None)
        with jax.set_mesh(mesh):
            text = gradients.lower(*args).compile().as_text()
        moved.append(sorted(re.findall(r"= (.*(?:all-reduce|all-gather|reduce-scatter|permute|all-to-all))\(", text)))
    assert moved[0] == moved[1] != []


def averaged(loss):
    """Each device's gradients, then their average."""

    def gradients(lora_params, frozen, batch):
        return lax.pmean(plainly(loss)(lora_params, frozen, batch), "data")

    return gradients


def of_the_average(loss):
    """The gradients of the average of each device's loss."""
    return plainly(lambda *args: lax.pmean(loss(*args), "data"))


@pytest.mark.parametrize("name, variant", [("mlp", "LoRA"), ("linen", "Full")])
def test_under_pmap(name, variant):
    frozen, lora_params, expected = on_one_device(name, variant)
    model = MODELS[name]
    batch = [x.reshape(8, -1, *x.shape[1:]) for x in model.batch]
    _, losses = jax.pmap(steps_of(averaged(model.loss)), "data", in_axes=(None, None, 0))(lora_params, frozen, batch)
    assert np.max(abs(np.asarray(losses) - expected)) < 1e-5


@pytest.mark.parametrize("name, variant, how", [("nnx", "rsLoRA", averaged), ("linen", "DoRA", of_the_average)])
def test_under_shard_map(name, variant, how):
    model = MODELS[name]
    frozen, lora_params, expected = on_one_device(name, variant)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AUTO,))
    specs = P(), P(), P("data")
    check = how is of_the_average  # where JAX checks what varies, it sums the gradients of what does not by itself
    gradients = jax.shard_map(how(model.loss), mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check)
    _, losses = jax.jit(steps_of(gradients))(lora_params, frozen, model.batch)
    assert max(abs(np.asarray(losses) - expected)) < 1e-5
