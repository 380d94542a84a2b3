"""What a model computes inside on the way to its predictions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.interchange.explanation import N_GUESSES, Explanation
from gpt_jax.model.layers import Params, make_norm
from gpt_jax.model.params import unstack_layers
from gpt_jax.model.transformer import GPT, Block, to_logits


def explain(module: GPT, params: Params, tokenizer: Tokenizer, tokens_T: np.ndarray) -> Explanation:
    """Run a model on 1 to `context` tokens and collect what it makes of them."""
    size = tokenizer.vocab_size
    logits_LxTxV, attention_LxHxTxT = map(np.asarray, _look_inside(module, params, tokens_T[None]))
    log_probs_LxTxV = np.asarray(jax.nn.log_softmax(logits_LxTxV[..., :size]))
    of_token_LxT = np.full(log_probs_LxTxV.shape[:2], np.nan)
    next_1xTx1 = tokens_T[None, 1:, None].astype(np.int64)
    of_token_LxT[:, 1:] = np.take_along_axis(log_probs_LxTxV[:, :-1], next_1xTx1, -1)[..., 0]
    last_TxV = log_probs_LxTxV[-1]
    best_TxG = np.argsort(-last_TxV, kind="stable")[:, :N_GUESSES]
    show = partial(_show, tokenizer)
    guesses = [
        [(show(i), float(np.exp(log_probs_V[i]))) for i in best_G]
        for best_G, log_probs_V in zip(best_TxG, last_TxV, strict=True)
    ]
    return Explanation(
        tokens=[show(i) for i in tokens_T],
        surprise_T=-of_token_LxT[-1],
        guesses=[[], *guesses],
        attention_LxHxTxT=attention_LxHxTxT,
        lens=[["", *map(show, ids_T)] for ids_T in log_probs_LxTxV[:, :-1].argmax(-1)],
        lens_LxT=np.exp(of_token_LxT),
    )


def _show(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.decode(np.array([token_id]))


@partial(jax.jit, static_argnums=0)
def _look_inside(module: GPT, params: Params, tokens_1xT: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The logits after each layer, [L, T, V], and the attention weights, [L, H, T, T].

    Logit lens: the final norm and the head applied to the residual stream after each layer (nostalgebraist
    2020, "interpreting GPT: the logit lens").
    """
    config, execution = module.config, module.execution
    _, recorded = module.apply(
        {"params": unstack_layers(params)}, tokens_1xT, mutable=["intermediates"],
        capture_intermediates=lambda layer, _: isinstance(layer, Block),
    )  # fmt: skip
    layers = [recorded["intermediates"][f"block_{i}"] for i in range(config.n_layer)]
    norm: Any = make_norm(config, execution, None)
    tied = config.tied_embedding
    head_VxD = params["token_embedding"]["embedding"] if tied else params["head"]["kernel"].T
    logits = [
        to_logits(execution, norm.apply({"params": params["final_norm"]}, layer["__call__"][0][0]), head_VxD)[
            0
        ]
        for layer in layers
    ]
    weights = [layer["attention"]["weights_BxHxTxS"][0][0] for layer in layers]
    return jnp.stack(logits), jnp.stack(weights)
