"""What trains a model, and how: each contender gives `step(state, frozen, batch) -> (state, loss)`.

All run the same model code, adapt the same weights with the same rank and scale, start with B = 0, and use one AdamW.
"""

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


def forward(task, params):
    return lambda state, params, batch: (state, task.loss(plain)(params, batch)), (), params


def full(task, params):
    return trained(lambda params, _, batch: task.loss(plain)(params, batch), params, None)


def lora_jax(task, params):
    rules = {rf"layers/(\d+/)?({'|'.join(task.names)})/kernel": lora.LoRA(task.rank, alpha=SCALE * task.rank)}
    sites = lora.sites(task.loss(plain), params, task.batch)
    frozen, lora_params = lora.split(jax.random.key(0), params, rules, sites=sites)

    def loss(lora_params, frozen, batch):
        return lora.lift(task.loss(plain))(lora.attach(frozen, lora_params), batch)

    return trained(loss, lora_params, frozen, lora.optimizer(ADAM))


# Layers by hand, with the factors beside the kernel


def with_factors(task, params, dense):
    keys = iter(jax.random.split(jax.random.key(0), 1000))

    def factors(p):
        *stack, d, k = p["kernel"].shape
        a = jax.random.normal(next(keys), (*stack, d, task.rank)) / d**0.5
        return {"A": a, "B": jnp.zeros((*stack, task.rank, k))}

    def joined(layer, own):
        return layer | {name: layer[name] | own[name] for name in task.names}

    def loss(trainable, frozen, batch):
        layers = frozen["layers"]
        if isinstance(layers, list):
            layers = [joined(*pair) for pair in zip(layers, trainable, strict=True)]
        else:
            layers = joined(layers, trainable)
        return task.loss(dense)(frozen | {"layers": layers}, batch)

    layers = params["layers"]
    stacks = layers if isinstance(layers, list) else [layers]
    trainable = [{name: factors(layer[name]) for name in task.names} for layer in stacks]
    return trained(loss, trainable if isinstance(layers, list) else trainable[0], params)


def plus_bias(p, y):
    return y + p["bias"] if "bias" in p else y


def formed(task, params):
    """W + A·B is formed at every step."""

    def dense(p, x):
        if "A" not in p:
            return plain(p, x)
        return plus_bias(p, x @ (p["kernel"] + SCALE * (p["A"] @ p["B"]).astype(x.dtype)))

    return with_factors(task, params, dense)


def naive(task, params):
    """x·W + (x·A)·B as it is mostly written, with activations of three dimensions."""

    def dense(p, x):
        if "A" not in p:
            return plain(p, x)
        a, b = p["A"].astype(x.dtype), p["B"].astype(x.dtype)
        return plus_bias(p, x @ p["kernel"] + SCALE * ((x @ a) @ b))

    return with_factors(task, params, dense)


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


def by_hand(task, params):
    """A layer written by hand: flattened activations and its own derivative, dA as (Uᵀ·X)ᵀ. The bound."""

    def dense(p, x):
        if "A" not in p:
            return plain(p, x)
        a, b = p["A"].astype(x.dtype), SCALE * p["B"].astype(x.dtype)
        y = product(x.reshape(-1, x.shape[-1]), p["kernel"], a, b)
        return plus_bias(p, y.reshape(*x.shape[:-1], -1))

    return with_factors(task, params, dense)


CONTENDERS = {
    "forward only": forward,
    "full fine-tuning": full,
    "lora_jax": lora_jax,
    "by hand": by_hand,
    "W + A·B formed": formed,
    "x·W + (x·A)·B": naive,
}
