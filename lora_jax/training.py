"""Training, for those who bring no loop: a state, a step, an evaluation and a loop, each of use without the others."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.adapters import attach, dropout
from lora_jax.factors import LoraParams
from lora_jax.interruption import Interrupted, interruptions
from lora_jax.lift import lift
from lora_jax.placement import on_mesh
from lora_jax.recipes import accumulated

if TYPE_CHECKING:  # orbax takes long to import
    from lora_jax.formats.orbax import Checkpoints

Metrics = dict[str, Any]  # scalars by name
Hook = Callable[[int, "State", Metrics], Mapping[str, Any] | None]


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


def make_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    needs_key: bool = False,
    accumulate: int = 1,
    weight: Callable[[Any], Any] | None = None,
    clip_norm: float | None = None,
    dtype: Any = None,
    shardings: Any = None,
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
    """A training step, jitted: `(state, frozen, batch) -> (state, metrics)`. It donates the state that it is given.

    Args:
      loss_fn: `loss_fn(params, batch)`, as of the model without adapters: a scalar, the mean over the batch. It is
        lifted here. Factors of variants with dropout are dropped, by another mask in each step.
      tx: What `optimizer` returned.
      has_aux: Whether `loss_fn` returns `(loss, metrics)`, with a dict of scalars.
      needs_key: Whether `loss_fn` takes a PRNG key as a third argument.
      accumulate: How many parts the batch is taken in, one after another; see `recipes.accumulated`.
      weight: `weight(part)`, what a part of the batch counts by, such as its number of tokens, where `loss_fn` divides
        by that; None where all parts count alike.
      clip_norm: The most that the norm of all gradients together may be; they are scaled down to it.
      dtype: What to compute in, such as `jnp.bfloat16`: floating arrays of the base and of the batch are cast to it.
        Factors, their gradients and the optimizer keep their own. A base that has it already is not copied.
      shardings: How the state lies on a mesh, as of `lora.shardings(state, frozen)`, so that it stays so.

    Returns:
      The step. Its metrics are float32 scalars: "loss", "grad_norm" before clipping, and those of `loss_fn`.

    Raises:
      ValueError: An argument makes no sense; or, at the first step, `loss_fn` or `weight` returns something else, or a
        batch does not divide into the parts.

    >>> import lora_jax as lora
    >>> frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> tx = lora.optimizer(optax.adam(1e-2))
    >>> step = make_step(lambda params, x: jnp.mean((x @ params["w"]) ** 2), tx)
    >>> state, metrics = step(State.create(jax.random.key(1), lora_params, tx), frozen, jnp.ones((2, 8)))
    >>> int(state.step), float(metrics["loss"])
    (1, 64.0)
    """
    if accumulate < 1:
        raise ValueError(f"make_step(accumulate={accumulate}): a batch has one part at least")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"make_step(clip_norm={clip_norm}): the norm is positive, or None for no clipping")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"make_step(dtype={dtype!r}): what it computes in is a floating dtype, such as 'bfloat16'")
    if not isinstance(shardings, State | jax.sharding.Sharding | None):
        raise ValueError("make_step(shardings=...): they are of a State, as lora.shardings(state, frozen) gives them")
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    lifted = lift(loss_fn)

    def value_and_grad(lora_params: Any, part: Any, frozen: Any) -> Any:
        batch, (key,) = part["batch"], part["key"]
        own = jax.random.split(key)

        def objective(lora_params: Any) -> Any:
            params = attach(_cast(frozen, dtype), dropout(own[0], lora_params))
            return _scalars(lifted(params, _cast(batch, dtype), *([own[1]] if needs_key else [])), has_aux)

        (loss, aux), grads = jax.value_and_grad(objective, has_aux=True)(lora_params)
        counts = _counts(weight, batch)
        return counts, jax.tree.map(lambda x: x * counts.astype(x.dtype), ({"loss": loss, **aux}, grads))

    def step(state: State, frozen: Any, batch: Any) -> tuple[State, Metrics]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), accumulate)
        whole = value_and_grad if accumulate == 1 else accumulated(value_and_grad, accumulate)
        counts, means = whole(state.lora_params, {"batch": batch, "key": keys}, frozen)
        metrics, grads = jax.tree.map(lambda x: x / counts.astype(x.dtype), means)
        metrics["grad_norm"] = optax.tree.norm(jax.tree.map(jnp.float32, grads))
        grads, _ = clip.update(grads, optax.EmptyState())
        lora_params: Any = state.lora_params
        updates, opt_state = tx.update(grads, state.opt_state, lora_params)
        lora_params = optax.apply_updates(lora_params, updates)
        return State(state.step + 1, lora_params, opt_state, state.key), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _cast(tree: Any, dtype: Any) -> Any:
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree)


def _scalars(found: Any, has_aux: bool) -> tuple[jax.Array, Metrics]:
    """What a loss function returned, in float32."""
    paired = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)
    loss, aux = found if has_aux and paired else (found, {})
    scalars = [loss, *aux.values()]
    if has_aux > paired or not (jax.tree_util.all_leaves(scalars) and all(jnp.ndim(x) == 0 for x in scalars)):
        forms = {
            False: "a scalar, or with has_aux=True (loss, metrics)",
            True: "(loss, metrics), the latter a dict of scalars",
        }
        shapes = jax.tree.map(lambda x: f"{jnp.result_type(x)}{[*jnp.shape(x)]}", found)
        raise ValueError(f"make_step(has_aux={has_aux}): loss_fn returns {forms[has_aux]}; this one returns {shapes}")
    if taken := {"loss", "grad_norm"} & {*aux}:
        raise ValueError(f"loss_fn's metrics have {sorted(taken)}, which the step adds itself: give them other names")
    return jnp.float32(loss), {name: jnp.float32(x) for name, x in aux.items()}


def _counts(weight: Callable[[Any], Any] | None, batch: Any) -> jax.Array:
    counts = jnp.float32(1 if weight is None else weight(batch))
    if counts.ndim:
        raise ValueError(f"weight(batch) is one number, such as a mask's sum, and this one has shape {counts.shape}")
    return counts


def evaluate(
    fun: Callable[[Any, Any], Any],
    frozen: Any,
    lora_params: LoraParams,
    batches: Iterable[Any],
    *,
    weight: Callable[[Any], Any] | None = None,
) -> dict[str, float]:
    """The mean of what `fun(params, batch)` gives over batches, adapters lifted, nothing dropped.

    Args:
      fun: A scalar, called "loss" in the result, or a dict of scalars, each a mean over the batch.
      frozen: As in `attach`.
      lora_params: As in `attach`.
      batches: The batches; those of like shapes share a program, which is kept for the next evaluation.
      weight: What a batch counts by, such as its number of tokens; None where all count alike.

    Raises:
      ValueError: There are no batches.

    >>> import lora_jax as lora
    >>> frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> evaluate(lambda params, x: (x @ params["w"]).mean(), frozen, lora_params, [jnp.ones(8), jnp.zeros(8)])
    {'loss': 4.0}
    """
    sums, total = None, 0.0
    for batch in batches:
        found, counts = _evaluated(fun, weight, frozen, lora_params, batch)
        sums, total = found if sums is None else jax.tree.map(jnp.add, sums, found), total + counts
    if sums is None:
        raise ValueError("evaluate: there are no batches; if they come from an iterator, it has ended")
    return {name: float(x / total) for name, x in sums.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluated(fun: Any, weight: Any, frozen: Any, lora_params: Any, batch: Any) -> tuple[Metrics, jax.Array]:
    found = lift(fun)(attach(frozen, lora_params), batch)
    means = found if isinstance(found, dict) else {"loss": found}
    counts = _counts(weight, batch)
    return {name: jnp.float32(x) * counts for name, x in means.items()}, counts


def fit(
    step: Callable[[State, Any, Any], tuple[State, Metrics]],
    state: State,
    frozen: Any,
    data: Iterable[Any],
    *,
    steps: int,
    hooks: Sequence[Hook] = (),
    checkpoints: Checkpoints | None = None,
) -> State:
    """Steps over batches of data, up to a number of them, or until a hook says stop; goes on where a run was cut off.

    Args:
      step: As of `make_step`.
      state: As of `State.create`. It is donated to the first step.
      frozen: What `split` returned first.
      data: Batches, one for each step. Of an iterator with `get_state` and `set_state`, as grain's are, the state is
        saved and restored; of any other, as many batches are passed over as steps were taken.
      steps: How many steps in all, those before an interruption included; a state that has taken them is returned as it
        is.
      hooks: Called in turn after each step, `hook(step, state, metrics)`. What they return joins the metrics that the
        next ones see; where it has "stop": True, training ends. The state is valid until the next step. Those that
        have `get_state` and `set_state`, of something that JSON can say, resume too.
      checkpoints: Where the state is saved, and restored from first. With it, SIGTERM and Ctrl-C save after the step
        they come in, and then exit.

    Returns:
      The state after the last step.

    Raises:
      ValueError: The data ends before the last step; or what is saved is not of this base, rules or optimizer.
      Interrupted: A SystemExit, after SIGTERM or Ctrl-C; it has told on stderr how to resume.
    """
    source, done, stop = iter(data), int(state.step), False
    resumable: list[Any] = [x for x in (source, *hooks) if hasattr(x, "get_state") and hasattr(x, "set_state")]
    if checkpoints and (restored := checkpoints.read(state)):
        state, done = restored.state, restored.step
        position = restored.position or {"stop": False, "states": []}  # one that was saved without `fit` has none
        stop, states = position["stop"], position["states"]
        if len(states) != len(resumable):
            raise ValueError(
                f"{checkpoints.folder}: step {done} was saved with {len(states)} iterators and hooks that resume, and "
                f"there are {len(resumable)}: give the same data and hooks, or start in another folder"
            )
        for x, its in zip(resumable, states, strict=True):
            x.set_state(its["bytes"].encode("latin-1") if "bytes" in its else its["json"])
    if not hasattr(source, "set_state"):
        collections.deque(itertools.islice(source, done), maxlen=0)  # passed over
    with contextlib.ExitStack() as last:
        asked = last.enter_context(interruptions()) if checkpoints else lambda step: None
        if checkpoints:
            last.callback(checkpoints.wait)  # whatever ends it, what was saved is to be on the disk
        while done < steps and not stop:
            try:
                batch = next(source)
            except StopIteration:
                raise ValueError(f"the data ended after {done} of {steps} steps: repeat it, or take fewer") from None
            state, metrics = step(state, frozen, batch)
            done += 1
            for hook in hooks:
                metrics |= hook(done, state, metrics) or {}
            stop, number = bool(metrics.pop("stop", False)), asked(done)
            if checkpoints and (number or stop or done == steps or done % checkpoints.every == 0):
                position = {"stop": stop, "states": [_state_of(x) for x in resumable]}
                checkpoints.save(done, state, metrics=metrics, position=position)
            if checkpoints and number:
                checkpoints.wait()
                raise Interrupted(number, done, checkpoints.folder)
    return state


def _state_of(x: Any) -> dict[str, Any]:
    """As JSON can say it; that of grain's `DataLoader` is bytes."""
    its = x.get_state()
    return {"bytes": its.decode("latin-1")} if isinstance(its, bytes) else {"json": its}
