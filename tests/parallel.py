"""Small models as people parallelize them: `MODELS` maps a name to loss, parameters, batch, and how each is sharded.

A spec names mesh axes for every mesh: of a mesh without one of them, `within` leaves that one out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from checks import normal
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

D, F, EXPERTS = 16, 32, 4
ROWS = ("data", "fsdp")


class Model(NamedTuple):
    loss: Callable[..., jax.Array]
    params: Any
    specs: Any
    batch: tuple[jax.Array, ...]
    batch_spec: P = P(ROWS)


def within(spec: P, mesh: Any) -> P:
    """The spec without the axes that a mesh does not have."""

    def kept(entry: Any) -> Any:
        names = entry if isinstance(entry, tuple) else (entry,)
        return tuple(name for name in names if name in mesh.axis_names) or None

    return P(*map(kept, spec))


def typed(spec: P) -> P | None:
    """The sharding of a result, as explicit axes want it where there is a choice."""
    mesh = jax.sharding.get_abstract_mesh()
    return within(spec, mesh) if mesh.explicit_axes else None


def einsum(formula: str, *arrays: jax.Array, out: P) -> jax.Array:
    return jnp.einsum(formula, *arrays, out_sharding=typed(out))


def constrained(x: jax.Array, spec: P) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return lax.with_sharding_constraint(x, within(spec, mesh)) if mesh.auto_axes else x


def distance(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((x - y) ** 2)


def weight(*shape: int, seed: int = 0) -> jax.Array:
    return normal(*shape, seed=seed, scale=shape[-2] ** -0.5)


LAYERS = {"up": weight(2, D, F), "down": weight(2, F, D, seed=1)}
LAYERS_SPECS = {"up": P(None, "fsdp", "tp"), "down": P(None, "tp", "fsdp")}
ROWS_OF_D = normal(16, D, seed=2), normal(16, D, seed=3)


def layers(mlp: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A loss of stacked layers that are scanned over."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        x, _ = lax.scan(lambda x, layer: (x + mlp(x, layer["up"], layer["down"]), None), x, params)
        return distance(x, y)

    return loss


def mlp(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    h = jnp.tanh(einsum("bd,df->bf", x, up, out=P(ROWS, "tp")))
    return einsum("bf,fd->bd", h, down, out=P(ROWS))


def mlp_by_hand(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """Columns, then rows, whose products are added up."""
    rows = within(P("data"), jax.sharding.get_abstract_mesh())
    body = jax.shard_map(
        lambda x, up, down: lax.psum(jnp.tanh(x @ up) @ down, "tp"),
        in_specs=(rows, P(None, "tp"), P("tp")),
        out_specs=rows,
    )
    return body(x, up, down)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(D, name="down")(nn.tanh(nn.Dense(F, name="up")(x)))


DENSE = {"up": {"kernel": weight(D, F), "bias": normal(F)}, "down": {"kernel": weight(F, D, seed=1), "bias": normal(D)}}
DENSE_SPECS = {
    "up": {"kernel": P("fsdp", "tp"), "bias": P("tp")},
    "down": {"kernel": P("tp", "fsdp"), "bias": P()},
}


def linen(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return distance(Linen().apply(params, x), y)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.tanh(self.up(x, out_sharding=typed(P(ROWS, "tp"))))
        return self.down(h, out_sharding=typed(P(ROWS)))


def of_nnx() -> Model:
    graph, state = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))

    def filled(leaves: Any) -> Any:
        return jax.tree.unflatten(
            jax.tree.structure(state), jax.tree.leaves(leaves, is_leaf=lambda x: isinstance(x, P))
        )

    return Model(
        lambda params, x, y: distance(nnx.merge(graph, params)(x), y), filled(DENSE), filled(DENSE_SPECS), ROWS_OF_D
    )


def experts(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Every token through every expert, weighed by the router."""
    gates = jax.nn.softmax(x @ params["router"])
    h = jnp.tanh(einsum("td,edf->etf", x, params["up"], out=P("expert", "data")))
    out = einsum("etf,efd->etd", h, params["down"], out=P("expert", "data"))
    return distance(einsum("etd,te->td", out, gates, out=P("data")), y)


def ragged_experts(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Every token through one expert, sorted by it."""
    scores = jax.nn.softmax(x @ params["router"])
    chosen = jnp.argmax(scores, 1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=EXPERTS).astype("int32")
    h = jnp.tanh(lax.ragged_dot(x[order], params["up"], sizes))
    out = lax.ragged_dot(h, params["down"], sizes)[jnp.argsort(order)]
    return distance(out * jnp.max(scores, 1, keepdims=True), y)


EXPERTS_PARAMS = {
    "router": weight(D, EXPERTS, seed=4),
    "up": weight(EXPERTS, D, F),
    "down": weight(EXPERTS, F, D, seed=1),
}
EXPERTS_SPECS = {"router": P(), "up": P("expert", None, "tp"), "down": P("expert", "tp")}


def attention(params: Any, x: jax.Array, y: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
    x = constrained(x, P("data", "sequence"))
    q, k, v = (jnp.einsum("bld,dh->blh", x, params[name]) for name in "qkv")
    return distance(attend(q, k, v), y)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Queries stay along the length, keys and values are gathered."""
    scores = einsum("blh,bmh->blm", q, k, out=P("data", "sequence"))
    return einsum("blm,bmh->blh", jax.nn.softmax(scores), v, out=P("data", "sequence"))


def attend_by_hand(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    def body(q: jax.Array, *kv: jax.Array) -> jax.Array:
        k, v = (lax.all_gather(x, "sequence", axis=1, tiled=True) for x in kv)
        return attend(q, k, v)

    part = P("data", "sequence")
    return jax.shard_map(body, in_specs=(part,) * 3, out_specs=part)(q, k, v)


ATTENTION = {name: weight(D, D, seed=i) for i, name in enumerate("qkv")}
ATTENTION_SPECS = dict.fromkeys("qkv", P(None, "tp"))
SEQUENCES = normal(4, 16, D, seed=2), normal(4, 16, D, seed=3)


MODELS = {
    "mlp": Model(layers(mlp), LAYERS, LAYERS_SPECS, ROWS_OF_D),
    "mlp by hand": Model(layers(mlp_by_hand), LAYERS, LAYERS_SPECS, ROWS_OF_D),
    "linen": Model(linen, {"params": DENSE}, {"params": DENSE_SPECS}, ROWS_OF_D),
    "nnx": of_nnx(),
    "experts": Model(experts, EXPERTS_PARAMS, EXPERTS_SPECS, ROWS_OF_D),
    "ragged experts": Model(ragged_experts, EXPERTS_PARAMS, EXPERTS_SPECS, ROWS_OF_D),
    "attention": Model(
        functools.partial(attention, attend=attend), ATTENTION, ATTENTION_SPECS, SEQUENCES, P("data", "sequence")
    ),
    "attention by hand": Model(
        functools.partial(attention, attend=attend_by_hand),
        ATTENTION,
        ATTENTION_SPECS,
        SEQUENCES,
        P("data", "sequence"),
    ),
}
