"""One update, and many updates in one call, as pure functions: state and data in, state and metrics out."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt_jax.config import Config
from gpt_jax.data.batches import micro_batch_size, train_batch
from gpt_jax.model.layers import Params
from gpt_jax.model.loss import batch_loss
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import count_shards, platform_of, replicated, split_batch
from gpt_jax.rng import BATCH_STREAM, DROPOUT_STREAM, stream
from gpt_jax.training.optimizer import count_skipped, make_optimizer
from gpt_jax.training.state import TrainState

Metrics = dict[str, Any]
TrainSteps = Any  # a jitted or compiled (state, tokens_N, seed, n_steps, last_step) -> (state, metrics)


def loss_and_gradient(
    params: Params,
    model: GPT,
    inputs_BxT: jax.Array,
    targets_BxT: jax.Array,
    dropout_key: jax.Array,
    grad_accum_steps: int,
) -> tuple[jax.Array, Params]:
    """Mean loss of a batch and its gradient, accumulated over `grad_accum_steps` micro-batches."""
    gradient_of = jax.value_and_grad(batch_loss)
    if grad_accum_steps == 1:
        return gradient_of(params, model, inputs_BxT, targets_BxT, dropout_key)

    def add(total: Any, micro_batch: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, None]:
        index, inputs, targets = micro_batch
        key = jax.random.fold_in(dropout_key, index)
        return jax.tree.map(jnp.add, total, gradient_of(params, model, inputs, targets, key)), None

    # Micro-batch i takes windows i, i + grad_accum_steps, ...: each device has an equal part of each.
    def split(x_BxT: jax.Array) -> jax.Array:
        return x_BxT.reshape(-1, grad_accum_steps, x_BxT.shape[1]).swapaxes(0, 1)

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    micro_batches = (jnp.arange(grad_accum_steps), split(inputs_BxT), split(targets_BxT))
    total, _ = jax.lax.scan(add, zero, micro_batches)
    return jax.tree.map(lambda x: x / grad_accum_steps, total)


def train_step(
    state: TrainState,
    tokens_N: jax.Array,
    seed: int | jax.Array,
    config: Config,
    model: GPT,
    optimizer: optax.GradientTransformation,
    param_shardings: Any = None,
) -> tuple[TrainState, Metrics, Metrics]:
    """One update, or none where the loss, the gradient or an updated parameter would not be finite.

    Args:
        state: what to update.
        tokens_N: the training split.
        seed: of the run, a uint32 scalar.
        config, model, optimizer: what to train, on the devices of `model.mesh`.
        param_shardings: of the parameters, and so of their gradients; None leaves it to the compiler.

    Returns:
        The new state; "loss", "grad_norm" and "skipped"; and "grad_norms" and "finite", a tree each: see
        `make_train_steps`.
    """
    train, context = config.train, config.model.context
    mesh = model.mesh
    assert mesh is not None
    size = micro_batch_size(train, context, count_shards(mesh), platform_of(mesh))
    grad_accum_steps = train.batch_size // size
    batch = train_batch(stream(seed, BATCH_STREAM), state.step, tokens_N, train.batch_size, context)
    inputs_BxT, targets_BxT = split_batch(batch, mesh)
    dropout_key = jax.random.fold_in(stream(seed, DROPOUT_STREAM), state.step)
    loss, gradient = loss_and_gradient(
        state.params, model, inputs_BxT, targets_BxT, dropout_key, grad_accum_steps
    )
    if param_shardings is not None:
        gradient = jax.lax.with_sharding_constraint(gradient, param_shardings)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        # A smaller decay at first, as in TensorFlow's ExponentialMovingAverage, to forget the initial values.
        decay = jnp.minimum(config.optimizer.ema_decay, (1 + state.step) / (10 + state.step))
        ema_params = optax.incremental_update(params, ema_params, 1 - decay)
    by_array = {
        "grad_norms": jax.tree.map(jnp.linalg.norm, gradient),
        "finite": jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params),
    }
    grad_norm = optax.tree.norm(gradient)
    metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": count_skipped(opt_state)}
    new_state = TrainState(state.step + 1, params, opt_state, ema_params)
    # A NaN would stay in the state forever, so the old state is kept.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    finite &= jnp.stack(jax.tree.leaves(by_array["finite"])).all()
    state = jax.tree.map(lambda old, new: jnp.where(finite, new, old), state, new_state)
    return state, metrics, by_array


def make_train_steps(config: Config, model: GPT, state: TrainState, max_steps: int) -> TrainSteps:
    """The jitted function that the training loop calls.

    Args:
        config, model: what to train, on the devices of `model.mesh`.
        state: the state, or its shapes: only shardings are read.
        max_steps: M, the largest number of updates in one call.

    Returns:
        `(state, tokens_N, seed, n_steps, last_step) -> (state, metrics)`: `n_steps` updates, at most M, of a
        run of `last_step`, with the random numbers of `seed` (uint32). `config.seed` and `config.train.steps`
        are not read, so one compiled program serves every seed and every length of the run. The state that
        goes in is donated. The call ends early at an update that would not be finite. Metrics:

        - "loss" (nats per token, of the batch, before its update), "grad_norm" (global, before clipping):
          float32 [M], one for each update and for the one that was not made.
        - "skipped": int32 [M], how many updates the optimizer has skipped since step 0.
        - "steps": int32, the updates made; fewer than `n_steps` where one would not have been finite.
        - "grad_norms": the norm of each array's gradient at the last step, in the tree of the parameters.
        - "finite": for each array of parameters, whether the last update was finite everywhere.
    """

    shardings: Any = jax.tree.map(lambda leaf: leaf.sharding, state)

    def train_steps(
        state: TrainState, tokens_N: jax.Array, seed: jax.Array, n_steps: jax.Array, last_step: jax.Array
    ) -> tuple[TrainState, Metrics]:
        first_step = state.step
        optimizer = make_optimizer(config.optimizer, last_step)

        # The length of the loop is an argument: one program serves every number of steps, so the numbers do
        # not depend on how training is divided into calls.
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
        in_shardings=(shardings, *[everywhere] * 4),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
