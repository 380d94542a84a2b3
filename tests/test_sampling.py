import jax
import numpy as np
import pytest
from scipy import stats

from gpt_jax.errors import UserError
from gpt_jax.sampling.rules import apply_rules, draw, make_rules

LOGITS = np.random.default_rng(0).normal(0, 2, (20, 12)).astype(np.float32)


def softmax(logits):
    weights = np.exp(np.float64(logits) - np.max(logits))
    return weights / weights.sum()


def probabilities(logits, **rules):
    return np.asarray(jax.nn.softmax(apply_rules(logits, make_rules(**rules))))


def only(keep, p):
    kept = np.where(keep, p, 0)
    return kept / kept.sum()


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature(logits, temperature):
    wanted = softmax(np.float64(logits) / temperature)
    np.testing.assert_allclose(probabilities(logits, temperature=temperature), wanted, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5, 12, 200])
def test_top_k(k):
    for logits in LOGITS:
        p = softmax(logits)
        rank = np.argsort(np.argsort(-p))
        np.testing.assert_allclose(probabilities(logits, top_k=k), only(rank < k, p), rtol=1e-5)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p_is_the_smallest_likeliest_set_that_holds_it(top_p):
    for logits in LOGITS:
        p = softmax(logits)
        chosen, held = set(), 0.0
        for token in np.argsort(-p):
            if held >= top_p:
                break
            chosen.add(token)
            held += p[token]
        keep = np.isin(np.arange(len(p)), list(chosen))
        np.testing.assert_allclose(probabilities(logits, top_p=top_p), only(keep, p), rtol=1e-5)


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(min_p):
    for logits in LOGITS:
        p = softmax(logits)
        keep = p >= min_p * p.max()
        np.testing.assert_allclose(probabilities(logits, min_p=min_p), only(keep, p), rtol=1e-5)


def test_rules_apply_in_order():
    """Top-p counts the probability that is left after top-k, at the temperature given."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the first two, 4/7 and 3/7: the first alone holds half.
    np.testing.assert_allclose(probabilities(logits, top_k=2, top_p=0.5), [1, 0, 0, 0])
    np.testing.assert_allclose(probabilities(logits, top_p=0.5), [4 / 7, 3 / 7, 0, 0], rtol=1e-5)
    # At temperature 1/2 probabilities go as squares: 16, 9, 4, 1 of 30.
    got = probabilities(logits, temperature=0.5, min_p=0.2)
    np.testing.assert_allclose(got, np.array([16, 9, 4, 0]) / 29, rtol=1e-5)


def test_equal_tokens_share_their_fate():
    logits = np.array([1.0, 1.0, 1.0, 0.0], np.float32)
    np.testing.assert_allclose(probabilities(logits, top_k=1), [1 / 3] * 3 + [0], rtol=1e-6)
    np.testing.assert_allclose(probabilities(logits, top_p=0.1), [1 / 3] * 3 + [0], rtol=1e-6)


def test_greedy_takes_the_likeliest():
    keys = jax.random.split(jax.random.key(0), 20)
    wanted = LOGITS.argmax(axis=1)
    assert (draw(keys, LOGITS, make_rules(greedy=True)) == wanted).all()
    assert (draw(keys, LOGITS, make_rules(temperature=0.0)) == wanted).all()


@pytest.mark.parametrize("rules", [{}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_draws_follow_the_probabilities(rules):
    n = 20_000
    keys = jax.random.split(jax.random.key(7), n)
    drawn = draw(keys, np.tile(LOGITS[0], (n, 1)), make_rules(**rules))
    counts = np.bincount(drawn, minlength=12)
    p = np.float64(probabilities(LOGITS[0], **rules))
    assert (counts[p == 0] == 0).all()
    kept = p > 0
    assert stats.chisquare(counts[kept], p[kept] / p.sum() * n).pvalue > 1e-4


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"top_k": 0}, {"top_k": -3}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")},
        {"min_p": -0.1}, {"min_p": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_named(rules):
    ((name, value),) = rules.items()
    with pytest.raises(UserError, match=f"{name} = {value} must"):
        make_rules(**rules)
