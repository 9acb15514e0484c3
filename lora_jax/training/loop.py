"""A loop over batches, with hooks between steps, that goes on where a run was cut off."""

from __future__ import annotations

import collections
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_jax.training.interruption import Interrupted, interruptions
from lora_jax.training.state import State
from lora_jax.training.step import Metrics

if TYPE_CHECKING:  # orbax takes long to import
    from lora_jax.formats.orbax import Checkpoints

Hook = Callable[[int, State, Metrics], Mapping[str, Any] | None]


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
      frozen: What `split` returned first, of arrays alone: what else a tree has, as an Equinox module has functions,
        `eqx.partition` sets apart before `split`.
      data: Batches, one for each step. Of an iterator with `get_state` and `set_state`, as grain's are, the state is
        saved and restored. Of any other iterable, as many batches are passed over as steps were taken; of an iterator,
        which stands at the batch after those that `state` has seen, as many as a checkpoint has taken more.
      steps: How many steps in all, those before an interruption included; a state that has taken them is returned as it
        is.
      hooks: Called in turn after each step, `hook(step, state, metrics)`. What they return joins the metrics that the
        next ones see; where it has "stop": True, training ends, also where it is called again on its checkpoints. The
        state is valid until the next step. Those that have `get_state` and `set_state`, of something that JSON can say,
        resume too.
      checkpoints: Where the state is saved, and restored from first. With it, SIGTERM and Ctrl-C save after the step
        they come in, and then exit.

    Returns:
      The state after the last step.

    Raises:
      TypeError: A hook returns something else.
      ValueError: The data ends before the last step; or what is saved is not of this base, rules or optimizer, or is
        older than `state`.
      Interrupted: A SystemExit, after SIGTERM or Ctrl-C; it has told on stderr how to resume.
    """
    source, stop = iter(data), False
    given = done = int(state.step)
    resumable = [x for x in (source, *hooks) if hasattr(x, "get_state") and hasattr(x, "set_state")]
    if checkpoints and (restored := checkpoints.read(state)):
        if restored.step < given:
            raise ValueError(
                f"{checkpoints.folder}: its newest checkpoint is of step {restored.step}, and the state has taken "
                f"{given} already: give State.create's, to go on from the checkpoint, or another folder to save this in"
            )
        state, done = restored.state, restored.step
        stop = _resume(resumable, restored.position, f"{checkpoints.folder}: step {done}")
    if not hasattr(source, "set_state"):
        seen = done - given if source is data else done
        collections.deque(itertools.islice(source, seen), maxlen=0)  # passed over
    with contextlib.ExitStack() as last:
        asked = last.enter_context(interruptions()) if checkpoints else lambda step: None
        if checkpoints:
            last.callback(checkpoints.wait)  # whatever ends it, what was saved is to be on the disk
        while done < steps and not stop:
            try:
                batch = next(source)
            except StopIteration:
                raise ValueError(
                    f"the data ended after {done} of {steps} steps: take fewer, or repeat the data, epoch after epoch: "
                    "itertools.chain.from_iterable(itertools.repeat(data))"  # cycle would keep all, in one order
                ) from None
            state, found = step(state, frozen, batch)
            metrics, done = {**found}, done + 1
            for hook in hooks:
                metrics = {**metrics, **_found(hook, hook(done, state, metrics))}
            stop, number = bool(metrics.pop("stop", False)), asked(done)
            if checkpoints and (number or stop or done == steps or done % checkpoints.every == 0):
                position = {"stop": stop, "states": [_state_of(x) for x in resumable]}
                checkpoints.save(done, state, metrics=metrics, position=position)
            if checkpoints and number:
                checkpoints.wait()
                interrupted = Interrupted(number, done, checkpoints.folder)
                print(interrupted, file=sys.stderr)
                raise interrupted
    return state


def _found(hook: Hook, its: Any) -> Mapping[str, Any]:
    if isinstance(its, Mapping | None):
        return its or {}
    raise TypeError(f"the hook {hook} returned {its!r}: hooks return metrics, a dict from name to scalar, or None")


def _resume(resumable: Sequence[Any], position: Any, where: str) -> bool:
    """Puts data and hooks where they were; whether one of these had said stop."""
    if not (isinstance(position, dict) and position.keys() == {"stop", "states"}):  # saved by someone's own loop
        return False
    states = position["states"]
    if len(states) != len(resumable):
        raise ValueError(
            f"{where} was saved with {len(states)} iterators and hooks that resume, and there are {len(resumable)}: "
            "give the same data and hooks, or start in another folder"
        )
    for x, its in zip(resumable, states, strict=True):
        x.set_state(its["bytes"].encode("latin-1") if "bytes" in its else its["json"])
    return position["stop"]


def _state_of(x: Any) -> dict[str, Any]:
    """As JSON can say it; that of grain's `DataLoader` is bytes."""
    its = x.get_state()
    return {"bytes": its.decode("latin-1")} if isinstance(its, bytes) else {"json": its}
