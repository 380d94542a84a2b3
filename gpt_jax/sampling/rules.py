"""Rules from logits to a token, as pure functions."""

import math

import jax
import jax.numpy as jnp
from flax import struct

from gpt_jax.errors import UserError
from gpt_jax.model import cpu


class SamplingRules(struct.PyTreeNode):
    """How a token is drawn. A rule that is None is off, and is not in the compiled program.

    The values are traced: another value needs no new compilation.
    """

    repetition_penalty: float | None = None  # makes the tokens of the text so far less likely: `penalize`
    temperature: float | None = None  # the logits are divided by it
    top_k: int | None = None  # only the k likeliest tokens stay
    top_p: float | None = None  # the smallest set of likeliest tokens with at least this probability stays
    min_p: float | None = None  # only tokens at least this many times as likely as the likeliest stay
    # Take the likeliest token; of the other rules only the repetition penalty counts.
    greedy: bool = struct.field(pytree_node=False, default=False)
    # No rule: also compute the log probability of each token.
    logprobs: bool = struct.field(pytree_node=False, default=False)
    # The vocabulary of the tokenizer. A model may have more rows, and those are never drawn. None: all are.
    n_tokens: int | None = struct.field(pytree_node=False, default=None)


def make_rules(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    greedy: bool = False,
    repetition_penalty: float = 1.0,
    logprobs: bool = False,
) -> SamplingRules:
    """Check the rules. A temperature of 0 is greedy; a top_k above the vocabulary keeps everything.

    A repetition penalty of 1 is none, and one below 1 makes repetitions likelier. `logprobs`: also compute
    the log probability of each token.

    Raises:
        UserError: a value out of its range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature = {temperature} must be a number of 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k = {top_k} must be 1 or above")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p} must lie in (0, 1]")
    if min_p is not None and not 0 <= min_p <= 1:
        raise UserError(f"min_p = {min_p} must lie in [0, 1]")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise UserError(f"repetition_penalty = {repetition_penalty} must be a number above 0; 1 is none")
    penalty = None if repetition_penalty == 1 else repetition_penalty
    if greedy or temperature == 0:
        return SamplingRules(penalty, greedy=True, logprobs=logprobs)
    return SamplingRules(
        penalty,
        temperature=max(temperature, 1e-30),  # smaller ones are 0 in float32
        top_k=None if top_k is None else min(top_k, 2**31 - 1),
        top_p=None if top_p == 1 else top_p,  # 1 keeps all, but a rounded sum might not reach it
        min_p=min_p,
        logprobs=logprobs,
    )


def penalize(logits_BxV: jax.Array, seen_BxV: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """The logits, those of seen tokens divided by the penalty if they are positive, else multiplied by it.

    As in CTRL (Keskar et al. 2019) and Hugging Face's `repetition_penalty`. `seen_BxV` are the tokens of each
    text so far: of its whole prompt, however long it is, and those that were drawn.
    """
    penalized_BxV = jnp.where(logits_BxV > 0, logits_BxV / penalty, logits_BxV * penalty)
    return jnp.where(seen_BxV, penalized_BxV, logits_BxV)


def apply_rules(logits_V: jax.Array, rules: SamplingRules) -> jax.Array:
    """Logits [V] after temperature, top-k, top-p and min-p, in this order; excluded tokens get -inf.

    Each rule sees the probabilities that the rules before it leave. Of equally likely tokens at the edge of
    top-k or top-p, all stay.
    """
    if rules.temperature is not None:
        logits_V = (logits_V - jnp.max(logits_V)) / rules.temperature  # the largest must not overflow
    if rules.top_k is not None:
        k = jnp.minimum(rules.top_k, logits_V.size)
        kth = jnp.sort(logits_V, descending=True)[k - 1]
        logits_V = jnp.where(logits_V >= kth, logits_V, -jnp.inf)
    if rules.top_p is not None:
        sorted_V = jnp.sort(logits_V, descending=True)
        probabilities_V = jax.nn.softmax(sorted_V)
        likelier_V = jnp.cumsum(probabilities_V) - probabilities_V  # probability of what comes before
        # The first token has 0 before it, so it always stays.
        least = jnp.min(jnp.where(likelier_V < rules.top_p, sorted_V, jnp.inf))
        logits_V = jnp.where(logits_V >= least, logits_V, -jnp.inf)
    if rules.min_p is not None:
        # p / p_max >= min_p, in logarithms; log 0 = -inf keeps everything.
        keep_V = logits_V - jnp.max(logits_V) >= jnp.log(rules.min_p)
        logits_V = jnp.where(keep_V, logits_V, -jnp.inf)
    return logits_V


def draw(
    keys_B: jax.Array, logits_BxV: jax.Array, rules: SamplingRules, seen_BxV: jax.Array | None = None
) -> jax.Array:
    """One token id for each row, int32 [B], each from a key of its own.

    A repetition penalty needs the tokens of each text so far, `seen_BxV`; it comes before the other rules.
    """
    n_rows = logits_BxV.shape[1]
    if rules.n_tokens is not None and rules.n_tokens < n_rows:
        logits_BxV = jnp.where(jnp.arange(n_rows) < rules.n_tokens, logits_BxV, -jnp.inf)
    if rules.repetition_penalty is not None and seen_BxV is not None:
        logits_BxV = penalize(logits_BxV, seen_BxV, rules.repetition_penalty)

    def score(key: jax.Array, logits_V: jax.Array) -> jax.Array:
        # The largest of logits and Gumbel noise is a draw from their softmax: `jax.random.categorical`.
        return apply_rules(logits_V, rules) + jax.random.gumbel(key, logits_V.shape)

    scores_BxV = logits_BxV if rules.greedy else jax.vmap(score)(keys_B, logits_BxV)
    return jax.lax.platform_dependent(
        scores_BxV, cpu=cpu.largest, default=lambda scores: jnp.argmax(scores, axis=-1).astype(jnp.int32)
    )


def log_probability(logits_BxV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Of each token under the softmax of the logits, which no rule has changed: float32 [B]."""
    logprobs_BxV = jax.nn.log_softmax(logits_BxV.astype(jnp.float32))
    return jnp.take_along_axis(logprobs_BxV, token_B[:, None], axis=1)[:, 0]
