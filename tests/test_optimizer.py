import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_params, small_model

from gpt_jax.config import OptimizerConfig
from gpt_jax.training.optimizer import is_matrix, make_optimizer, make_schedule


def rates(steps=100, **settings):
    config = OptimizerConfig(warmup_steps=10, min_lr_ratio=0.1, **settings)
    schedule = make_schedule(config, steps, 2.0)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_warmup_rises_by_equal_steps_to_the_peak():
    np.testing.assert_allclose(rates()[:11], 2.0 * np.arange(1, 12) / 11, rtol=1e-5)


def test_cosine():
    after = np.arange(91) / 90
    wanted = 0.2 + 1.8 * (1 + np.cos(np.pi * after)) / 2
    np.testing.assert_allclose(rates(schedule="cosine")[10:], wanted, rtol=2e-3)


def test_linear():
    np.testing.assert_allclose(rates(schedule="linear")[10:], np.linspace(2.0, 0.2, 91), rtol=1e-5)


def test_constant():
    assert (rates(schedule="constant")[10:] == 2.0).all()


def params_and_gradient(**options):
    params = make_params(small_model(**{"bias": True} | options))
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(p.dtype), params)
    return params, gradient


@pytest.mark.slow
def test_matrices_decay_and_nothing_else():
    params, gradient = params_and_gradient(bigram=True, conv_width=3, x0_residual=True, qk_norm=True)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, matrix in jax.tree.leaves_with_path(is_matrix(params))
        if matrix
    }
    assert names == {
        "token_embedding/embedding", "position_embedding/embedding", "bigram_embedding/embedding",
        "blocks/attention/qkv/kernel", "blocks/attention/out/kernel",
        "blocks/mlp/up/kernel", "blocks/mlp/down/kernel",
    }  # fmt: skip
    # Two optimizers that differ in decay alone differ by rate x decay x parameter, on matrices alone.
    settings = dict(schedule="constant", warmup_steps=0, learning_rate=0.1)
    updates = []
    for decay in (0.0, 0.5):
        optimizer = make_optimizer(OptimizerConfig(weight_decay=decay, **settings), 10)
        updates.append(optimizer.update(gradient, optimizer.init(params), params)[0])
    jax.tree.map(
        lambda plain, decayed, p, matrix: np.testing.assert_allclose(
            decayed - plain, -0.1 * 0.5 * p if matrix else 0 * p, atol=1e-6
        ),
        *updates,
        params,
        is_matrix(params),
    )


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["embedding_decay", "weight_decay"])
def test_muon_decays_blocks_and_embeddings_apart(decay):
    params, gradient = params_and_gradient(
        bigram=True, conv_width=3, x0_residual=True, tied_embedding=False, qk_norm=True
    )
    params = jax.tree.map(lambda p: p + 0.1, params)  # what begins at zero could not be seen to decay
    settings = {
        "name": "muon", "schedule": "constant", "warmup_steps": 0, "learning_rate": 0.1,
        "muon_learning_rate": 0.2, "weight_decay": 0.0, "embedding_decay": 0.0,
    }  # fmt: skip
    updates = []
    for value in (0.0, 0.5):
        optimizer = make_optimizer(OptimizerConfig(**settings | {decay: value}), 10)
        updates.append(optimizer.update(gradient, optimizer.init(params), params)[0])
    moved = set()
    for (path, plain), decayed, p in zip(
        jax.tree.leaves_with_path(updates[0]), *map(jax.tree.leaves, (updates[1], params)), strict=True
    ):
        if np.any(plain != decayed):
            moved.add(jax.tree_util.keystr(path, simple=True, separator="/"))
            rate = 0.2 if decay == "weight_decay" else 0.1
            np.testing.assert_allclose(decayed - plain, -rate * 0.5 * p, atol=1e-6)
    if decay == "weight_decay":
        assert moved == {f"blocks/{name}/kernel" for name in
                         ("attention/qkv", "attention/out", "mlp/up", "mlp/down")}  # fmt: skip
    else:
        assert moved == {"token_embedding/embedding", "position_embedding/embedding",
                         "bigram_embedding/embedding", "head/kernel"}  # fmt: skip


def test_adamw_against_its_formula():
    config = OptimizerConfig(
        schedule="constant",
        warmup_steps=0,
        learning_rate=0.1,
        b1=0.8,
        b2=0.9,
        weight_decay=0.3,
        clip_norm=0.0,
    )
    optimizer = make_optimizer(config, 10)
    value, m, v = np.float64([[1.0, -2.0]]), 0.0, 0.0
    params = {"kernel": jnp.asarray(value, jnp.float32)}
    state = optimizer.init(params)
    for step, g in enumerate([[0.5, 1.0], [-1.0, 2.0], [3.0, 0.1]], start=1):
        g = np.float64([g])
        updates, state = optimizer.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        adam = m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.9**step)) + 1e-8)
        value = value - 0.1 * (adam + 0.3 * value)
        np.testing.assert_allclose(params["kernel"], value, rtol=1e-5)


def norm_of(tree):
    return np.sqrt(sum(np.square(np.asarray(leaf)).sum() for leaf in jax.tree.leaves(tree)))


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_clipping_by_global_norm(scale):
    params, gradient = params_and_gradient()
    gradient = jax.tree.map(lambda g: scale * g / norm_of(gradient), gradient)
    clip = make_optimizer(OptimizerConfig(clip_norm=1.0, name="adamw"), 10)
    # Adam's first moment after one update is 0.1 of the clipped gradient.
    _, state = jax.jit(clip.update)(gradient, clip.init(params), params)
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(norm_of(moment), 0.1 * min(scale, 1.0), rtol=1e-4)


def test_muon_moves_each_block_matrix_along_an_orthogonal_one():
    """Newton-Schulz brings every singular value of an update near 1, for each matrix by itself."""
    config = small_model(d_model=32, d_mlp=48)
    params = make_params(config)
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(p.dtype), params)
    settings = OptimizerConfig(
        name="muon", schedule="constant", warmup_steps=0, muon_learning_rate=1.0, learning_rate=1e-3,
        weight_decay=0.0,
    )  # fmt: skip
    optimizer = make_optimizer(settings, 10)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    blocks = jax.tree.map(np.asarray, updates["blocks"])
    matrices = [
        *(blocks["attention"]["qkv"]["kernel"][layer, :, i].reshape(32, 32)
          for layer in range(2) for i in range(3)),
        *blocks["attention"]["out"]["kernel"].reshape(2, 32, 32),
        *blocks["mlp"]["up"]["kernel"].reshape(2, 32, 48) / np.sqrt(48 / 32),  # scaled by shape
        *blocks["mlp"]["down"]["kernel"],
    ]  # fmt: skip
    for matrix in matrices:
        values = np.linalg.svd(matrix, compute_uv=False)
        assert np.median(values) > 0.6 and values.max() < 1.3  # of noise itself: from 0.1 to 11
    # Everything else is Adam's. Its first update is the rate, up to the sign; Nesterov's look ahead
    # adds b1 (1 - b1) / (1 - b1^2) of it.
    wanted = 1e-3 * (1 + 0.9 * 0.1 / 0.19)
    np.testing.assert_allclose(np.abs(updates["token_embedding"]["embedding"]), wanted, rtol=2e-3)
