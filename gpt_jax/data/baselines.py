"""The losses of models that need no training, to compare a run with."""

import math

import numpy as np

from gpt_jax.data.tokens import Corpus, Tokens

MAX_VOCABULARY, MAX_TOKENS = 1024, 2**22  # of a bigram table, and read for it


def baseline_losses(corpus: Corpus) -> dict[str, float]:
    """Validation losses in nats per token: of a uniform guess, and of a table that knows the last token.

    The table counts which token follows which in the training split, and adds 0.01 for pairs that do not
    occur. With a vocabulary above 1,024 it is left out; of a split only the first 4 million tokens are read.
    """
    size = corpus.tokenizer.vocab_size
    losses = {"uniform": math.log(size)}
    if size <= MAX_VOCABULARY:
        counted_VxV, validated_VxV = (_pairs(split, size) for split in (corpus.train, corpus.val))
        smoothed_VxV = counted_VxV + 0.01
        log_probs_VxV = np.log(smoothed_VxV / smoothed_VxV.sum(1, keepdims=True))
        losses["bigram"] = float(-(validated_VxV * log_probs_VxV).sum() / validated_VxV.sum())
    return losses


def _pairs(tokens_N: Tokens, size: int) -> np.ndarray:
    """How often each token follows each other one, int64 [V, V]."""
    ids_N = np.asarray(tokens_N[:MAX_TOKENS], np.int64)
    return np.bincount(ids_N[:-1] * size + ids_N[1:], minlength=size * size).reshape(size, size)
