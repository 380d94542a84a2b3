"""The loss in pieces: the same numbers as in one piece, and no array of all logits."""

import re
import runpy

import jax
import numpy as np
import pytest
from conftest import VOCAB, make_gpt, make_params, small_model, some
from flax import linen as nn

from gpt_jax.config import Config, MeshConfig
from gpt_jax.model import loss
from gpt_jax.model.loss import count_pieces, next_token_loss, window_losses
from gpt_jax.model.params import init_params
from gpt_jax.parallel.execution import resolve_execution
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.paths import ROOT as REPOSITORY

BATCH, TIME = 8, 7  # the vocabulary, too, is odd: 11
ARRAYS = np.random.default_rng(0).integers(0, VOCAB, (2, BATCH, TIME), np.int32)
KEY = jax.random.key(0)


def loss_and_gradient(model, params):
    """Of a batch, compiled anew, since the size of a piece is a constant; differentiated after compiling."""
    objective = jax.jit(lambda params: next_token_loss(params, model, tuple(ARRAYS), KEY))
    return jax.jit(jax.value_and_grad(objective))(params)


def assert_close(got, wanted, error=1e-5):
    """Each array by itself, relative to its norm."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(b) > 0 and np.linalg.norm(a - b) < error * np.linalg.norm(b)


CASES = some((3, {}), (3, {"tied_embedding": False}), (1, {}), (3, {"dtype": "bfloat16"}), quick=2)


@pytest.mark.parametrize("length, options", CASES)
def test_a_loss_in_pieces_and_its_gradient_are_those_of_the_whole(length, options, monkeypatch):
    model, params = (
        make_gpt(small_model(n_layer=1, **options)),
        make_params(small_model(n_layer=1, **options)),
    )
    whole = loss_and_gradient(model, params)
    monkeypatch.setattr(loss, "MAX_LOGITS", BATCH * length * VOCAB)
    assert count_pieces(model.execution, ARRAYS[0], VOCAB) == -(-TIME // length)
    assert_close(loss_and_gradient(model, params), whole, 1e-2 if "dtype" in options else 1e-5)


def test_an_evaluation_in_pieces_is_that_of_the_whole(monkeypatch):
    model, params = make_gpt(small_model(n_layer=1)), make_params(small_model(n_layer=1))
    mask = np.arange(TIME) < 5
    arguments = model, params, *ARRAYS, np.broadcast_to(mask, ARRAYS[0].shape)
    whole = window_losses(*arguments)
    window_losses.clear_cache()
    monkeypatch.setattr(loss, "MAX_LOGITS", BATCH * 3 * VOCAB)
    np.testing.assert_allclose(window_losses(*arguments), whole, rtol=1e-6)
    window_losses.clear_cache()


@pytest.mark.slow
def test_each_device_computes_pieces_of_its_own_windows(monkeypatch):
    config, mesh = small_model(n_layer=1), make_mesh(MeshConfig(data=4, fsdp=2))
    params = make_params(config)
    whole = loss_and_gradient(make_gpt(config), params)
    monkeypatch.setattr(loss, "MAX_LOGITS", 3 * VOCAB)
    model = make_gpt(config, mesh=mesh)
    assert count_pieces(model.execution, ARRAYS[0], VOCAB) == 3
    assert_close(loss_and_gradient(model, params), whole)


@pytest.mark.parametrize("tied", some(True, False))
def test_no_array_of_all_logits_exists(tied, monkeypatch):
    vocab_size = 997
    model = make_gpt(small_model(n_layer=1, tied_embedding=tied), vocab_size)
    params = nn.unbox(jax.eval_shape(lambda: init_params(model, KEY)))

    def lower():
        window_losses.clear_cache()
        both = jax.jit(lambda params: (
            jax.grad(next_token_loss)(params, model, tuple(ARRAYS), KEY),
            window_losses(model, params, *ARRAYS, ARRAYS[0] > 0),
        ))  # fmt: skip
        return both.lower(params)

    assert f"tensor<{BATCH}x{TIME}x{vocab_size}xf32>" in lower().as_text()
    monkeypatch.setattr(loss, "MAX_LOGITS", BATCH * 2 * vocab_size)
    text = lower().compile().as_text()
    window_losses.clear_cache()
    assert re.search(rf"f32\[({BATCH},2|{BATCH * 2}),{vocab_size}\]", text)
    assert not re.search(rf"\[({BATCH},{TIME}|{BATCH * TIME}),{vocab_size}\]", text)


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare_best", "shakespeare_cpu_long", "smoke"])
def test_the_logits_of_characters_are_one_piece(name):
    config = Config.from_dict(runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]())
    targets_BxT = np.zeros((config.train.batch_size, config.model.context), np.int32)
    assert count_pieces(resolve_execution(config.model), targets_BxT, 65) == 1
    assert count_pieces(resolve_execution(config.model), np.zeros((64, 1024)), 50_257) > 1
