"""Training, for those who bring no loop: a state, a step, an evaluation and a loop, each of use without the others.

`step` holds all the mathematics, in a page to copy and change; `loop` calls it, and `hooks` between its calls.
"""

from lora_jax.training import hooks
from lora_jax.training.evaluation import evaluate
from lora_jax.training.interruption import Interrupted
from lora_jax.training.loop import Hook, fit
from lora_jax.training.state import State
from lora_jax.training.step import Metrics, make_step

__all__ = ["Hook", "Interrupted", "Metrics", "State", "evaluate", "fit", "hooks", "make_step"]
