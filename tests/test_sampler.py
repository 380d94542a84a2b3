import re

import jax
import numpy as np
import pytest
from conftest import MODELS, NAMES, VOCAB, apply, make_gpt, make_params, small_model, some
from scipy import stats

import gpt_jax.sampling.generate as sampler
from gpt_jax.config import MeshConfig
from gpt_jax.model.cache import empty_cache
from gpt_jax.model.cpu import min_rows
from gpt_jax.model.params import unstack_layers
from gpt_jax.parallel.mesh import make_mesh, replicated
from gpt_jax.sampling.generate import (
    MANY_ROWS,
    SHORT_PROMPT,
    decode,
    generate_tokens,
    prefill,
    window_start,
)
from gpt_jax.sampling.rules import apply_rules, draw, make_rules

KEY = jax.random.key(5)
T = 8


def make_model(**options):
    config = small_model(context=T, **options)
    return make_gpt(config, VOCAB), make_params(config)


def prompt_of(length, rows=1):
    return np.random.default_rng(length).integers(0, VOCAB, (rows, length), np.int32)


def generate(model, params, prompt, length, rules=None, key=KEY, window="half"):
    rules = make_rules(greedy=True) if rules is None else rules
    return np.concatenate(list(generate_tokens(model, params, prompt, length, rules, key, window)), axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_equals_the_full_forward_pass(name):
    """Every prompt length 1 to T - 1, then one token at a time, in a batch of three, every position."""
    model, params = make_model(**MODELS[name])
    params = unstack_layers(params)
    tokens_BxT = prompt_of(T, rows=3)
    full_BxTxV, _ = apply(model, params, tokens_BxT)
    for length in range(1, T):
        padded = tokens_BxT.copy()
        padded[:, length:] = VOCAB - 1  # padding must leave no trace
        cache = prefill(model, params, padded, np.int32(length))
        for t in range(length, T):
            logits_Bx1xV, cache = apply(model, params, tokens_BxT[:, t : t + 1], cache)
            np.testing.assert_allclose(logits_Bx1xV[:, 0], full_BxTxV[:, t], atol=1e-5, rtol=1e-4)
        assert int(cache.length) == T


def test_a_convolution_caches_only_the_rows_that_it_reads():
    model, params = make_model(conv_width=4)
    cache = prefill(model, unstack_layers(params), prompt_of(T, rows=2), np.int32(3))
    assert cache.layers[0].conv_BxSxD.shape == (2, 3, model.config.d_model)


@pytest.mark.parametrize("pieces", some([3, 2, 3], [1, 7], [5, 3]))
def test_a_cache_takes_several_tokens_at_a_time(pieces):
    model, params = make_model(**MODELS["modern"])
    params = unstack_layers(params)
    tokens_BxT = prompt_of(T, rows=2)
    full_BxTxV, _ = apply(model, params, tokens_BxT)
    cache, start = empty_cache(model.config, model.execution, VOCAB, 2), 0
    for size in pieces:
        part = tokens_BxT[:, start : start + size]
        logits, cache = apply(model, params, part, cache)
        np.testing.assert_allclose(logits, full_BxTxV[:, start : start + size], atol=1e-5, rtol=1e-4)
        start += size


def naive_greedy(model, params, prompt, length, window):
    """The definition: keep a window of true text; when it has grown past T, fall back to the last T/2."""
    text, seen, out = list(prompt), [], []
    for token in text:
        seen.append(token)
        if len(seen) > T:
            seen = seen[-(T // 2) :] if window == "half" else seen[-T:]
    for _ in range(length):
        # Causal, so padding on the right changes nothing to its left; one shape compiles once.
        padded = np.array(seen + [0] * (T - len(seen)), np.int32)[None]
        token = int(np.argmax(apply(model, params, padded)[0][0, len(seen) - 1]))
        out.append(token)
        seen.append(token)
        if len(seen) > T:
            seen = seen[-(T // 2) :] if window == "half" else seen[-T:]
    return out


@pytest.mark.parametrize("window", ["half", "exact"])
@pytest.mark.parametrize("name", some("modern", "gpt2"))
def test_generation_past_the_context_follows_its_definition(name, window):
    model, params = make_model(**MODELS[name])
    for prompt_length in (1, 3, T - 1, T, T + 1, 2 * T + 3):
        prompt = prompt_of(prompt_length)
        wanted = naive_greedy(model, params, prompt[0].tolist(), 3 * T + 1, window)
        got = generate(model, params, prompt, 3 * T + 1, window=window)[0].tolist()
        assert got == wanted, f"prompt of {prompt_length}"


@pytest.mark.parametrize("n_devices", some(None, 1, 2, quick=2))
def test_the_decoder_compiles_once(n_devices):
    """From the first token on, whether or not the parameters are bound to devices."""
    model, params = make_model(d_mlp=24 + 4 * (n_devices or 0))  # no other test has compiled it
    if n_devices:
        params = jax.device_put(params, replicated(make_mesh(MeshConfig(), jax.devices()[:n_devices])))
    before = decode._cache_size()
    generate(model, params, prompt_of(1), 5 * T)
    assert decode._cache_size() == before + 1


def test_of_equal_scores_the_first_is_drawn():
    logits_BxV = np.array([[0, 7, -np.inf, 7], [-3, -3, -3, -3]], np.float32)
    token_B = jax.jit(draw)(jax.random.split(KEY, 2), logits_BxV, make_rules(greedy=True))
    assert token_B.tolist() == [1, 0]


def test_greedy_texts_differ_between_windows():
    """Otherwise the test above could not tell one window from the other."""
    model, params = make_model()
    texts = [generate(model, params, prompt_of(3), 50, window=w).tolist() for w in ("half", "exact")]
    assert texts[0] != texts[1]


@pytest.mark.slow
def test_many_texts_at_once_are_those_of_one_at_a_time(monkeypatch):
    """Their short prompt is read in a window of its own size, and their cache grows."""
    rooms = []
    decode = sampler.decode
    monkeypatch.setattr(
        sampler, "decode", lambda *arguments: rooms.append(arguments[3].room) or decode(*arguments)
    )
    config = small_model(context=2 * SHORT_PROMPT + 2)
    model, params = make_gpt(config, VOCAB), make_params(config)
    prompts = prompt_of(3, MANY_ROWS)
    monkeypatch.setattr(sampler, "CHUNK", 4)
    texts = generate(model, params, prompts, config.context + 5)
    assert rooms[:9] == [17, 17, 17, 26, 26, 26, 34, 34, 26]
    for row in (0, MANY_ROWS - 1):
        alone = generate(model, params, prompts[row : row + 1], config.context + 5)
        np.testing.assert_array_equal(texts[row : row + 1], alone)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_token_copies_no_whole_cache(rows):
    model, params = make_model()
    rows = max(rows, min_rows())
    params = unstack_layers(params)
    prompt_BxT = prompt_of(3, rows)
    cache = prefill(model, params, prompt_BxT, np.int32(3))
    arguments = (model, params, prompt_BxT[:, 0], cache, make_rules(), KEY, np.arange(3, 7))
    program = decode.lower(*arguments).compile().as_text()
    of_a_cache = {",".join(map(str, x.shape)) for x in (cache.layers[0].k_BxHxKxS, cache.layers[0].v_BxHxSxK)}
    copied = re.findall(r"= f32\[([0-9,]+)\]\S* copy\(", program)
    assert not of_a_cache & set(copied)


@pytest.mark.parametrize("context", [1, 2, 3, 8, 9])
def test_windows_are_contiguous_and_long_enough(context):
    for n in range(1, 6 * context + 5):
        size = n - window_start(n, context)
        assert size == n if n <= context else max(context // 2, 1) <= size <= context


@pytest.mark.parametrize("context", some(1, 2, 5))
def test_odd_contexts_generate(context):
    config = small_model(context=context)
    model = make_gpt(config, VOCAB)
    params = make_params(config)
    assert generate(model, params, prompt_of(2), 40).shape == (1, 40)


@pytest.mark.parametrize("window", ["half", "exact"])
def test_a_text_does_not_depend_on_how_its_generation_is_cut(window):
    model, params = make_model()
    rules, prompt = make_rules(temperature=1.5), prompt_of(5)
    whole = generate(model, params, prompt, 60, rules, window=window)
    first = generate(model, params, prompt, 23, rules, window=window)
    so_far = np.concatenate([prompt, first], axis=1)
    rest = generate(model, params, so_far, 37, rules, window=window)
    assert whole.tolist() == np.concatenate([first, rest], axis=1).tolist()


@pytest.mark.parametrize("window", ["half", "exact"])
def test_what_no_window_reaches_changes_nothing(window):
    """But how many tokens there are before decides the window and the key of each token."""
    model, params = make_model()
    rules = make_rules(temperature=1.5)
    for length in (T + 1, 2 * T, 3 * T + 2):
        prompt = prompt_of(length)
        whole = generate(model, params, prompt, 40, rules, window=window)
        others = np.concatenate([(prompt[:, :-T] + 1) % VOCAB, prompt[:, -T:]], axis=1)
        assert generate(model, params, others, 40, rules, window=window).tolist() == whole.tolist()
        shorter = generate(model, params, prompt[:, -T:], 40, rules, window=window)
        assert shorter.tolist() != whole.tolist(), f"prompt of {length}"


def test_a_row_does_not_depend_on_the_rows_beside_it():
    model, params = make_model()
    prompt = np.tile(prompt_of(4), (5, 1))
    five = generate(model, params, prompt, 30, make_rules(temperature=2.0))
    one = generate(model, params, prompt[:1], 30, make_rules(temperature=2.0))
    assert five[0].tolist() == one[0].tolist()
    assert len({tuple(row) for row in five.tolist()}) == 5


@pytest.mark.slow
def test_seeds_give_different_texts_and_a_seed_the_same():
    model, params = make_model()
    texts = [
        generate(model, params, prompt_of(4), 30, make_rules(), jax.random.key(seed)).tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "rules",
    some(
        {"top_k": 6, "top_p": 0.7},
        {},
        {"temperature": 0.7},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
    ),
    ids=str,
)
def test_frequencies_follow_the_rules(rules):
    """Chi-square over 4,000 rows of the whole sampler, at its first and at a later, cached token."""
    model, params = make_model(init_std=0.15)
    rules = make_rules(**rules)
    rows = 4000
    prompt = np.tile(prompt_of(4), (rows, 1))
    drawn_BxN = generate(model, params, prompt, 2, rules)
    check_frequencies(model, params, prompt[0], drawn_BxN[:, 0], rules)
    # Among the rows that began with the commonest token, the next one has one distribution too.
    common = np.bincount(drawn_BxN[:, 0]).argmax()
    same = drawn_BxN[drawn_BxN[:, 0] == common]
    check_frequencies(model, params, np.append(prompt[0], common), same[:, 1], rules)


def check_frequencies(model, params, text, drawn, rules):
    logits_V = apply(model, params, text[None])[0][0, -1]
    wanted = np.asarray(jax.nn.softmax(apply_rules(logits_V, rules)), np.float64)
    counts = np.bincount(drawn, minlength=VOCAB)
    assert (counts[wanted == 0] == 0).all()
    kept = wanted > 0
    assert kept.sum() > 1
    expected = wanted[kept] / wanted[kept].sum() * len(drawn)
    assert stats.chisquare(counts[kept], expected).pvalue > 1e-4
