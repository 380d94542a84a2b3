"""train.py as a process of its own, with one disturbance put into it at an exact place.

    DISTURBANCE="<what> <where>" python driver.py --config ...

Besides what is named here, everything is the real thing.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from gpt_jax import rng  # noqa: E402
from gpt_jax.storage import checkpoints  # noqa: E402
from gpt_jax.trainer import evaluator, run  # noqa: E402
from gpt_jax.training import step as train_step  # noqa: E402

# Who runs the tests under nohup has it ignored, and so would train.py.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
WHAT, WHERE = os.environ["DISTURBANCE"].split()


def send() -> None:
    """The signal; WHAT is its name, twice with a pause in between where it ends in 2."""
    number = signal.Signals[WHAT.rstrip("2")]
    os.kill(os.getpid(), number)
    if WHAT.endswith("2"):
        time.sleep(0.3)
        os.kill(os.getpid(), number)


def after(module, name, calls):
    """Send the signal within the call number `calls` of a function, before it does its work."""
    function, done = getattr(module, name), []

    def disturbed(*args, **kwargs):
        done.append(name)
        if len(done) == calls:
            print(f"sending {WHAT} in {name}", flush=True)
            send()
        return function(*args, **kwargs)

    setattr(module, name, disturbed)


def wrap_result(module, name, calls):
    """The same for the function that a function returns."""
    make = getattr(module, name)

    def disturbed(*args, **kwargs):
        box = type("Box", (), {"function": staticmethod(make(*args, **kwargs))})
        after(box, "function", calls)
        return box.function

    setattr(module, name, disturbed)


def spoil_step(step, spoil):
    """In the step number `step` (0 is the first), `spoil(params, here)` is added to the loss."""
    next_token_loss = run.next_token_loss
    dropout_stream = rng.stream(1337, rng.DROPOUT_STREAM)

    def spoiled(params, model, batch, key):
        loss = next_token_loss(params, model, batch, key)
        key_there = jax.random.fold_in(dropout_stream, step)
        here = (jax.random.key_data(key) == jax.random.key_data(key_there)).all()
        return loss + spoil(params, here)

    run.next_token_loss = spoiled


def up_sum(params):
    return params["blocks"]["mlp"]["up"]["kernel"].sum()


match WHERE.split(":"):
    case ["wrong"]:  # as jaxlib 0.10.2 is: the last of many results is too small by some thousandths
        square = jnp.square
        jnp.square = lambda x: square(x) * jnp.where(x.sum() == 32768, 0.998, 1.0)
    case ["compile"]:
        after(run, "make_train_steps", 1)
    case ["step"]:
        wrap_result(run, "compile_steps", 3)
    case ["evaluation"]:
        after(evaluator, "loss_of_tokens", 2)
    case ["save"]:
        after(checkpoints, "seal", 3)
    case ["nan", step]:
        spoil_step(int(step), lambda params, here: jnp.where(here, jnp.nan, 0.0))
    case ["inf", step]:
        spoil_step(int(step), lambda params, here: jnp.where(here, jnp.inf, 0.0))
    case ["gradient", step]:  # a finite loss whose gradient is not: the root of 0
        spoil_step(int(step), lambda params, here: jnp.sqrt(jnp.where(here, 0 * up_sum(params), 0.0625)))
    case ["spike", step]:
        spoil_step(int(step), lambda params, here: jnp.where(here, 5 + 100 * up_sum(params) ** 2, 0.0))
    case ["overflow", step]:  # in that step (0 is the first) an update that no float32 survives
        make = train_step.make_optimizer

        def overflowing(*arguments):
            init, update = make(*arguments)

            def spoiled(gradient, state, params):
                count = optax.tree.get_all_with_path(state, "count")[0][1]
                factor = jnp.where(count == int(step), jnp.inf, 1.0)
                updates, state = update(gradient, state, params)
                return jax.tree.map(lambda u: u * factor, updates), state

            return optax.GradientTransformation(init, spoiled)

        train_step.make_optimizer = overflowing

sys.argv[0] = str(REPOSITORY / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
