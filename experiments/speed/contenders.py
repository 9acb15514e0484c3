"""What trains a model, and how: each contender gives `step(state, frozen, batch) -> (state, loss)`.

All run the same model code, adapt the same weights with the same rank and scale, start with B = 0, and use one AdamW.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from models import plain

import lora_jax as lora

SCALE = 2.0
ADAM = optax.adamw(1e-4)


def trained(loss, trainable, frozen, tx=ADAM):
    """The step that trains one tree of arrays beside another that is frozen, and its first state."""

    def step(state, frozen, batch):
        trainable, opt_state = state
        value, grads = jax.value_and_grad(loss)(trainable, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return (optax.apply_updates(trainable, updates), opt_state), value

    return step, (trainable, tx.init(trainable)), frozen


def forward(model, params, names, rank):
    return lambda state, params, batch: (state, model(plain, params, batch)), (), params


def full(model, params, names, rank):
    return trained(lambda params, _, batch: model(plain, params, batch), params, None)


def lora_jax(model, params, names, rank):
    rules = {rf"layers/\d+/({'|'.join(names)})/kernel": lora.LoRA(rank, alpha=SCALE * rank)}
    frozen, lora_params = lora.split(jax.random.key(0), params, rules)

    def loss(lora_params, frozen, batch):
        return lora.lift(functools.partial(model, plain))(lora.attach(frozen, lora_params), batch)

    return trained(loss, lora_params, frozen, lora.optimizer(ADAM))


# Layers by hand, with the factors beside the kernel


def with_factors(model, params, names, rank, dense):
    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def factors(p):
        d, k = p["kernel"].shape
        return {"A": jax.random.normal(next(keys), (d, rank)) / d**0.5, "B": jnp.zeros((rank, k))}

    trainable = [{name: factors(layer[name]) for name in names} for layer in params["layers"]]

    def loss(trainable, frozen, batch):
        layers = [
            layer | {name: layer[name] | own[name] for name in names}
            for layer, own in zip(frozen["layers"], trainable, strict=True)
        ]
        return model(dense, frozen | {"layers": layers}, batch)

    return trained(loss, trainable, params)


def plus_bias(p, y):
    return y + p["bias"] if "bias" in p else y


def formed(model, params, names, rank):
    """W + A·B is formed at every step."""

    def dense(p, x):
        if "A" not in p:
            return plain(p, x)
        return plus_bias(p, x @ (p["kernel"] + SCALE * (p["A"] @ p["B"]).astype(x.dtype)))

    return with_factors(model, params, names, rank, dense)


def naive(model, params, names, rank):
    """x·W + (x·A)·B as it is mostly written, with activations of three dimensions."""

    def dense(p, x):
        if "A" not in p:
            return plain(p, x)
        a, b = p["A"].astype(x.dtype), p["B"].astype(x.dtype)
        return plus_bias(p, x @ p["kernel"] + SCALE * ((x @ a) @ b))

    return with_factors(model, params, names, rank, dense)


@jax.custom_vjp
def product(x, w, a, b):
    return x @ w + (x @ a) @ b


def product_fwd(x, w, a, b):
    u = x @ a
    return x @ w + u @ b, (x, u, w, a, b)


def product_bwd(saved, dy):
    x, u, w, a, b = saved
    du = dy @ b.T
    return dy @ w.T + du @ a.T, None, (du.T @ x).T, u.T @ dy


product.defvjp(product_fwd, product_bwd)


def by_hand(model, params, names, rank):
    """A layer written by hand: flattened activations and its own derivative, dA as (Uᵀ·X)ᵀ. The bound."""

    def dense(p, x):
        if "A" not in p:
            return plain(p, x)
        a, b = p["A"].astype(x.dtype), SCALE * p["B"].astype(x.dtype)
        y = product(x.reshape(-1, x.shape[-1]), p["kernel"], a, b)
        return plus_bias(p, y.reshape(*x.shape[:-1], -1))

    return with_factors(model, params, names, rank, dense)


CONTENDERS = {
    "forward only": forward,
    "full fine-tuning": full,
    "lora_jax": lora_jax,
    "by hand": by_hand,
    "W + A·B formed": formed,
    "x·W + (x·A)·B": naive,
}
