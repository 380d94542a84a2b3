"""The model again, in plain NumPy and float64, one window at a time: what the JAX one is held against."""

import math
from functools import partial

import numpy as np


def layer_norm(x, p, epsilon):
    centered = x - x.mean(-1, keepdims=True)
    y = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + (epsilon or 1e-5)) * p["scale"]
    return y + p.get("bias", 0.0)


def rms_norm(x, p, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + (epsilon or 1e-6)) * p["scale"]


def rope(x, base):
    """[T, K]: channels i and i + K/2 as a complex number, turned."""
    n_time, width = x.shape
    z = x[:, : width // 2] + 1j * x[:, width // 2 :]
    for t in range(n_time):
        for i in range(width // 2):
            z[t, i] *= np.exp(1j * t * base ** (-2 * i / width))
    return np.concatenate([z.real, z.imag], axis=1)


def activate(name, h):
    """h [T, G, F], G 2 for a gated unit."""
    x = h[:, 0]
    if name == "gelu":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu_exact":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if name == "relu2":
        return np.where(x > 0, x, 0.0) ** 2
    return x / (1 + np.exp(-x)) * h[:, 1]


def heads_of(attention, config, layer, head):
    """Kernel [D, K] and bias [K] of the queries, keys and values of one head."""
    if config.n_kv_head in (0, config.n_head):
        places = [("qkv", (i, head)) for i in range(3)]
    else:
        shared = head * config.n_kv_head // config.n_head
        places = [("q", (head,)), ("kv", (0, shared)), ("kv", (1, shared))]
    for name, place in places:
        bias = attention[name]["bias"][layer][place] if config.bias else 0.0
        yield attention[name]["kernel"][layer][(slice(None), *place)], bias


def forward(params, config, tokens):
    """Logits [T, V] of tokens [T], with float64 copies of the JAX model's (stacked) parameters."""
    norm = partial(layer_norm if config.norm == "layernorm" else rms_norm, epsilon=config.norm_eps)
    n_time, head_width = len(tokens), config.d_head or config.d_model // config.n_head
    embedding = params["token_embedding"]["embedding"]
    x = embedding[tokens]
    if config.position == "learned":
        x = x + params["position_embedding"]["embedding"][:n_time]
    if config.bigram:
        vocab_size = len(embedding)
        table = params["bigram_embedding"]["embedding"].reshape(vocab_size + 1, vocab_size, -1)
        x = x + table[[vocab_size, *tokens[:-1]], tokens]
    embedded = x
    blocks = params["blocks"]
    for layer in range(config.n_layer):
        attention, mlp = blocks["attention"], blocks["mlp"]
        if config.x0_residual:
            x = x + blocks["x0_residual"][layer] * embedded
        y = norm(x, {k: v[layer] for k, v in blocks["attention_norm"].items()})
        added = np.zeros_like(x)
        for head in range(config.n_head):
            q, k, v = (y @ kernel + bias for kernel, bias in heads_of(attention, config, layer, head))
            if config.qk_norm:
                q = rms_norm(q, {"scale": attention["q_norm"]["scale"][layer]}, config.norm_eps)
                k = rms_norm(k, {"scale": attention["k_norm"]["scale"][layer]}, config.norm_eps)
            if config.position == "rope":
                q, k = rope(q, config.rope_base), rope(k, config.rope_base)
            for t in range(n_time):
                scores = q[t] @ k[: t + 1].T / math.sqrt(head_width)
                weights = np.exp(scores - scores.max())
                gathered = weights @ v[: t + 1] / weights.sum()
                added[t] += gathered @ attention["out"]["kernel"][layer][head]
        if config.bias:
            added += attention["out"]["bias"][layer]
        x = x + added
        y = norm(x, {k: v[layer] for k, v in blocks["mlp_norm"].items()})
        if config.conv_width:
            weights, read = blocks["convolution"]["weights"][layer], y
            y = read.copy()
            for t in range(n_time):
                for back in range(min(config.conv_width, t + 1)):
                    y[t] += weights[-1 - back] * read[t - back]
        h = np.einsum("td,dgf->tgf", y, mlp["up"]["kernel"][layer])
        if config.bias:
            h = h + mlp["up"]["bias"][layer]
        x = x + activate(config.activation, h) @ mlp["down"]["kernel"][layer]
        if config.bias:
            x = x + mlp["down"]["bias"][layer]
    x = norm(x, params["final_norm"])
    return x @ (embedding.T if config.tied_embedding else params["head"]["kernel"])


def loss(params, config, inputs_BxT, targets_BxT):
    """Mean cross-entropy in nats."""
    total = 0.0
    for inputs, targets in zip(inputs_BxT, targets_BxT, strict=True):
        logits = forward(params, config, inputs)
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        total += (log_z - logits[np.arange(len(targets)), targets]).sum()
    return total / np.size(targets_BxT)
