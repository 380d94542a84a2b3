"""One update, and many updates in one call, as pure functions: state and data in, state and metrics out."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from gpt_jax.adapters import adapting, join, trained_params
from gpt_jax.model.layers import Params
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import replicated, split_batch
from gpt_jax.plan import Plan
from gpt_jax.rng import DROPOUT_STREAM, stream
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.state import TrainState

Batch = Any  # a pytree of arrays whose leading axis is B
Metrics = dict[str, Any]
# (params, model, batch, key) -> a scalar to minimise, such as `next_token_loss`
Objective = Callable[[Params, GPT, Batch, jax.Array], jax.Array]
TrainSteps = Any  # a jitted or compiled (state, source, seed, n_steps, last_step) -> (state, metrics)


class Source(Protocol):
    """A pytree that gives batches, such as `TokenWindows`."""

    def batch(self, seed: int | jax.Array, step: jax.Array) -> Batch:
        """The batch of a step: a pure function of the seed and the step."""


def loss_and_gradient(
    params: Params, model: GPT, batch: Batch, dropout_key: jax.Array, objective: Objective, accum_steps: int
) -> tuple[jax.Array, Params]:
    """Mean loss of a batch and its gradient, accumulated over `accum_steps` micro-batches."""
    gradient_of = jax.value_and_grad(objective)
    if accum_steps == 1:
        return gradient_of(params, model, batch, dropout_key)

    def add(total: Any, micro_batch: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        index, part = micro_batch
        key = jax.random.fold_in(dropout_key, index)
        return jax.tree.map(jnp.add, total, gradient_of(params, model, part, key)), None

    # Micro-batch i takes rows i, i + accum_steps, ...: each device has an equal part of each.
    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1)

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, (jnp.arange(accum_steps), jax.tree.map(split, batch)))
    return jax.tree.map(lambda x: x / accum_steps, total)


def train_step(
    state: TrainState,
    source: Source,
    seed: int | jax.Array,
    plan: Plan,
    model: GPT,
    optimizer: optax.GradientTransformation,
    objective: Objective,
) -> tuple[TrainState, Metrics, Metrics]:
    """One update, or none where the loss, the gradient or an updated parameter would not be finite.

    Returns the new state; "loss" and "grad_norm"; "grad_norms" and "finite", see `make_train_steps`.
    """
    batch = split_batch(source.batch(seed, state.step), plan.mesh)
    dropout_key = jax.random.fold_in(stream(seed, DROPOUT_STREAM), state.step)
    accum_steps, rank = plan.config.train.grad_accum_steps, model.config.lora_rank
    if rank:
        objective = adapted(objective, state.frozen, rank)
    loss, gradient = loss_and_gradient(state.params, model, batch, dropout_key, objective, accum_steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trained_params(model, plan.mesh))
    gradient = jax.lax.with_sharding_constraint(gradient, shardings)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    by_array = {
        "grad_norms": jax.tree.map(jnp.linalg.norm, gradient),
        "finite": jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params),
    }
    grad_norm = optax.tree.norm(gradient)
    metrics = {"loss": loss, "grad_norm": grad_norm}
    new_state = TrainState(state.step + 1, params, opt_state)
    frozen, state = state.frozen, state.replace(frozen=None)  # nothing of it changes
    # A NaN would stay in the state forever, so the old state is kept.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    finite &= jnp.stack(jax.tree.leaves(by_array["finite"])).all()
    state = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state, new_state)
    return state.replace(frozen=frozen), metrics, by_array


def adapted(objective: Objective, frozen: Params, rank: int) -> Objective:
    """An objective of adapters of this rank, for parameters that are not trained."""

    def adapted_objective(adapters: Params, model: GPT, batch: Batch, key: jax.Array) -> jax.Array:
        with adapting(rank):
            return objective(join(frozen, adapters), model, batch, key)

    return adapted_objective


def make_train_steps(
    plan: Plan, model: GPT, objective: Objective, state: TrainState, max_steps: int
) -> TrainSteps:
    """The jitted `(state, source, seed, n_steps, last_step) -> (state, metrics)` of the training loop.

    Runs `n_steps` (<= M = `max_steps`) updates of a run that has `last_step` steps in total, seeded with
    `seed` (uint32). `config.seed` and `plan.steps` are not read, so one compiled program serves every seed
    and length of the run. The state that goes in is donated; of the `state` here only shardings are read.
    The call ends early at an update that would not be finite. Metrics:

    - "loss" (of the batch, before its update), "grad_norm" (global, before clipping): float32 [M], one for
      each update and for the one that was not made.
    - "steps": int32, the updates made; fewer than `n_steps` where one would not have been finite.
    - "grad_norms": the norm of each array's gradient at the last step, in the tree of the parameters.
    - "finite": for each array of parameters, whether the last update was finite everywhere.
    """

    def train_steps(
        state: TrainState, source: Source, seed: jax.Array, n_steps: jax.Array, last_step: jax.Array
    ) -> tuple[TrainState, Metrics]:
        first_step = state.step
        optimizer = make_optimizer(plan.config.optimizer, last_step)

        # The length of the loop is an argument: one program serves every number of steps, so the numbers do
        # not depend on how training is divided into calls.
        def goes_on(carry: tuple[jax.Array, TrainState, Metrics, Metrics]) -> jax.Array:
            i, state, _, _ = carry
            return (i < n_steps) & (state.step == first_step + i)

        def body(carry: tuple[jax.Array, TrainState, Metrics, Metrics]) -> tuple[Any, ...]:
            i, state, history, _ = carry
            state, metrics, by_array = train_step(state, source, seed, plan, model, optimizer, objective)
            history = {name: history[name].at[i].set(metrics[name]) for name in history}
            return i + 1, state, history, by_array

        history: Metrics = {"loss": jnp.zeros(max_steps), "grad_norm": jnp.zeros(max_steps)}
        nothing: Metrics = {
            "grad_norms": jax.tree.map(lambda _: jnp.float32(0), state.params),
            "finite": jax.tree.map(lambda _: jnp.bool(True), state.params),
        }
        carry = (jnp.int32(0), state, history, nothing)
        _, state, history, by_array = jax.lax.while_loop(goes_on, body, carry)
        return state, {**history, **by_array, "steps": state.step - first_step}

    shardings, everywhere = jax.tree.map(lambda leaf: leaf.sharding, state), replicated(plan.mesh)
    return jax.jit(
        train_steps,
        in_shardings=(shardings, None, *[everywhere] * 3),  # a source is where it was put
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
