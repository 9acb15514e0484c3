"""What a training step on a mesh sends: what the frozen model sends, and what is as small as the factors are.

Programs are compiled for shapes and never run, so weights may be as large against the rank as they are in reality.
"""

from __future__ import annotations

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.plan.collectives import bytes_sent, collectives

LAYERS, D, HEADS, HEAD_DIM, F, RANK = 2, 1024, 16, 64, 4096, 4  # as rank 16 is to 4096
BATCH, LENGTH = 16, 96
SHAPES = {
    "query": (D, HEADS, HEAD_DIM),
    "key": (D, HEADS, HEAD_DIM),
    "value": (D, HEADS, HEAD_DIM),
    "out": (HEADS, HEAD_DIM, D),
    "up": (D, F),
    "down": (F, D),
    "norm": (D,),
}
AXES = {
    **dict.fromkeys(("query", "key", "value"), ("fsdp", "tp", None)),
    "out": ("tp", None, "fsdp"),
    "up": ("fsdp", "tp"),
    "down": ("tp", "fsdp"),
    "norm": (None,),
}
# name: the axes of the mesh, and the one that activations between blocks are split over along their sequence
MESHES = {
    "data 8": ({"data": 8}, None),
    "fsdp 8": ({"fsdp": 8}, None),
    "tp 8": ({"tp": 8}, None),
    "fsdp 4, tp 2": ({"fsdp": 4, "tp": 2}, None),
    "data 2, fsdp 2, tp 2": ({"data": 2, "fsdp": 2, "tp": 2}, None),
    "fsdp 4, tp 2, its sequence too": ({"fsdp": 4, "tp": 2}, "tp"),
    "fsdp 4, sequence 2": ({"fsdp": 4, "sequence": 2}, "sequence"),
}
MIXED = {
    r"(.*/)?(query|up)": lora.LoRA(RANK),
    r"(.*/)?(key|down)": lora.LoRA(RANK, scaling="rank_stabilized"),
    r"(.*/)?(value|out)": lora.DoRA(RANK),
    r"(.*/)?norm": lora.Full(),
}
ALL = {r"(.*/)?(query|key|value|out|up|down)": lora.Full()}
# As many entries as one device has of one layer's smallest kernel; factors have fewer, and so has what they make of x.
LARGE = D * D // 8


class Setting:
    """A transformer on a mesh: a loss, and the shapes of its arguments."""

    def __init__(self, name, stacked):
        sizes, sequence = MESHES[name]
        self.mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        self.stacked = stacked
        self.between = P(tuple(a for a in ("data", "fsdp") if a in sizes) or None, sequence)
        own = sequence if sequence == "sequence" else None
        self.within = P(self.between[0], own, "tp" if "tp" in sizes else None)
        params = {
            leaf: self.shape(((LAYERS,) if stacked else ()) + shape, *(None,) * stacked, *self.on(AXES[leaf]))
            for leaf, shape in SHAPES.items()
        }
        self.params = params if stacked else {str(i): params for i in range(LAYERS)}
        self.x = self.shape((BATCH, LENGTH, D), *self.between)

    def on(self, names):
        return (name if name in self.mesh.shape else None for name in names)

    def shape(self, shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(self.mesh, P(*spec)))

    def lies(self, x, spec):
        return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def block(self, x, p):
        h = x * p["norm"]
        q, k, v = (
            self.lies(jnp.einsum("bsd,dhk->bshk", h, p[name]), self.within) for name in ("query", "key", "value")
        )
        weights = jax.nn.softmax(jnp.einsum("bshk,bthk->bhst", q, k) * HEAD_DIM**-0.5)
        heads = self.lies(jnp.einsum("bhst,bthk->bshk", weights, v), self.within)
        x = self.lies(x + jnp.einsum("bshk,hkd->bsd", heads, p["out"]), self.between)
        hidden = self.lies(jnp.tanh(x @ p["up"]), self.within)
        return self.lies(x + hidden @ p["down"], self.between)

    def loss(self, params, x):
        if self.stacked:
            x, _ = lax.scan(lambda x, p: (self.block(x, p), None), x, params)
        else:
            for p in params.values():
                x = self.block(x, p)
        return jnp.mean(x**2)


@functools.cache
def setting(name, stacked=True):
    return Setting(name, stacked)


@functools.cache
def frozen_model(name, stacked=True):
    """Forward and backward with the weights frozen: what training anything before them would need."""
    s = setting(name, stacked)
    step = jax.jit(jax.value_and_grad(s.loss, 1), out_shardings=(None, s.x.sharding))
    return collectives(step.lower(s.params, s.x).compile())


def adapters(params, rules, sites=None):
    """The factors that `split` would make, as shapes."""
    split = functools.partial(lora.split, jax.random.key(0), rules=rules, sites=sites)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return placed(jax.eval_shape(split, whole)[1], params)


def placed(tree, params):
    shardings = lora.shardings(tree, params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def lifted(name, rules, stacked=True):
    """The whole training step of the factors, which returns the gradient by its input too; and the factors."""
    s = setting(name, stacked)
    lora_params = adapters(s.params, rules, lora.sites(s.loss, s.params, s.x))
    tx = lora.optimizer(optax.sgd(1e-3, momentum=0.9))
    state = placed(jax.eval_shape(tx.init, lora_params), s.params)

    def step(lora_params, state, params, x):
        def objective(lora_params, x):
            return lora.lift(s.loss)(lora.attach(params, lora_params), x)

        value, (grads, of_x) = jax.value_and_grad(objective, (0, 1))(lora_params, x)
        updates, state = tx.update(grads, state, lora_params)
        return optax.apply_updates(lora_params, updates), state, value, of_x

    out = *(jax.tree.map(lambda x: x.sharding, tree) for tree in (lora_params, state)), None, s.x.sharding
    compiled = jax.jit(step, out_shardings=out).lower(lora_params, state, s.params, s.x).compile()
    return collectives(compiled), lora_params


def entries(x):
    return math.prod(x.shape)


def large(found):
    """How often an array of a weight's size is sent, by kind of collective, size of group and of array."""
    sizes = ((x, max(map(entries, pair))) for x in found for pair in zip(x.operands, x.results, strict=True))
    counts = Counter()
    for x, size in sizes:
        if size >= LARGE:
            counts[x.kind, x.group, size] += x.count
    return counts


CASES = [(name, True) for name in MESHES if name != "data 8"] + [("fsdp 4, tp 2", False)]


@pytest.mark.parametrize(("name", "stacked"), CASES)
def test_a_step_sends_little_more_than_the_frozen_model(name, stacked):
    found, _ = lifted(name, MIXED, stacked)
    frozen = frozen_model(name, stacked)
    assert large(found) - large(frozen) == Counter()
    assert bytes_sent(found) < 1.03 * bytes_sent(frozen)


def test_data_parallel_training_reduces_the_gradients_of_the_factors_and_the_loss_and_nothing_else():
    found, lora_params = lifted("data 8", MIXED)
    assert {(x.kind, x.group) for x in found} == {("all-reduce", 8)}
    reduced = sum(x.count * sum(map(entries, x.operands)) for x in found)
    assert reduced == 1 + sum(map(entries, jax.tree.leaves(lora_params)))


@pytest.mark.parametrize("name", ["data 8", "fsdp 4, tp 2"])
def test_training_the_weights_themselves_reduces_their_gradients_beyond_what_the_frozen_model_sends(name):
    found, _ = lifted(name, ALL)
    parts = setting(name).mesh.shape.get("tp", 1)
    gradients = [("all-reduce", 8 // parts, math.prod(SHAPES[leaf]) // parts) for leaf in SHAPES if leaf != "norm"]
    assert large(found) - large(frozen_model(name)) == Counter(LAYERS * gradients)


VARIANTS = {
    "LoRA": lora.LoRA(RANK),
    "orthogonal": lora.LoRA(RANK, init="orthogonal"),
    "DoRA": lora.DoRA(RANK),
    "Full": lora.Full(),
    "IA3": lora.IA3(),
    "VeRA": lora.VeRA(RANK),
    "LoHa": lora.LoHa(RANK),
    "LoKr": lora.LoKr(RANK),
    "AdaLoRA": lora.AdaLoRA(RANK),
    "LoRAFA": lora.LoRAFA(RANK),
}
# These begin with a decomposition of the leaf, which XLA makes of whole matrices.
WHOLE = {
    "LoRAXS": lora.LoRAXS(RANK),
    **{init: lora.LoRA(RANK, init=init) for init in ("pissa", "pissa_niter_4", "olora")},
}
# name: shape, spec, and in and out axes
LAYOUTS = {
    "heads": ((D, HEADS, HEAD_DIM), ("fsdp", "tp", None), (0, (1, 2))),
    "within heads": ((D, HEADS, HEAD_DIM), ("fsdp", None, "tp"), (0, (1, 2))),
    "from within heads": ((HEADS, HEAD_DIM, D), (None, "tp", "fsdp"), ((0, 1), 2)),
}


def leaves(variants):
    """Leaves in each layout for each of the variants, and rules that adapt them."""
    s = setting("data 2, fsdp 2, tp 2")
    params, rules = {}, {}
    for name, variant in variants.items():
        for layout, (shape, spec, (inner, outer)) in LAYOUTS.items():
            params[f"{name}, {layout}"] = s.shape(shape, *spec)
            rules[f"{name}, {layout}"] = variant.at(batch_axes=(), in_axes=inner, out_axes=outer)
    return params, rules


def test_merging_forms_each_weight_where_it_lies():
    params, rules = leaves(VARIANTS | WHOLE)
    lora_params = adapters(params, rules)
    out = jax.tree.map(lambda x: x.sharding, params)
    assert large(collectives(jax.jit(lora.merge, out_shardings=out).lower(params, lora_params).compile())) == Counter()


def test_splitting_gathers_no_weight():
    params, rules = leaves(VARIANTS)
    shardings = lora.shardings(adapters(params, rules), params)

    def split(params):
        return lora.split(jax.random.key(0), params, rules)[1]

    assert large(collectives(jax.jit(split, out_shardings=shardings).lower(params).compile())) == Counter()
