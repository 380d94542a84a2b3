"""One update, and many updates in one call. Pure: state and data in, state and metrics out."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt_jax.batches import micro_batch_size, train_batch
from gpt_jax.config import Config
from gpt_jax.loss import batch_loss
from gpt_jax.model import GPT, Params
from gpt_jax.optimizer import count_skipped
from gpt_jax.rng import BATCH_STREAM, DROPOUT_STREAM, stream
from gpt_jax.sharding import count_shards, platform_of, replicated, split_batch
from gpt_jax.train_state import TrainState

Metrics = dict[str, Any]
TrainSteps = Any  # a jitted or compiled (state, tokens_N, seed, n_steps) -> (state, metrics)


def loss_and_gradient(
    params: Params,
    model: GPT,
    inputs_BxT: jax.Array,
    targets_BxT: jax.Array,
    dropout_key: jax.Array,
    accumulate: int,
) -> tuple[jax.Array, Params]:
    """Mean loss and its gradient over a batch, which is worked through in `accumulate` equal parts."""
    gradient_of = jax.value_and_grad(batch_loss)
    if accumulate == 1:
        return gradient_of(params, model, inputs_BxT, targets_BxT, dropout_key)

    def add_part(total: Any, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, None]:
        index, inputs, targets = part
        key = jax.random.fold_in(dropout_key, index)
        return jax.tree.map(jnp.add, total, gradient_of(params, model, inputs, targets, key)), None

    # Part i takes windows i, i + accumulate, ...: each device keeps an equal share of every part.
    def split(x_BxT: jax.Array) -> jax.Array:
        return x_BxT.reshape(-1, accumulate, x_BxT.shape[1]).swapaxes(0, 1)

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    parts = (jnp.arange(accumulate), split(inputs_BxT), split(targets_BxT))
    total, _ = jax.lax.scan(add_part, zero, parts)
    return jax.tree.map(lambda x: x / accumulate, total)


def train_step(
    state: TrainState,
    tokens_N: jax.Array,
    seed: int | jax.Array,
    config: Config,
    model: GPT,
    optimizer: optax.GradientTransformation,
    param_shardings: Any = None,
) -> tuple[TrainState, Metrics, Metrics]:
    """One update, left out where a loss, a gradient or an updated parameter is not finite.

    Args:
        state: what to update.
        tokens_N: the training split.
        seed: of the run, a uint32 scalar.
        config, model, optimizer: what to train; `model.mesh` says where.
        param_shardings: where each parameter lies, and so its gradient; None leaves it to the compiler.

    Returns:
        The new state; "loss", "grad_norm" and "skipped"; and "grad_norms" and "finite", a tree each: see
        `make_train_steps`.
    """
    train, context = config.train, config.model.context
    mesh = model.mesh
    assert mesh is not None
    size = micro_batch_size(train, context, count_shards(mesh), platform_of(mesh))
    accumulate = train.batch_size // size
    batch = train_batch(stream(seed, BATCH_STREAM), state.step, tokens_N, train.batch_size, context)
    inputs_BxT, targets_BxT = split_batch(batch, mesh)
    dropout_key = jax.random.fold_in(stream(seed, DROPOUT_STREAM), state.step)
    loss, gradient = loss_and_gradient(state.params, model, inputs_BxT, targets_BxT, dropout_key, accumulate)
    if param_shardings is not None:
        gradient = jax.lax.with_sharding_constraint(gradient, param_shardings)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        # Less at first, as TensorFlow's ExponentialMovingAverage does: the initial parameters are soon gone.
        decay = jnp.minimum(config.optimizer.ema_decay, (1 + state.step) / (10 + state.step))
        ema_params = optax.incremental_update(params, ema_params, 1 - decay)
    by_array = {
        "grad_norms": jax.tree.map(jnp.linalg.norm, gradient),
        "finite": jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params),
    }
    grad_norm = optax.tree.norm(gradient)
    metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": count_skipped(opt_state)}
    new_state = TrainState(state.step + 1, params, opt_state, ema_params)
    # An update from what is not finite would spoil the state for good: the old one stays.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    finite &= jnp.stack(jax.tree.leaves(by_array["finite"])).all()
    state = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state, new_state)
    return state, metrics, by_array


def make_train_steps(
    config: Config,
    model: GPT,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    max_steps: int,
) -> TrainSteps:
    """Build the compiled function of the training loop.

    Args:
        config, model, optimizer: what to train; `model.mesh` says where.
        state: the state, or its abstract twin: only shardings are read.
        max_steps: M, the most updates that one call can do.

    Returns:
        `(state, tokens_N, seed, n_steps) -> (state, metrics)`: `n_steps` updates, at most M, with the random
        numbers of `seed` (uint32; `config.seed` is not read, so that one compiled program serves every seed).
        The state that goes in is consumed. Where an update is left out as not finite the call ends. Metrics:

        - "loss" (nats a token, of the batch before its update), "grad_norm" (global, before clipping):
          float32 [M], one for each update, and for the one left out.
        - "skipped": int32 [M], updates that the optimizer has left out since step 0.
        - "steps": int32, the updates done; fewer than `n_steps` where one was left out as not finite.
        - "grad_norms": the norm of each array's gradient at the last step, in the tree of the parameters.
        - "finite": for each array of the parameters whether the last step's update left all of it finite.
    """

    shardings: Any = jax.tree.map(lambda leaf: leaf.sharding, state)

    def train_steps(
        state: TrainState, tokens_N: jax.Array, seed: jax.Array, n_steps: jax.Array
    ) -> tuple[TrainState, Metrics]:
        first_step = state.step

        # A loop whose length is known only at run time: one program serves every number of steps, so
        # how training is cut into calls cannot change a bit of it.
        def goes_on(carry: tuple[jax.Array, TrainState, Metrics, Metrics]) -> jax.Array:
            i, state, _, _ = carry
            return (i < n_steps) & (state.step == first_step + i)

        def body(carry: tuple[jax.Array, TrainState, Metrics, Metrics]) -> tuple[Any, ...]:
            i, state, history, _ = carry
            state, metrics, by_array = train_step(
                state, tokens_N, seed, config, model, optimizer, shardings.params
            )
            history = {name: history[name].at[i].set(metrics[name]) for name in history}
            return i + 1, state, history, by_array

        history: Metrics = {
            "loss": jnp.zeros(max_steps),
            "grad_norm": jnp.zeros(max_steps),
            "skipped": jnp.zeros(max_steps, jnp.int32),
        }
        nothing: Metrics = {
            "grad_norms": jax.tree.map(lambda _: jnp.float32(0), state.params),
            "finite": jax.tree.map(lambda _: jnp.bool(True), state.params),
        }
        carry = (jnp.int32(0), state, history, nothing)
        _, state, history, by_array = jax.lax.while_loop(goes_on, body, carry)
        return state, {**history, **by_array, "steps": state.step - first_step}

    assert model.mesh is not None
    everywhere = replicated(model.mesh)
    return jax.jit(
        train_steps,
        in_shardings=(shardings, everywhere, everywhere, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
