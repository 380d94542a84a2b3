import dataclasses
import math
import runpy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import MODELS, NAMES, VOCAB, apply, init, make_gpt, make_params, small_model, some
from flax import linen as nn

from gpt_jax.config import Config
from gpt_jax.model import attention
from gpt_jax.model.attention import attend
from gpt_jax.model.cache import empty_cache
from gpt_jax.model.cpu import attend_by_sums, attend_in_blocks, linear_product
from gpt_jax.model.loss import next_token_loss, token_losses
from gpt_jax.model.options import bigram_ids, n_bigram_ids
from gpt_jax.model.params import count_params, init_params, unstack_layers
from gpt_jax.paths import ROOT as REPOSITORY


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, shape, np.int32)


def read_config(name):
    values = runpy.run_path(str(REPOSITORY / "configs" / f"{name}.py"))["get_config"]()
    return Config.from_dict(values)


@pytest.mark.parametrize("name", NAMES)
def test_forward_equals_numpy(name):
    config = small_model(**MODELS[name])
    params = make_params(config)
    tokens_BxT = random_tokens(3, config.context)
    logits_BxTxV, _ = apply(make_gpt(config, VOCAB), params, tokens_BxT)
    params64 = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    wanted = np.stack([reference.forward(params64, config, tokens) for tokens in tokens_BxT])
    assert wanted.std() > 0.3  # not a model that says nothing
    np.testing.assert_allclose(logits_BxTxV, wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("name", some("modern", "bias", "swiglu"))
def test_gradient_equals_finite_differences_in_float64(name):
    config = small_model(**MODELS[name])
    params = make_params(config)
    inputs, targets = random_tokens(2, 8), random_tokens(2, 8, seed=1)
    gradient = jax.jit(jax.grad(next_token_loss), static_argnums=1)(
        params, make_gpt(config), (inputs, targets), jax.random.key(0)
    )
    params64 = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    rng = np.random.default_rng(2)
    # One direction for each array by itself: a wrong one cannot hide among the others.
    leaves, tree = jax.tree.flatten(params64)
    for i, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        direction = rng.standard_normal(leaf.shape)
        losses = []
        for sign in (1, -1):
            moved = [*leaves[:i], leaf + sign * 1e-5 * direction, *leaves[i + 1 :]]
            losses.append(reference.loss(jax.tree.unflatten(tree, moved), config, inputs, targets))
        wanted = (losses[0] - losses[1]) / 2e-5
        got = float(np.sum(np.asarray(slope, np.float64) * direction))
        scale = np.linalg.norm(slope) * np.linalg.norm(direction)
        assert abs(got - wanted) < 1e-4 * scale + 1e-7, jax.tree.leaves_with_path(params)[i][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_jitted_gradient_equals_unjitted(name):
    config = small_model(dropout=0.3, attention_dropout=0.3, **MODELS[name])
    params = make_params(config)
    arguments = (random_tokens(2, 8), random_tokens(2, 8, seed=1), jax.random.key(0))

    def gradient(params, inputs, targets, key):
        return jax.grad(next_token_loss)(params, make_gpt(config), (inputs, targets), key)

    with jax.disable_jit():
        plain = gradient(params, *arguments)
    jitted = jax.jit(gradient)(params, *arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-4), plain, jitted)


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_causality_by_gradient(name):
    """No output depends on a later input, and each depends on every earlier one."""
    # Untied, so that moving an input's embedding row does not move the head.
    config = small_model(**MODELS[name] | {"tied_embedding": False})
    params = make_params(config)
    tokens_1xT = np.arange(8)[None] % VOCAB  # all different: each has an embedding row of its own

    def outputs(rows_TxD):
        table_VxD = jnp.asarray(params["token_embedding"]["embedding"])
        embedding = table_VxD.at[tokens_1xT[0]].set(rows_TxD)
        moved = params | {"token_embedding": {"embedding": embedding}}
        return apply(make_gpt(config, VOCAB), moved, tokens_1xT)[0][0]

    rows_TxD = params["token_embedding"]["embedding"][tokens_1xT[0]]
    jacobian_TxVxTxD = jax.jit(jax.jacobian(outputs))(rows_TxD)
    influence_TxT = np.abs(jacobian_TxVxTxD).max(axis=(1, 3))  # [output, input]
    assert (influence_TxT[np.triu_indices(8, 1)] == 0).all()
    assert (influence_TxT[np.tril_indices(8)] > 1e-6).all()


def test_parameter_count_of_shakespeare():
    config = read_config("shakespeare").model
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(make_gpt(config, 65), jax.random.key(0))))
    width, n_layer = 384, 6
    attention_and_mlp = 4 * width**2 + 2 * 4 * width**2
    norms = 2 * width
    embeddings = 65 * width + 256 * width
    formula = n_layer * (attention_and_mlp + norms) + width + embeddings
    assert count_params(shapes) == formula == 10_745_088


def test_the_best_is_no_larger_than_its_record_allows():
    config = read_config("shakespeare_best")
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(make_gpt(config.model, 65), jax.random.key(0))))
    assert 10_000_000 < count_params(shapes) <= 10_700_000
    assert config.train.steps <= 5000


@pytest.mark.parametrize(
    "name", some("shakespeare_quick", "shakespeare", "shakespeare_cpu", "shakespeare_cpu_long")
)
def test_loss_at_initialisation_is_that_of_guessing(name):
    config = read_config(name).model
    model = make_gpt(config, 65)
    params = init(config, 65)
    tokens = np.random.default_rng(0).integers(0, 65, (2, 2, config.context), np.int32)
    logits, _ = apply(model, params, tokens[0])
    assert abs(float(token_losses(logits, tokens[1]).mean()) - math.log(65)) < 0.1


def test_residual_projections_start_smaller():
    config = small_model(n_layer=8, d_model=64, init_std=0.02)
    blocks = jax.tree.map(np.asarray, init(config)["blocks"])
    for kernel, std in (
        (blocks["attention"]["qkv"]["kernel"], 0.02),
        (blocks["attention"]["out"]["kernel"], 0.02 / 4),
        (blocks["mlp"]["up"]["kernel"], 0.02),
        (blocks["mlp"]["down"]["kernel"], 0.02 / 4),
    ):
        assert abs(float(kernel.std()) / std - 1) < 0.05
        assert len({float(layer.sum()) for layer in kernel}) == 8  # no two layers alike


def test_zero_initialised_blocks_add_nothing():
    config = small_model(zero_init=True)
    params = init(config)
    assert not params["blocks"]["attention"]["out"]["kernel"].any()
    assert not params["blocks"]["mlp"]["down"]["kernel"].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", some({"remat": "elementwise", "unroll": "no"}, {"remat": "block"}, {"unroll": "no"})
)
@pytest.mark.parametrize("name", some("modern", "gpt2"))
def test_remat_and_unrolling_change_no_gradient(name, other):
    config = small_model(dropout=0.3, attention_dropout=0.3, **MODELS[name])
    params = make_params(config)
    arguments = ((random_tokens(2, 8), random_tokens(2, 8, seed=1)), jax.random.key(0))
    gradient = [
        jax.jit(jax.grad(next_token_loss), static_argnums=1)(params, make_gpt(c), *arguments)
        for c in (config, dataclasses.replace(config, **other))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), *gradient)


@pytest.mark.parametrize(
    "x_shape, kernel_shape, axes",
    [((2, 5, 6), (6, 3, 2, 4), (2,)), ((2, 3, 5, 4), (3, 4, 6), (1, 3)), ((2, 5, 7), (7, 3), (2,))],
    ids=["wider", "of two axes", "narrower"],
)
def test_gradients_of_a_linear_product(x_shape, kernel_shape, axes):
    x, kernel = (jax.random.normal(jax.random.key(len(shape)), shape) for shape in (x_shape, kernel_shape))
    dimensions = ((axes, tuple(range(len(axes)))), ((), ()))

    def pull_back(product):
        y, gradients_of = jax.vjp(lambda x, kernel: product(x, kernel, dimensions), x, kernel)
        return y, *gradients_of(jnp.cos(y))

    for got, wanted in zip(pull_back(linear_product), pull_back(jax.lax.dot_general), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA on a CPU")
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_no_wide_activation_is_transposed(activation):
    config = small_model(n_layer=1, activation=activation, d_mlp=48)
    arguments = ((random_tokens(3, 8), random_tokens(3, 8, seed=1)), jax.random.key(0))
    gradient = jax.jit(jax.grad(next_token_loss), static_argnums=1)
    program = gradient.lower(make_params(config), make_gpt(config), *arguments).compile().as_text()
    assert "f32[24,48]" in program and "f32[48,24]" not in program  # of 24 tokens


def ids_of_pairs(before_N, tokens_N, vocab_size):
    return np.asarray(bigram_ids(tokens_N[:, None], before_N, vocab_size))[:, 0]


@pytest.mark.parametrize("vocab_size", [2, 3, 16, 65, 64, 127])
def test_every_pair_of_a_small_vocabulary_has_its_own_row(vocab_size):
    before_N, tokens_N = np.divmod(np.arange((vocab_size + 1) * vocab_size, dtype=np.int32), vocab_size)
    ids_N = ids_of_pairs(before_N, tokens_N, vocab_size)
    np.testing.assert_array_equal(ids_N, np.arange(n_bigram_ids(vocab_size)))


@pytest.mark.parametrize(
    "vocab_size", [128, 129, 255, 256, 257, 1000, 2**12, 2**14, 2**14 + 1, 50_257, 2**16, 100_000, 2**17]
)
def test_pairs_of_a_large_vocabulary_share_rows_as_if_at_random(vocab_size):
    rng, rows = np.random.default_rng(vocab_size), n_bigram_ids(vocab_size)
    assert rows == 2**14
    few = rng.permutation(vocab_size)[:5000].astype(np.int32)
    one = np.full_like(few, few[-1])
    pairs = rng.choice((vocab_size + 1) * vocab_size, 16_000, replace=False)
    many = [part.astype(np.int32) for part in np.divmod(pairs, vocab_size)]
    nothing = np.full_like(few, vocab_size)  # before the first token
    for before_N, tokens_N in ((one, few), (few, one), (few, few), (nothing, few), many):
        ids_N = ids_of_pairs(before_N, tokens_N, vocab_size)
        assert ids_N.dtype == np.int32 and ids_N.min() >= 0 and ids_N.max() < rows
        share = len(ids_N) / rows
        empty, deviation = np.exp(-share), (np.exp(-share) * (1 - (1 + share) * np.exp(-share)) / rows) ** 0.5
        assert abs(1 - len(set(ids_N.tolist())) / rows - empty) < 5 * deviation + 1 / rows


@pytest.mark.slow
def test_remat_keeps_fewer_activations():
    config = small_model(n_layer=6, context=64)
    params = make_params(config)
    arguments = ((random_tokens(2, 64), random_tokens(2, 64, seed=1)), jax.random.key(0))

    def saved_bytes(**options):
        model = make_gpt(dataclasses.replace(config, unroll="no", **options))
        gradient = jax.jit(jax.grad(next_token_loss), static_argnums=1)
        return gradient.lower(params, model, *arguments).compile().memory_analysis().temp_size_in_bytes

    everything = saved_bytes(remat="nothing")
    assert saved_bytes(remat="elementwise") < 0.7 * everything
    assert saved_bytes(remat="block") < 0.7 * everything


def test_blocks_of_queries_compute_less():
    def flops(n_blocks):
        q = jnp.zeros((1, 1, 64, 16))
        arguments = (q, q, q, jnp.tri(64, dtype=bool))
        run = jax.jit(lambda *qkv_mask: attend_in_blocks(attend, n_blocks, *qkv_mask))
        return run.lower(*arguments).compile().cost_analysis()["flops"]

    # Of b x b squares of scores, those on and below the diagonal are left.
    assert flops(2) < 0.8 * flops(1)
    assert flops(8) < 0.65 * flops(1)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_one_query_attends_by_sums_as_by_products(dtype, tolerance):
    q, k, v = jax.random.normal(jax.random.key(3), (3, 2, 3, 9, 4), dtype)
    for position in (0, 3, 8):
        query, mask = q[:, :, position : position + 1], jnp.arange(9)[None] <= position
        wanted = attend(query, k, v, mask)
        for attend_to_cache in (partial(attend, keys="bhks"), attend_by_sums):
            got = attend_to_cache(query, k.swapaxes(2, 3), v, mask)
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(got.astype("float32"), wanted.astype("float32"), atol=tolerance)


def test_attention_leaves_its_arguments_as_they_are():
    """Those of a notebook are NumPy's, which `*=` would change."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 4), np.float32)
    before = q.copy()
    attend(q, k, v, np.tri(5, dtype=bool))
    attend_by_sums(q[:, :, -1:], k.swapaxes(2, 3), v, np.ones((1, 5), bool))
    np.testing.assert_array_equal(q, before)


def test_dropout_is_drawn_for_each_block_of_queries(monkeypatch):
    seen = []

    def drop(weights, rate, seed_2, mask_index):
        seen.append((mask_index, *weights.shape[2:]))
        return weights

    monkeypatch.setattr(attention, "dropout", drop)
    q = jnp.zeros((1, 1, 8, 4))
    attend_in_blocks(attend, 3, q, q, q, jnp.tri(8, dtype=bool))
    assert seen == [(2, 2, 2), (3, 3, 5), (4, 3, 8)]


def test_a_list_of_layers_computes_the_same():
    config = small_model()
    params = make_params(config)
    tokens = random_tokens(2, 8)
    stacked, _ = apply(make_gpt(config, VOCAB), params, tokens)
    listed, _ = apply(make_gpt(config, VOCAB), unstack_layers(params), tokens)
    np.testing.assert_allclose(stacked, listed, atol=1e-6, rtol=1e-5)


def test_dropout_is_only_in_training_and_follows_its_key():
    config = small_model(dropout=0.5, attention_dropout=0.5)
    params, model, tokens = make_params(config), make_gpt(config, VOCAB), random_tokens(2, 8)

    @jax.jit
    def compute(dropout_key):
        return model.apply({"params": params}, tokens, dropout_key=dropout_key)[0]

    def run(key=None):
        return np.asarray(compute(None if key is None else jax.random.key(key)))

    assert (run() == run()).all()
    assert (run(1) == run(1)).all()
    assert not np.allclose(run(1), run(2))
    assert not np.allclose(run(1), run())


def test_bfloat16_stays_near_float32():
    config = small_model(**MODELS["modern"])
    params, tokens = make_params(config), random_tokens(2, 8)
    exact, _ = apply(make_gpt(config, VOCAB), params, tokens)
    rough, _ = apply(make_gpt(dataclasses.replace(config, dtype="bfloat16"), VOCAB), params, tokens)
    assert rough.dtype == jnp.float32
    assert 0 < float(jnp.abs(rough - exact).max()) < 0.1 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("options", [{}, {"tied_embedding": False}], ids=["tied", "untied"])
def test_logits_are_not_rounded_to_bfloat16(options):
    """The head multiplies bfloat16 numbers, and their float32 sums are the logits."""
    config = small_model(dtype="bfloat16", **options)
    logits, _ = apply(make_gpt(config, VOCAB), make_params(config), random_tokens(2, 8))
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert (logits != rounded).mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_float32_on_matrix_units_too(name):
    """Every matrix product, forward and backward, asks for full precision of a TPU's or GPU's units."""
    products = matrix_products(small_model(dtype="float32", **MODELS[name]))
    assert len(products) > 10
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products), products


def test_bfloat16_leaves_the_precision_to_the_hardware():
    assert not any("HIGHEST" in line for line in matrix_products(small_model(dtype="bfloat16")))


def matrix_products(config):
    """The lines of a gradient's program that multiply matrices."""
    model, params = make_gpt(config, VOCAB), make_params(config)

    def loss(params, tokens):
        return model.apply({"params": params}, tokens)[0].sum()

    program = jax.jit(jax.grad(loss)).lower(params, random_tokens(2, 8)).as_text()
    return [line for line in program.splitlines() if "dot_general" in line]


@pytest.mark.parametrize("name", some("modern", "gpt2"))
def test_the_fused_kernel_gets_what_attend_gets(name, monkeypatch):
    """cuDNN needs a GPU; JAX's reference behind the same function shows layout, scale, mask and gradient."""
    config = small_model(**MODELS[name] | {"n_layer": 1, "query_blocks": 1})
    params, model = make_params(config), make_gpt(config, VOCAB)
    inputs, targets = random_tokens(3, 8), random_tokens(3, 8, seed=1)
    calls = []

    def loss_and_gradient():
        gradient_of = jax.jit(jax.value_and_grad(next_token_loss), static_argnums=1)
        return gradient_of(params, model, (inputs, targets), jax.random.key(0))

    def stand_in(*qkv, is_causal, implementation):
        assert is_causal and implementation == "cudnn"
        calls.append(qkv)
        return attend_by_xla(*qkv, is_causal=True)

    plain = loss_and_gradient()
    attend_by_xla = partial(jax.nn.dot_product_attention, implementation="xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    model = model.clone(execution=dataclasses.replace(model.execution, attention="cudnn"))
    fused = loss_and_gradient()
    assert calls
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), fused, plain)


@pytest.mark.parametrize("shape", [*MODELS.values(), {"n_layer": 12}], ids=str)
def test_layers_are_unstacked_in_their_order(shape):
    params = make_params(small_model(**shape))
    unstacked = unstack_layers(params)
    layers = [unstacked.pop(f"block_{i}") for i in range(small_model(**shape).n_layer)]
    again = unstacked | {"blocks": jax.tree.map(lambda *layer: np.stack(layer), *layers)}
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_cache_needs_unstacked_parameters():
    config = small_model()
    model = make_gpt(config)
    cache = empty_cache(config, model.execution, VOCAB, 1)
    with pytest.raises(ValueError, match="unstack_layers"):
        apply(model, make_params(config), random_tokens(1, 2), cache)
