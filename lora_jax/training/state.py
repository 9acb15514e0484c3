"""State: all that a step changes, or draws from."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.factors import LoraParams
from lora_jax.placement import on_mesh


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "lora_params", "opt_state", "key"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class State:
    """All that a step changes, or draws from; the frozen weights are not in it.

    Attributes:
      step: How many steps were taken, an int32 scalar. With one batch each, it is the position in the data, too.
      lora_params: What trains.
      opt_state: The optimizer's state.
      key: A PRNG key, from which each step derives its own.
    """

    step: jax.Array
    lora_params: LoraParams
    opt_state: Any
    key: jax.Array

    @classmethod
    def create(cls, key: jax.Array, lora_params: LoraParams, tx: optax.GradientTransformation) -> State:
        """The state before the first step. All of it is copied, since steps donate what they are given.

        Args:
          key: A PRNG key.
          lora_params: What `split` returned second. Where it lies on a mesh, all of the state does: moments as their
            factors, all else whole on each device.
          tx: What `optimizer` returned.
        """
        params: Any = lora_params  # a tree of parameters, which optax's types know as arrays and containers alone
        state = jax.tree.map(jnp.copy, cls(jnp.zeros((), jnp.int32), lora_params, tx.init(params), key))
        places = [place for x in jax.tree.leaves(lora_params) if (place := on_mesh(x))]
        if not places:
            return state
        whole = NamedSharding(places[0].mesh, PartitionSpec())
        return jax.tree.map(lambda x: x if on_mesh(x) else _everywhere(x, whole), state)


def _everywhere(x: Any, whole: NamedSharding) -> Any:
    """An array that each process has, as one of all; `jax.device_put` takes no key, and asks the others first."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_everywhere(jax.random.key_data(x), whole), impl=jax.random.key_impl(x))
    return jax.make_array_from_callback(x.shape, whole, np.asarray(x).__getitem__)
