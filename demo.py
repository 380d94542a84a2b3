# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A GPT explained, from raw text to Shakespeare
#
# This notebook builds a small GPT step by step. Each idea comes twice: first by hand on tiny arrays, in NumPy or a few
# lines of JAX, then as the module that the package `gpt_jax` trains with. An assertion after each pair checks that both
# give the same numbers.
#
# Names end in their shape: `inputs_BxT` has B rows of T numbers. The letters mean: B batch (rows), T time (positions), V
# vocabulary, D width of the vector of a position, H heads, K width of a head, F width of the MLP, L layers, N tokens of a
# text.
#
# You need Python and NumPy, but no knowledge of transformers. The notebook runs on a CPU in a few minutes; a GPU or TPU
# is not needed. Each section ends with a question; click on *Answer* to check yours.
#
# | | |
# |---|---|
# | 1 The data | 7 A training step, taken apart |
# | 2 The bigram baseline | 8 Training, live |
# | 3 Averaging the past | 9 Sampling |
# | 4 Attention | 10 Looking inside a trained model |
# | 5 Residuals, norms, MLP, positions | 11 From here to GPT-2 |
# | 6 The whole GPT | |

# %% [markdown]
# On Colab, set `REPOSITORY` to the URL of the repository and run this cell first: it clones and installs the package.
# Elsewhere, it does nothing.

# %%
import os
import subprocess
import sys

REPOSITORY = "https://..."
if "google.colab" in sys.modules:
    if not os.path.isdir("gpt_jax_repository"):
        subprocess.run(["git", "clone", "-q", REPOSITORY, "gpt_jax_repository"], check=True)
    os.chdir("gpt_jax_repository")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "."], check=True)
    sys.path.insert(0, os.getcwd())

# %%
import html
import json
import runpy
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from IPython.display import HTML, display

import gpt_jax
from gpt_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from gpt_jax.data.batches import TokenWindows, eval_windows, train_batch
from gpt_jax.data.corpus import load_corpus
from gpt_jax.data.tokenizers import CharTokenizer
from gpt_jax.model.attention import attend, causal_mask
from gpt_jax.model.layers import make_norm
from gpt_jax.model.loss import loss_of_tokens, next_token_loss, token_losses
from gpt_jax.model.options import rotate
from gpt_jax.model.params import abstract_params, count_params, flops_per_token, init_params, unstack_layers
from gpt_jax.model.transformer import GPT, MLP, Block, CausalSelfAttention
from gpt_jax.parallel.execution import resolve_execution
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.plan import make_plan
from gpt_jax.rng import BATCH_STREAM, INIT_STREAM, stream
from gpt_jax.sampling.generate import decode, generate_tokens, prefill
from gpt_jax.sampling.rules import apply_rules, make_rules
from gpt_jax.training.loop import StepInfo, next_multiple, train_loop
from gpt_jax.training.optimizer import make_optimizer, make_schedule
from gpt_jax.training.state import init_state
from gpt_jax.training.step import make_train_steps, train_step

BLUE, ORANGE, GREEN, PINK, GRAY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#666666",
)  # for colour-blind eyes
plt.rcParams.update(
    {"figure.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": 80, "font.size": 11}
)
plt.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
)
jax.config.update("jax_default_matmul_precision", "float32")  # a GPU or TPU would round factors otherwise
rng = np.random.default_rng(0)
started = time.monotonic()
print(f"gpt_jax {gpt_jax.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")


# %% [markdown]
# ## 1 The data
#
# The text is tiny Shakespeare, about a megabyte of his plays. Look at its shape: names in capitals, a colon, lines of
# verse. The model will learn all of that from the characters alone.

# %%
path = Path("artifacts/input.txt")
text = path.read_text(encoding="utf-8")
print(f"{len(text):,} characters\n")
print(text[:148])

# %% [markdown]
# A model computes with numbers. So each distinct character gets one, its index in the sorted list of all characters.
# This list is the vocabulary; its length is called $V$. A model's unit of text is called a token; here a token is a
# character.

# %%
characters = sorted(set(text))
index_of = {character: index for index, character in enumerate(characters)}
V = len(characters)
print(V, repr("".join(characters)))

by_hand = [index_of[character] for character in "First Citizen:"]
tokenizer = CharTokenizer.from_text(text)
np.testing.assert_array_equal(tokenizer.encode("First Citizen:"), by_hand)
assert tokenizer.decode(np.array(by_hand)) == "First Citizen:"
by_hand

# %% [markdown]
# The first nine tenths of the text are for training. The last tenth is for validation: the model never trains on it, so
# how well it predicts there shows whether it has learned the language or just this text.

# %%
corpus = load_corpus(path, context=8, train_fraction=0.9)
n_train = int(0.9 * len(text))
np.testing.assert_array_equal(corpus.train, [index_of[character] for character in text[:n_train]])
np.testing.assert_array_equal(corpus.val, [index_of[character] for character in text[n_train:]])
print(f"{len(corpus.train):,} tokens to train on, {len(corpus.val):,} to validate")

# %% [markdown]
# The task is always the same: given some tokens, predict the next one. One window of $T + 1$ tokens holds $T$ such
# examples at once, one for each position. Read the lines below from top to bottom.

# %%
window = corpus.train[:9]
inputs, targets = window[:-1], window[1:]
for t in range(8):
    seen = tokenizer.decode(inputs[: t + 1])
    print(f"given {seen!r:12} predict {tokenizer.decode(targets[t : t + 1])!r}")

# %% [markdown]
# A batch is $B$ windows. The package draws the batch of a step from the training text with random numbers that depend
# only on the seed and the step. Check that each of its windows is a piece of the text, and that the targets are the
# inputs shifted by one.

# %%
tokens_N = jnp.asarray(corpus.train)
inputs_BxT, targets_BxT = train_batch(
    stream(1337, BATCH_STREAM), jnp.int32(0), tokens_N, batch_size=4, context=8
)
for row, targets in zip(np.asarray(inputs_BxT), np.asarray(targets_BxT), strict=True):
    piece = tokenizer.decode(row) + tokenizer.decode(targets[-1:])
    print(repr(piece))
    assert piece in text[:n_train]
    np.testing.assert_array_equal(row[1:], targets[:-1])
again, other = (
    train_batch(stream(1337, BATCH_STREAM), jnp.int32(n), tokens_N, batch_size=4, context=8) for n in (0, 1)
)
np.testing.assert_array_equal(again[0], inputs_BxT)
assert (other[0] != inputs_BxT).any()

# %% [markdown]
# <details><summary><b>Question:</b> a batch of 4 windows with 8 inputs each: how many predictions does the model make,
# and how many tokens does it see before each?</summary>
#
# 4 x 8 = 32 predictions. The first prediction of each window sees one token, the last one sees eight. So the model learns
# to predict from short contexts too, which it needs when it starts to write.
# </details>

# %% [markdown]
# ## 2 The bigram baseline
#
# The simplest model looks at one token only. It is a table of $V \times V$ numbers: row $i$ holds a score, called a
# logit, for each token that may follow token $i$. The softmax turns logits into probabilities:
# $p_j = e^{z_j} / \sum_k e^{z_k}$.
#
# The loss is the cross-entropy: minus the logarithm of the probability that the model gave to the token that really
# followed, averaged over all predictions. Its unit here is nats (natural logarithms). A model that knows nothing gives
# each token the probability $1/V$. Often $e^{\text{loss}}$ is reported too, the *perplexity*: the number of equally likely
# tokens that would be as hard to guess.


# %%
def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))  # subtracting the maximum changes nothing, but avoids overflow
    return e / e.sum(-1, keepdims=True)


logits_BxTxV = rng.normal(size=(4, 8, V)).astype(np.float32)
probabilities = softmax(logits_BxTxV)
targets = np.asarray(targets_BxT)
by_hand = np.array([[-np.log(probabilities[b, t, targets[b, t]]) for t in range(8)] for b in range(4)])
np.testing.assert_allclose(token_losses(logits_BxTxV, targets_BxT), by_hand, rtol=1e-5)
print(f"a model that knows nothing has a loss of log {V} = {np.log(V):.3f}")

# %% [markdown]
# For the training text the best table is known: count how often each token follows each other one (0.01 is added, as an
# unseen pair would get the logarithm of 0). The next cell also finds a table by training, as all later models are trained:
# start from some numbers, here zeros, compute the gradient of the loss, and move the table a little against it, again and
# again. (Adam, which decides how far, is explained in section 7.)


# %%
def bigram_loss(table_VxV, inputs, targets):
    return token_losses(table_VxV[inputs][None], targets[None]).mean()


counts = np.zeros((V, V))
np.add.at(counts, (corpus.train[:-1], corpus.train[1:]), 1)
counted_VxV = np.log(counts + 0.01)

optimizer = optax.adam(optax.linear_schedule(0.2, 0.01, 300))


@jax.jit
def bigram_step(table_VxV, state, positions):
    gradient = jax.grad(bigram_loss)(table_VxV, tokens_N[positions], tokens_N[positions + 1])
    update, state = optimizer.update(gradient, state)
    return table_VxV + update, state


table_VxV = jnp.zeros((V, V))
state = optimizer.init(table_VxV)
for _ in range(300):
    table_VxV, state = bigram_step(table_VxV, state, rng.integers(0, len(tokens_N) - 1, 10_000))
val = (jnp.asarray(corpus.val[:-1]), jnp.asarray(corpus.val[1:]))
counted, trained = (float(bigram_loss(jnp.float32(table), *val)) for table in (counted_VxV, table_VxV))
print(f"validation loss: {trained:.3f} by training, {counted:.3f} by counting")
assert abs(counted - trained) < 0.03

# %% [markdown]
# The two differ a little, since the validation text is another text. To write, draw a token from the probabilities, append
# it, and repeat. The result looks a little like words, but each character depends only on the one before it.

# %%
ids = [index_of["\n"]]
bigram_probabilities = softmax(np.asarray(table_VxV, np.float64))
for _ in range(200):
    ids.append(rng.choice(V, p=bigram_probabilities[ids[-1]]))
print(tokenizer.decode(np.array(ids)))

# %% [markdown]
# <details><summary><b>Question:</b> what is the perplexity of a model with a loss of log 65, and what does a perplexity of
# 12 mean?</summary>
#
# The perplexity is $e^{\text{loss}}$, so $e^{\log 65} = 65$: the model is as uncertain as if it chose among 65 equally
# likely tokens. A perplexity of 12 means: as uncertain as a choice among 12.
# </details>

# %% [markdown]
# ## 3 Averaging the past
#
# To use more than one token, position $t$ must collect information from positions $0 \ldots t$, and never from later
# ones, which it has to predict. The simplest way to collect is to average. Here it is as a loop, over a sequence of
# $T = 6$ vectors with 2 numbers each.

# %%
T = 6
x_TxD = rng.normal(size=(T, 2)).astype(np.float32)
by_loop = np.stack([x_TxD[: t + 1].mean(axis=0) for t in range(T)])
by_loop.round(2)

# %% [markdown]
# The same as a matrix product. Row $t$ of the matrix holds the weight of each position: $1/(t+1)$ up to position $t$, and
# 0 after it. A lower triangle of ones, each row divided by its sum, is exactly that.

# %%
weights_TxT = np.tril(np.ones((T, T)))
weights_TxT /= weights_TxT.sum(axis=1, keepdims=True)
by_matrix = weights_TxT @ x_TxD
np.testing.assert_allclose(by_matrix, by_loop, rtol=1e-5)
weights_TxT.round(2)

# %% [markdown]
# And the same as a softmax of a masked matrix. Start from zeros, write $-\infty$ above the diagonal, and take the softmax
# of each row: $e^{-\infty} = 0$, and the zeros become equal weights. This is the trick behind attention, which comes next. The zeros
# can be replaced by scores that depend on the tokens, and then each position chooses what to average.
#
# The package's `attend` does this. With queries of zero all its scores are zero.

# %%
scores_TxT = np.zeros((T, T))
scores_TxT[np.triu_indices(T, 1)] = -np.inf
by_softmax = softmax(scores_TxT) @ x_TxD
np.testing.assert_allclose(by_softmax, by_loop, rtol=1e-5)

v_1x1xTxD = x_TxD[None, None]
mask_TxT = causal_mask(jnp.arange(T), T)
attended = attend(np.zeros_like(v_1x1xTxD), v_1x1xTxD, v_1x1xTxD, mask_TxT)
np.testing.assert_allclose(attended[0, 0], by_loop, rtol=1e-5)

figure, axes = plt.subplots(1, 3, figsize=(11, 3))
learned = rng.normal(size=(T, T)) * 1.5
learned[np.triu_indices(T, 1)] = -np.inf
for axis, matrix, title in zip(
    axes,
    (np.where(np.isinf(scores_TxT), np.nan, scores_TxT), softmax(scores_TxT), softmax(learned)),
    ("scores of 0, masked (white)", "their softmax: equal weights", "softmax of other scores"),
    strict=True,
):
    image = axis.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
    axis.set(title=title, xlabel="position that is read", ylabel="position that reads")
figure.colorbar(image, ax=axes, label="weight")
plt.show()

# %% [markdown]
# <details><summary><b>Question:</b> why is the mask $-\infty$ before the softmax, rather than 0 after it?</summary>
#
# After the softmax each row already sums to 1, over all positions. Zeroing some weights then would make the sum smaller
# than 1, and the future would still have changed the weights of the past through the sum. With $-\infty$ before the softmax
# the future has no influence at all.
# </details>

# %% [markdown]
# ## 4 Attention
#
# Attention makes the scores depend on the tokens. Each position computes three vectors of width $K$ from its own vector
# $x$, by three learned matrices:
#
# - a query $q$: what it is looking for,
# - a key $k$: what it offers,
# - a value $v$: what it hands over.
#
# The score between a reading position $t$ and a read position $s$ is the dot product $q_t \cdot k_s$, divided by
# $\sqrt{K}$. One such set of matrices is a head.

# %%
K, D = 16, 32
x_TxD = rng.normal(size=(T, D)).astype(np.float32)
w_q, w_k, w_v = (rng.normal(size=(3, D, K)) / np.sqrt(D)).astype(np.float32)
q_TxK, k_TxK, v_TxK = x_TxD @ w_q, x_TxD @ w_k, x_TxD @ w_v

scores_TxT = q_TxK @ k_TxK.T / np.sqrt(K)
scores_TxT[np.triu_indices(T, 1)] = -np.inf
head_TxK = softmax(scores_TxT) @ v_TxK

shipped = attend(q_TxK[None, None], k_TxK[None, None], v_TxK[None, None], mask_TxT)
np.testing.assert_allclose(shipped[0, 0], head_TxK, atol=1e-5)
head_TxK.shape

# %% [markdown]
# Why divide by $\sqrt{K}$? The dot product of two vectors of $K$ independent numbers with mean 0 and variance 1 has a
# standard deviation of $\sqrt{K}$. Without the division, wide heads would have large scores, and the softmax would give nearly all weight to one position. Then its
# derivatives, $p_i (1 - p_i)$ on the diagonal, are nearly zero and it cannot learn. Look at the largest weight and at the
# sum of these derivatives as $K$ grows.

# %%
widths = 2 ** np.arange(2, 11)
largest, slopes = {}, {}
for name, scale in (("divided by sqrt(K)", lambda k: k**-0.5), ("not divided", lambda k: 1.0)):
    largest[name], slopes[name] = [], []
    for k in widths:
        q, keys = rng.normal(size=(200, 1, k)), rng.normal(size=(200, 8, k))
        p = softmax(scale(k) * (q * keys).sum(-1))
        largest[name].append(p.max(-1).mean())
        slopes[name].append((p * (1 - p)).sum(-1).mean())

figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, values, title in zip(
    axes, (largest, slopes), ("largest of 8 weights", "sum of p (1 - p)"), strict=True
):
    for (name, line), color, marker in zip(values.items(), (BLUE, ORANGE), "os", strict=True):
        axis.plot(widths, line, color=color, marker=marker, label=name)
    axis.set(xscale="log", ylim=(0, 1), xlabel="head width K", title=title)
axes[0].legend()
plt.show()
assert largest["not divided"][-1] > 0.95 > 0.6 > largest["divided by sqrt(K)"][-1]
assert slopes["not divided"][-1] < 0.1 < 0.6 < slopes["divided by sqrt(K)"][-1]

# %% [markdown]
# One head can only look for one thing. So there are $H$ heads side by side, each with its own matrices. Their outputs are
# concatenated and mixed by one more matrix. The package keeps the matrices of all heads in one array, `qkv`
# [D, 3, H, K], and the last one in `out` [H, K, D]. With K = D / H, each of the four has D x D numbers. Multiplying the
# concatenation by one matrix is the same as adding up each head's output times its own rows; the cell does the latter.

# %%
small = ModelConfig(n_layer=2, n_head=2, d_model=D, context=T, init_std=0.2, dtype="float32")
execution = resolve_execution(small)
attention = CausalSelfAttention(small, execution)
x_BxTxD = x_TxD[None]
params = nn.unbox(attention.init(jax.random.key(0), x_BxTxD, jnp.arange(T), None, None))["params"]
print(jax.tree.map(jnp.shape, params))

by_hand = 0
for h in range(small.n_head):
    q, k, v = (x_TxD @ np.asarray(params["qkv"]["kernel"])[:, i, h] for i in range(3))
    scores = q @ k.T / np.sqrt(small.head_width)
    scores[np.triu_indices(T, 1)] = -np.inf
    by_hand = by_hand + softmax(scores) @ v @ np.asarray(params["out"]["kernel"])[h]
shipped, _ = attention.apply({"params": params}, x_BxTxD, jnp.arange(T), None, None)
np.testing.assert_allclose(shipped[0], by_hand, atol=1e-5)

# %% [markdown]
# Attention sums over positions. So if the tokens before the last one change places, the output of the last one stays the
# same:

# %%
swapped, _ = attention.apply({"params": params}, x_BxTxD[:, [1, 0, *range(2, T)]], jnp.arange(T), None, None)
np.testing.assert_allclose(swapped[0, -1], shipped[0, -1], atol=1e-5)
assert np.abs(swapped[0, 1] - shipped[0, 1]).max() > 0.01  # the positions that changed places do not

# %% [markdown]
# <details><summary><b>Question:</b> nothing in this section knows where a token stands. Can a model of one such layer tell
# "to be" from "eb ot" when it predicts what follows?</summary>
#
# Not if the last character is the same: it reads a weighted sum over a set of tokens. (With several layers, the mask tells a
# little about the order, since earlier positions have read different prefixes.) The next section adds positions.
# </details>

# %% [markdown]
# ## 5 Residuals, norms, MLP, positions
#
# A block has two parts, attention and an MLP, and each one *adds* its result to the vector of the position:
# $x \leftarrow x + f(\text{norm}(x))$. The vector that runs through all blocks is called the residual stream.
#
# Before each part comes a norm. LayerNorm subtracts the mean of the vector, divides by its standard deviation (with 0.00001
# added to the variance, against division by 0), and scales each channel by a learned factor. So every part sees numbers of the same size, however large the residual stream is.

# %%
norm = make_norm(small, execution, None)
scale_D = rng.normal(size=D).astype(np.float32)


def layer_norm(x, scale):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * scale


for size in (1.0, 0.01):
    shipped = norm.apply({"params": {"scale": scale_D}}, size * x_BxTxD)
    np.testing.assert_allclose(shipped[0], layer_norm(size * x_TxD, scale_D), atol=1e-4)
large, small_x = (layer_norm(size * x_TxD, scale_D) for size in (100.0, 1.0))
print(f"input 100 times as large: output changes by {np.abs(large - small_x).max():.5f} at most")

# %% [markdown]
# The MLP works on each position by itself: a matrix to a larger width ($F = 4D$), a non-linearity, and a matrix back. GPT-2's
# non-linearity is GELU, a smooth version of $\max(0, x)$, in its usual approximation by a tanh. Attention moves information between positions; the MLP processes it.


# %%
def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


mlp = MLP(small, execution)
params = nn.unbox(mlp.init(jax.random.key(1), x_BxTxD))["params"]
up_DxF, down_FxD = np.asarray(params["up"]["kernel"])[:, 0], np.asarray(params["down"]["kernel"])
np.testing.assert_allclose(
    mlp.apply({"params": params}, x_BxTxD)[0], gelu(x_TxD @ up_DxF) @ down_FxD, atol=1e-5
)
print(up_DxF.shape, down_FxD.shape)

# %% [markdown]
# Both parts together are a block. By hand it is four lines.


# %%
def attention_by_hand(x, qkv, out):
    result = 0
    for h in range(qkv.shape[2]):
        q, k, v = (x @ qkv[:, i, h] for i in range(3))
        scores = q @ k.T / np.sqrt(qkv.shape[3])
        scores[np.triu_indices(len(x), 1)] = -np.inf
        result = result + softmax(scores) @ v @ out[h]
    return result


def block_by_hand(x, p):
    y = layer_norm(x, p["attention_norm"]["scale"])
    x = x + attention_by_hand(y, p["attention"]["qkv"]["kernel"], p["attention"]["out"]["kernel"])
    y = layer_norm(x, p["mlp_norm"]["scale"])
    return x + gelu(y @ p["mlp"]["up"]["kernel"][:, 0]) @ p["mlp"]["down"]["kernel"]


block = Block(small, execution)
params = nn.unbox(block.init(jax.random.key(2), x_BxTxD, x_BxTxD, jnp.arange(T), None))["params"]
params = jax.tree.map(
    lambda leaf: np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params
)
shipped, _ = block.apply({"params": params}, x_BxTxD, x_BxTxD, jnp.arange(T), None)
np.testing.assert_allclose(shipped[0], block_by_hand(x_TxD, params), atol=1e-4)

# %% [markdown]
# What are residuals and norms good for? Stack 24 layers of random weights and look at the size of the gradient that reaches
# each layer from the end. Without residuals it shrinks or grows by a constant factor from layer to layer; with these weights
# it shrinks. With residuals alone it grows towards the first layer. With both it changes far less; the numbers are below the
# picture.

# %%
depth, width = 24, 64
stack = rng.normal(size=(depth, width, width)).astype(np.float32) * 1.1 / np.sqrt(width)


def run_layers(nudges, x, residual, normed):
    """A number computed by 24 layers. `nudges`, all 0, are added before each: their gradient is that of the layer."""
    for nudge, weights in zip(nudges, stack, strict=True):
        x = x + nudge
        y = (x - x.mean()) / jnp.sqrt(x.var() + 1e-5) if normed else x
        y = jax.nn.gelu(y @ weights)
        x = x + y if residual else y
    return (x * jnp.sin(jnp.arange(width))).sum()


figure, axis = plt.subplots(figsize=(7, 3.4))
x = jnp.asarray(rng.normal(size=width).astype(np.float32))
spread = {}
for (residual, normed, name), color, marker in zip(
    ((False, False, "plain"), (True, False, "residual"), (True, True, "residual and norm")),
    (ORANGE, PINK, BLUE),
    "s^o",
    strict=True,
):
    gradients = jax.grad(run_layers)(jnp.zeros((depth, width)), x, residual, normed)
    norms = np.linalg.norm(gradients, axis=1)
    spread[name] = norms[0] / norms[-1]
    axis.plot(range(depth), norms, color=color, marker=marker, markersize=4, label=name)
axis.set(
    yscale="log",
    xlabel="layer (the loss is after the last one)",
    ylabel="gradient norm",
    title="Gradient by depth",
)
axis.legend()
plt.show()
print("gradient at the first layer / at the last:", {name: f"{value:.2g}" for name, value in spread.items()})
assert spread["plain"] < 0.01 < 1 < spread["residual and norm"] < spread["residual"] / 4

# %% [markdown]
# So far nothing knows the order. GPT-2 learns a vector for each position and adds it to the token's vector. Newer models
# rotate queries and keys instead (RoPE). Channels $j$ and $j + K/2$ are seen as one complex number, which is multiplied by
# $e^{\mathrm{i} p \theta_j}$ at position $p$, with $\theta_j = 10000^{-2j/K}$: the first pairs turn fast, the last slowly.

# %%
x_1x1xTxK = rng.normal(size=(1, 1, T, K)).astype(np.float32)
angles = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(K // 2) / (K // 2))
z = (x_1x1xTxK[..., : K // 2] + 1j * x_1x1xTxK[..., K // 2 :]) * np.exp(1j * angles)
by_hand = np.concatenate([z.real, z.imag], axis=-1)
np.testing.assert_allclose(rotate(x_1x1xTxK, jnp.arange(T), 10_000.0), by_hand, atol=1e-5)

# %% [markdown]
# For given contents, the dot product depends on the positions only through their *distance*. The picture shows the score of a
# query with a key of the same content, at distances of 0 to 60. It is the same wherever the query stands.

# %%
same = jnp.asarray(rng.normal(size=64).astype(np.float32))
positions = jnp.arange(200)
rotated = rotate(jnp.broadcast_to(same, (1, 1, 200, 64)), positions, 10_000.0)[0, 0]
figure, axis = plt.subplots(figsize=(7, 3))
for start, color, style in ((60, BLUE, "-"), (130, ORANGE, "--")):
    axis.plot(rotated[start] @ rotated[start - 60 : start + 1].T[:, ::-1], color=color, linestyle=style,
              label=f"query at position {start}")  # fmt: skip
axis.set(xlabel="distance to the key", ylabel="score", title="RoPE: the score depends on the distance")
axis.legend()
plt.show()
at_60, at_130 = (rotated[start] @ rotated[start - 60 : start + 1].T for start in (60, 130))
np.testing.assert_allclose(at_60, at_130, atol=2e-3)

# %% [markdown]
# <details><summary><b>Question:</b> the MLP has more parameters than attention. How many times more, in a block with
# width D and MLP width 4D?</summary>
#
# Attention has four matrices of D x D: queries, keys, values, output. The MLP has two of D x 4D, which is 8 D². So twice as
# many.
# </details>

# %% [markdown]
# ## 6 The whole GPT
#
# Now we have all the parts. The whole model by hand: embed the tokens and the positions, run the blocks, norm, and multiply by
# the transposed token embedding, so that a vector becomes one logit for each token. This last product is the output head;
# it is called tied, as it shares its numbers with the embedding. (The package stores each array of all layers as one, with
# the layer as its first axis; `unstack_layers` takes them apart.)


# %%
def gpt_by_hand(tokens_T, p):
    """Logits [T, V], for parameters with one tree for each layer."""
    x = p["token_embedding"]["embedding"][tokens_T] + p["position_embedding"]["embedding"][: len(tokens_T)]
    for i in range(sum(name.startswith("block_") for name in p)):
        x = block_by_hand(x, p[f"block_{i}"])
    return layer_norm(x, p["final_norm"]["scale"]) @ p["token_embedding"]["embedding"].T


model = GPT(small, V, execution)
params = nn.unbox(init_params(model, jax.random.key(3)))
tokens_T = tokenizer.encode("First ")
shipped, _ = model.apply({"params": params}, tokens_T[None])
by_hand = gpt_by_hand(tokens_T, jax.tree.map(np.asarray, unstack_layers(params)))
np.testing.assert_allclose(shipped[0], by_hand, atol=1e-4)
print("logits", by_hand.shape)

# %% [markdown]
# The mask makes it impossible to look ahead. Check it: change token $t$, and no row of logits before $t$ may change.

# %%
for t in range(T):
    changed = np.array(tokens_T)
    changed[t] = index_of["?"]
    after, _ = model.apply({"params": params}, changed[None])
    np.testing.assert_array_equal(after[0, :t], shipped[0, :t])
    assert np.abs(after[0, t] - shipped[0, t]).max() > 0.01

# %% [markdown]
# How many parameters does it have? Count them by hand, from the shapes in the sections above: two embeddings, and for
# each layer two norms, four matrices of attention and two of the MLP, and the final norm. The settings in
# `configs/shakespeare.py` are those of nanoGPT, a well-known small GPT (github.com/karpathy/nanoGPT), for this text.


# %%
def count_by_hand(c, vocabulary):
    D, F = c.d_model, 4 * c.d_model
    layer = 2 * D + 4 * D * D + 2 * D * F
    return vocabulary * D + c.context * D + c.n_layer * layer + D


recipe = Config.from_dict(runpy.run_path("configs/shakespeare.py")["get_config"]())
shapes = abstract_params(GPT(recipe.model, V, execution), make_mesh(MeshConfig(), jax.devices()[:1]))
assert count_params(shapes) == count_by_hand(recipe.model, V)
assert count_params(params) == count_by_hand(small, V)
print(f"configs/shakespeare.py: {count_params(shapes):,} parameters")

# %% [markdown]
# <details><summary><b>Question:</b> the output head is tied to the token embedding. How many more parameters would a
# separate output matrix need, for V = 65 and D = 384, and for GPT-2's V = 50,257 and D = 768?</summary>
#
# V x D more: 65 x 384 = 24,960, which is little. For GPT-2: 50,257 x 768 = 38.6 million, nearly a third of the model.
# </details>

# %% [markdown]
# ## 7 A training step, taken apart
#
# Training repeats three things: the loss of a batch, its gradient, and an update of the parameters.
#
# The gradient says for each parameter how the loss changes if that parameter grows a little. JAX computes all of them in
# one pass backwards. Check one by hand, with the definition of the derivative.

# %%
params = jax.tree.map(np.asarray, params)
batch_inputs, batch_targets = np.asarray(inputs_BxT)[:, :T], np.asarray(targets_BxT)[:, :T]


def loss_of(params):
    logits, _ = model.apply({"params": params}, batch_inputs)
    return token_losses(logits, batch_targets).mean()


gradient = jax.grad(loss_of)(params)
step = 1e-2
nudged = [jax.tree.map(np.array, params) for _ in range(2)]
for tree, sign in zip(nudged, (1, -1), strict=True):
    tree["blocks"]["mlp"]["up"]["kernel"][0, 3, 0, 5] += sign * step
by_definition = (loss_of(nudged[0]) - loss_of(nudged[1])) / (2 * step)
by_jax = gradient["blocks"]["mlp"]["up"]["kernel"][0, 3, 0, 5]
np.testing.assert_allclose(by_jax, by_definition, atol=1e-4)
print(f"loss {loss_of(params):.3f}; one derivative by jax {by_jax:.5f}, by definition {by_definition:.5f}")
# (The loss is above log 65: the random weights are so large that the model is often confident and wrong.)

# %% [markdown]
# The update. Plain gradient descent would subtract a multiple of the gradient. AdamW keeps two moving averages for each
# parameter, of the gradient ($m$) and of its square ($v$), and divides $m$ by the root of $v$: every parameter moves at
# about the same speed, whatever the size of its gradient. Both averages start at 0, so at first they are too small; dividing
# by $1 - \beta^n$ in step $n$ corrects that. Weight decay pulls matrices towards zero. By hand, for four steps (the
# gradient of step $n$ is multiplied by $n$, so that the averages have something to do):

# %%
settings = OptimizerConfig(
    learning_rate=1e-2, schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.1, b1=0.9, b2=0.99
)
shipped = make_optimizer(settings, steps=10)
shipped_state, hand_params = shipped.init(params), params
m = v = jax.tree.map(np.zeros_like, params)
is_matrix = {"kernel", "embedding"}
for n in (1, 2, 3, 4):
    g = jax.tree.map(lambda leaf, n=n: n * leaf, jax.grad(loss_of)(hand_params))
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, v, g)

    def move(path, p, m, v, n=n):
        decay = 0.1 * p if path[-1].key in is_matrix else 0  # norms are not pulled to zero
        return p - 1e-2 * ((m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.99**n)) + 1e-8) + decay)

    updates, shipped_state = shipped.update(g, shipped_state, hand_params)
    shipped_params = optax.apply_updates(hand_params, updates)
    hand_params = jax.tree.map_with_path(move, hand_params, m, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), hand_params, shipped_params)
print(f"loss {loss_of(params):.3f} before, {loss_of(hand_params):.3f} after four steps")

# %% [markdown]
# The learning rate is not constant. It rises linearly in the first steps (the warm-up), while the moving averages
# rest on few gradients, and then falls with a cosine to a tenth, so that the parameters settle.

# %%
schedule_settings = OptimizerConfig(learning_rate=1e-3, warmup_steps=100, min_lr_ratio=0.1)


def schedule_by_hand(step, steps=1000, peak=1e-3, warmup=100, ratio=0.1):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))
    return peak * (ratio + (1 - ratio) * cosine)


schedule = make_schedule(schedule_settings, 1000, 1e-3)
by_hand = [schedule_by_hand(step) for step in range(1000)]
np.testing.assert_allclose([schedule(step) for step in range(0, 1000, 37)], by_hand[::37], rtol=1e-4)
figure, axis = plt.subplots(figsize=(6, 2.6))
axis.plot(by_hand, color=BLUE)
axis.set(xlabel="step", ylabel="learning rate", title="Warm-up, then a cosine", ylim=(0, None))
plt.show()

# %% [markdown]
# The gradient of all parameters together is one long vector. If it is longer than a limit (`clip_norm`), it is shortened to
# that length and keeps its direction, so that one odd batch cannot spoil the moving averages.
#
# The package's `train_step` does all of it: it draws the batch of its step, computes loss and gradient, clips, and updates.
# Check one step against the parts above.

# %%
tiny = Config.from_dict(
    {
        "model": {"n_layer": 2, "n_head": 2, "d_model": D, "context": T, "dtype": "float32"},
        "optimizer": {"schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-2, "clip_norm": 0.5},
        "train": {"batch_size": 4, "grad_accum_steps": 1},
    }
)
tiny_plan = make_plan(tiny, devices=jax.devices()[:1])
tiny_model = GPT(tiny.model, V, tiny_plan.execution)
tiny_optimizer = make_optimizer(tiny.optimizer, tiny.train.steps)
before = init_state(tiny_model, tiny_optimizer, tiny_plan.mesh, stream(tiny.seed, INIT_STREAM))
source = TokenWindows(tokens_N, batch_size=4, context=T)
after, metrics, _ = jax.jit(train_step, static_argnums=(3, 4, 5, 6))(
    before, source, np.uint32(tiny.seed), tiny_plan, tiny_model, tiny_optimizer, next_token_loss
)

inputs, targets = train_batch(stream(tiny.seed, BATCH_STREAM), before.step, tokens_N, 4, T)


def tiny_loss(params):
    return token_losses(tiny_model.apply({"params": params}, inputs)[0], targets).mean()


loss, gradient = jax.value_and_grad(tiny_loss)(before.params)
length = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(gradient)))
clipped = jax.tree.map(lambda leaf: leaf * min(1.0, 0.5 / length), gradient)
no_clip = make_optimizer(replace(tiny.optimizer, clip_norm=0.0), tiny.train.steps)
updates, _ = no_clip.update(clipped, no_clip.init(before.params), before.params)
np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], [loss, length], rtol=1e-4)
assert length > 0.5  # so it was clipped; after one step, m is a tenth of the clipped gradient
m = optax.tree.get(after.opt_state, "mu")
jax.tree.map(lambda a, g: np.testing.assert_allclose(a, 0.1 * g, rtol=1e-3, atol=1e-7), m, clipped)
jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    after.params,
    optax.apply_updates(before.params, updates),
)
print(f"loss {loss:.3f}, gradient norm {length:.3f}, clipped to 0.5")

# %% [markdown]
# Now the machinery. `jit` compiles the whole function into one program. A loop inside the program (`lax.fori_loop`) also
# saves the return to Python after each step. On a CPU that makes little difference, and can even be slower; on a GPU or TPU,
# where a small step takes less time than a call from Python, the loop in the program wins. Look at the milliseconds.


# %%
def step_once(state):
    return train_step(
        state, source, np.uint32(tiny.seed), tiny_plan, tiny_model, tiny_optimizer, next_token_loss
    )[0]


jitted = jax.jit(step_once)
in_one_program = jax.jit(lambda state: jax.lax.fori_loop(0, 50, lambda _, s: step_once(s), state))


def loop_in_python(state):
    for _ in range(50):
        state = jitted(state)
    return state


ends = {}
for name, function in (("loop in Python", loop_in_python), ("loop in the program", in_one_program)):
    function(before)  # compile
    begun = time.monotonic()
    ends[name] = jax.block_until_ready(function(before))
    print(f"{1000 * (time.monotonic() - begun) / 50:6.2f} ms a step, {name}")
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *(end.params for end in ends.values()))

# %% [markdown]
# Several devices share a batch: each computes the gradient of its part, and then they average them. JAX does this from the
# *sharding* of the arrays, the plan of which device holds which part; the code of the step stays the same. With *data
# parallelism* every device has all parameters and a part of the batch. With *FSDP* each also stores only a part of the
# parameters, and fetches the rest when it needs them. The next cell
# starts a process with eight simulated CPU devices and checks that one device and eight give the same losses. (Simulated
# devices share the same cores, so eight of them are not faster.)

# %%
SHARDED = """
import json, sys, time, jax, numpy as np, jax.numpy as jnp
from gpt_jax.config import Config
from gpt_jax.data.batches import TokenWindows
from gpt_jax.model.loss import next_token_loss
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import replicated
from gpt_jax.plan import make_plan
from gpt_jax.rng import INIT_STREAM, stream
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.state import init_state
from gpt_jax.training.step import make_train_steps

settings = {
    "model": {"n_layer": 2, "n_head": 2, "d_model": 32, "context": 32, "dtype": "float32"},
    "optimizer": {"warmup_steps": 5}, "train": {"batch_size": 16, "grad_accum_steps": 1, "steps": 20},
}
tokens = np.arange(5000) ** 2 % 65
for name, mesh in {"one": {"data": 1}, "data": {"data": 8}, "fsdp": {"data": 2, "fsdp": 4}}.items():
    config = Config.from_dict(settings | {"mesh": mesh})
    plan = make_plan(config)
    model, optimizer = GPT(config.model, 65, plan.execution), make_optimizer(config.optimizer, 20)
    state = init_state(model, optimizer, plan.mesh, stream(1, INIT_STREAM))
    steps = make_train_steps(plan, model, next_token_loss, state, 20)
    tokens_N = jax.device_put(jnp.asarray(tokens, jnp.uint8), replicated(plan.mesh))
    source = TokenWindows(tokens_N, 16, 32)
    compiled = steps.lower(state, source, np.uint32(1), np.int32(20), np.int32(20)).compile()
    kernel = state.params["blocks"]["mlp"]["up"]["kernel"]
    shard = kernel.addressable_shards[0].data.shape
    begun = time.monotonic()
    state, metrics = compiled(state, source, np.uint32(1), np.int32(20), np.int32(20))
    losses = np.asarray(metrics["loss"])
    print(json.dumps([name, plan.mesh.size, losses.tolist(), kernel.shape, shard, time.monotonic() - begun]))
"""
environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd(),
}  # fmt: skip
done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment)
assert done.returncode == 0, done.stderr
sharded = {name: values for name, *values in map(json.loads, done.stdout.splitlines())}
for name, (n_devices, losses, shape, shard, seconds) in sharded.items():
    print(f"{name:5} {n_devices} device(s): loss {losses[0]:.4f} to {losses[-1]:.4f} in {1000 * seconds / 20:.0f} ms a step; "
          f"an MLP kernel {tuple(shape)} is stored in parts of {tuple(shard)}")  # fmt: skip
for name in ("data", "fsdp"):
    np.testing.assert_allclose(sharded[name][1], sharded["one"][1], rtol=1e-4)
assert sharded["fsdp"][3] != sharded["fsdp"][2] == sharded["data"][3]

# %% [markdown]
# <details><summary><b>Question:</b> with eight devices and data parallelism, what do the devices have to send each other in
# a step, and what do they keep to themselves?</summary>
#
# They send the gradients, one number for each parameter, to average them. They keep their part of the batch and all that they
# compute from it on the way (the activations). With FSDP they also exchange the parameters, since each device stores only a part of them.
# </details>

# %% [markdown]
# ## 8 Training, live
#
# Time to train the model of section 6: two layers, four heads, a width of 128 and a context of 64 characters, with AdamW, on
# batches of 16 windows. It trains for about a minute; watch the loss fall and the text improve. The dotted lines are the
# losses of a model that knows nothing and of the bigram model.
#
# The learning rate stays constant after the warm-up, so that training may end at any time.

# %%
SECONDS = float(os.environ.get("DEMO_SECONDS", "60"))  # of training
quick = Config.from_dict(
    {
        "model": {"n_layer": 2, "n_head": 4, "d_model": 128, "context": 64, "dtype": "float32"},
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant", "warmup_steps": 50},
        "train": {"steps": 3000, "batch_size": 16},
        "mesh": {"data": 1},
    }
)
plan = make_plan(quick, devices=jax.devices()[:1])
live_model = GPT(quick.model, V, plan.execution)
live_optimizer = make_optimizer(quick.optimizer, quick.train.steps)
live_state = init_state(live_model, live_optimizer, plan.mesh, stream(quick.seed, INIT_STREAM))
program = make_train_steps(plan, live_model, next_token_loss, live_state, 100)
source = TokenWindows(tokens_N, batch_size=16, context=64)
assert count_params(live_state.params) == count_by_hand(quick.model, V)
print(f"{count_params(live_state.params):,} parameters")

# %% [markdown]
# The loop is the one that `train.py` uses. It calls the compiled steps and says after each call what came of it. Here we
# collect the losses, and after every 50 steps write a sample and redraw the picture.

# %%
part = corpus.val[:20_001]
bigram_there = float(bigram_loss(table_VxV, jnp.asarray(part[:-1]), jnp.asarray(part[1:])))
losses, validated, samples = [], [], []
figure, axis = plt.subplots(figsize=(8, 3.6))
view = display(figure, display_id=True)
begun = time.monotonic()


def redraw(info):
    val_loss = loss_of_tokens(live_model, info.state.params, part, batch_size=16)
    validated.append((info.step, val_loss))
    ids = np.concatenate(list(generate_tokens(
        live_model, info.state.params, np.array([[tokenizer.start_id]]), 120,
        make_rules(temperature=0.8), jax.random.key(1),
    )), axis=1)  # fmt: skip
    samples.append((info.step, val_loss, tokenizer.decode(ids[0])))
    axis.clear()
    axis.plot(np.arange(1, len(losses) + 1), losses, color=BLUE, alpha=0.35, label="training batches")
    axis.plot(
        *zip(*validated, strict=True), color=ORANGE, marker="o", label="validation (first 20,000 characters)"
    )
    for level, name in ((np.log(V), "knows nothing"), (bigram_there, "bigram")):
        axis.axhline(level, color=GRAY, linestyle=":", linewidth=1)
        axis.text(1, level, name, va="bottom", color=GRAY)
    axis.set(
        xlabel="step",
        ylabel="loss (nats per character)",
        title=f"{time.monotonic() - begun:.0f} s of training",
    )
    axis.legend(loc="upper right")
    if view is not None:
        view.update(figure)


def make_steps(state, n_steps, last_step):
    return program(state, source, np.uint32(quick.seed), np.int32(n_steps), np.int32(last_step))


start = StepInfo(step=0, last_step=quick.train.steps, state=live_state)
for info in train_loop(make_steps, start, boundary=lambda step: next_multiple(step, 50)):
    assert info.metrics["is_finite"]
    losses.extend(info.metrics["loss"][: info.n_steps].tolist())
    if info.is_due(every=50):
        redraw(info)
    if time.monotonic() - begun > SECONDS and info.step >= 300:
        break
plt.close(figure)
step, live_state = info.step, info.state
print(f"{step} steps, validation loss {validated[-1][1]:.3f}; the bigram model has {bigram_there:.3f}")
assert validated[-1][1] < bigram_there

# %% [markdown]
# The same model at the first, a middle and the last evaluation. All samples use the same random numbers, so they begin alike.

# %%
for i in sorted({0, len(samples) // 2, len(samples) - 1}):
    step, val_loss, sample = samples[i]
    print(f"--- step {step}, validation loss {val_loss:.3f}\n{sample}\n")

# %% [markdown]
# <details><summary><b>Question:</b> the training loss jumps up and down from step to step, the validation loss does not.
# Why?</summary>
#
# Each training loss is the mean over one small batch (16 windows of 64 tokens), and some batches are harder than others. The
# validation loss is a mean over 20,000 characters, the same ones each time.
# </details>

# %% [markdown]
# ## 9 Sampling
#
# The model gives a probability to each token; how to draw from them is a separate choice. Temperature divides the logits:
# below 1 the likely tokens become likelier, above 1 the distribution becomes flatter. Top-k keeps the $k$ most likely
# tokens. Top-p keeps the smallest set of most likely tokens that together have at least the probability $p$. The rules can be
# combined. *Greedy* sampling always takes the most likely token.

# %%
logits_V = np.asarray(
    live_model.apply({"params": live_state.params}, tokenizer.encode("ROMEO:\nI will th")[None])[0][0, -1]
)
order = np.argsort(-logits_V)


def top_k_by_hand(logits, k):
    return np.where(logits >= np.sort(logits)[-k], logits, -np.inf)


def top_p_by_hand(logits, p):
    kept, total = np.full_like(logits, -np.inf), 0.0
    for i in np.argsort(-logits):
        if total >= p:
            break
        kept[i] = logits[i]
        total += softmax(logits)[i]
    return kept


rules = {
    "temperature 1": (make_rules(), logits_V),
    "temperature 0.5": (make_rules(temperature=0.5), logits_V / 0.5),
    "temperature 2": (make_rules(temperature=2.0), logits_V / 2),
    "top-k, k = 5": (make_rules(top_k=5), top_k_by_hand(logits_V, 5)),
    "top-p, p = 0.8": (make_rules(top_p=0.8), top_p_by_hand(logits_V, 0.8)),
    "0.7, k = 6, p = 0.9": (
        make_rules(temperature=0.7, top_k=6, top_p=0.9),
        top_p_by_hand(top_k_by_hand(logits_V / 0.7, 6), 0.9),
    ),
}
figure, axes = plt.subplots(1, len(rules), figsize=(14, 2.8), sharey=True)
for axis, (name, (rule, by_hand)) in zip(axes, rules.items(), strict=True):
    shipped = jax.nn.softmax(apply_rules(jnp.asarray(logits_V), rule))
    np.testing.assert_allclose(shipped, softmax(by_hand), atol=1e-5)
    axis.bar(range(10), np.asarray(shipped)[order[:10]], color=BLUE)
    axis.set_xticks(range(10), [repr(characters[i])[1:-1] for i in order[:10]])
    axis.set(title=name, xlabel="next character")
axes[0].set_ylabel("probability after 'I will th'")
plt.show()

# %% [markdown]
# Writing one token at a time looks wasteful: each token needs a pass over all tokens before it. But the keys and values of
# these tokens do not change, because no position reads a later one. So a *KV cache* keeps them, and each new token only computes its own query, key and value.
# By hand, for one head:

# %%
whole = attend(q_TxK[None, None], k_TxK[None, None], v_TxK[None, None], mask_TxT)[0, 0]
keys, values, cached = [], [], []
for t in range(T):
    keys.append(k_TxK[t])
    values.append(v_TxK[t])
    weights = softmax(np.stack(keys) @ q_TxK[t] / np.sqrt(K))  # no mask: the future is not there yet
    cached.append(weights @ np.stack(values))
np.testing.assert_allclose(cached, whole, atol=1e-5)

# %% [markdown]
# The package's sampler reads the prompt in one pass, all but its last token (`prefill`). Then it reads one token and draws the
# next, again and again, with the cache (`decode`). Check that the logits with the cache are those of a full pass over the whole
# text.

# %%
sampling_model = live_model
unstacked = unstack_layers(live_state.params)
prompt = tokenizer.encode("ROMEO:\nWhat")[None]
n_prompt = prompt.shape[1]
cache = prefill(sampling_model, unstacked, prompt[:, :-1], np.int32(n_prompt - 1))
greedy = make_rules(greedy=True)
last, cache, drawn = decode(
    sampling_model, unstacked, prompt[:, -1], cache, greedy, jax.random.key(0), n_prompt + np.arange(53)
)
tokens = np.asarray(drawn.tokens_BxN)
written = np.concatenate([prompt, tokens], axis=1)
full, _ = sampling_model.apply({"params": live_state.params}, written)
logits, _ = sampling_model.apply({"params": unstacked}, last[:, None], cache)
np.testing.assert_allclose(logits[:, 0], full[:, -1], atol=1e-3)
np.testing.assert_array_equal(np.argmax(full[0, n_prompt - 1 : -1], -1), tokens[0])
print(tokenizer.decode(written[0]))

# %% [markdown]
# <details><summary><b>Question:</b> the text above was written greedily, and a small model soon repeats itself then. Why does
# the same not happen with temperature 0.8?</summary>
#
# Greedy sampling has no chance in it: when the visible text comes back to where it was, so does everything after it. With a
# temperature, sooner or later another token is drawn, which leads the text out of the loop.
# </details>

# %% [markdown]
# ## 10 Looking inside a trained model
#
# The repository has a trained model of 6 layers with 4 heads each. It has some parts more than section 6: RoPE, norms of
# queries and keys, a convolution over the last three tokens (`docs/recipes.md` lists them). Its attention maps show which earlier characters each
# position reads. Each row is a position, and sums to 1. Three heads are shown: the one that reads the previous character
# most, the one that reads its own position most, and the one whose weights are spread most widely (with the highest
# entropy). No head does only one thing: the percentages in the titles are means over the rows of a longer passage.

# %%
shipped_model = gpt_jax.load("artifacts/pretrained")
line = "ROMEO:\nBut, soft! what light"
weights_LxHxTxT = shipped_model.attention(line)
L, H, n, _ = weights_LxHxTxT.shape
print(f"{L} layers, {H} heads, validation loss {shipped_model.metadata.val_loss:.3f} nats per character")
np.testing.assert_allclose(weights_LxHxTxT.sum(-1), 1, atol=1e-4)
assert np.abs(np.triu(weights_LxHxTxT, 1)).max() == 0  # nothing is read from the future

passage = text[n_train + 20_000 : n_train + 20_000 + 250]
longer_LxHxTxT = shipped_model.attention(passage)
on_diagonal = {
    "the previous character": np.diagonal(longer_LxHxTxT, -1, 2, 3).mean(-1),
    "its own position": np.diagonal(longer_LxHxTxT, 0, 2, 3).mean(-1),
}
entropy_LxH = -(longer_LxHxTxT * np.log(longer_LxHxTxT + 1e-9)).sum(-1).mean(-1)
chosen = [
    (np.unravel_index(p.argmax(), p.shape), f"{p.max():.0%} on {name}") for name, p in on_diagonal.items()
]
widest = np.unravel_index(entropy_LxH.argmax(), entropy_LxH.shape)
chosen.append((widest, f"largest weight {longer_LxHxTxT[widest].max(-1).mean():.0%}"))
names = [repr(character)[1:-1] for character in line]
figure, axes = plt.subplots(1, 3, figsize=(13, 4.6))
for axis, ((i, h), title) in zip(axes, chosen, strict=True):
    image = axis.imshow(weights_LxHxTxT[i, h], cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks(range(n), names, fontsize=8, family="monospace")
    axis.set_yticks(range(n), names, fontsize=8, family="monospace")
    axis.set(
        title=f"layer {i}, head {h}\n{title}", xlabel="character that is read", ylabel="character that reads"
    )
figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
plt.show()

# %% [markdown]
# Does a longer context help? The loss at each position of the window says so: the first positions have little to go on. Most
# of the gain comes from the first 16 characters.

# %%
context = shipped_model.config.model.context
windows = corpus.val[: 160 * context + 1]
inputs, targets, _ = eval_windows(windows, context, batch_size=8)
apply = jax.jit(lambda params, tokens: shipped_model.module.apply({"params": params}, tokens)[0])
by_position = np.concatenate(
    [token_losses(apply(shipped_model.params, i), t) for i, t in zip(inputs, targets, strict=True)]
)
part = tokenizer.decode(windows)
np.testing.assert_allclose(by_position.mean(), shipped_model.loss(part), rtol=1e-4)

starts = 2 ** np.arange(int(np.log2(context)))
means = [by_position[:, start - 1 : end - 1].mean() for start, end in zip(starts, 2 * starts, strict=True)]
figure, axis = plt.subplots(figsize=(8, 3.2))
axis.plot(np.arange(1, context + 1), by_position.mean(0), color=BLUE, alpha=0.4, label="each position")
axis.plot(
    np.sqrt(starts * (2 * starts - 1)),
    means,
    color=ORANGE,
    marker="o",
    linewidth=2,
    label="mean of 1, 2 to 3, 4 to 7, 8 to 15 ...",
)
axis.set(xlabel="characters of context", ylabel="loss (nats per character)", xscale="log",
         title=f"{len(by_position)} windows of the validation text")  # fmt: skip
axis.legend()
plt.show()
means = {name: by_position[:, a - 1 : b].mean() for name, (a, b) in {"1 to 8": (1, 8), "16 to 32": (16, 32),
         "more than 128": (129, context)}.items()}  # fmt: skip
print("loss by characters of context:", {name: f"{mean:.2f}" for name, mean in means.items()})
assert means["1 to 8"] > means["16 to 32"] > means["more than 128"] - 0.05

# %% [markdown]
# Which characters surprise the model? Below, the darker the background, the less probable the model found the character.
# The first characters of words are hard, since many words could follow. Those after them are easier.

# %%
surprise = np.asarray(
    token_losses(shipped_model.logits(passage[:-1])[None], tokenizer.encode(passage)[None, 1:])
)[0]


def colored(character, nats):
    strength = min(nats / 5, 1.0)
    shade = [round(255 + strength * (end - 255)) for end in (0, 114, 178)]
    ink = "white" if strength > 0.5 else "black"
    shown = "&crarr;<br>" if character == "\n" else html.escape(character)
    return f'<span style="background:rgb({shade[0]},{shade[1]},{shade[2]});color:{ink}">{shown}</span>'


cells = [colored(passage[0], 0.0), *map(colored, passage[1:], surprise)]
style = "font-family:monospace;font-size:15px;line-height:1.6;background:white;color:black;padding:8px"
display(HTML(f'<div style="{style}">{"".join(cells)}</div>'))
starts = np.array([before in " \n" for before in passage[:-1]])
print(f"mean surprise: {surprise[starts].mean():.2f} nats at the first character of a word, "
      f"{surprise[~starts].mean():.2f} at the others")  # fmt: skip
assert surprise[starts].mean() > surprise[~starts].mean()

# %% [markdown]
# <details><summary><b>Question:</b> the shipped model reaches about 1.4 nats per character on the validation text. How many
# bits does a compressor need for a character if it uses this model?</summary>
#
# 1.4 / log 2 = 2.0 bits. A good compressor spends $-\log_2 p$ bits on a character of probability $p$, and the mean of that is
# the loss in bits. A better predictor is a better compressor.
# </details>

# %% [markdown]
# ## 11 From here to GPT-2
#
# GPT-2 (small) is the model of section 6 with larger numbers. Its tokens are pieces of words instead of characters, 50,257 of
# them, and it has biases. The parameters below are counted with this package. The arithmetic is that of training: 6
# operations for each weight of a matrix product (2 forward, 4 backward), plus attention; looking up an embedding costs
# nothing.

# %%
gpt2 = ModelConfig(n_layer=12, n_head=12, d_model=768, context=1024, bias=True)
sizes = {
    "live model above": (quick.model, V),
    "shipped model": (shipped_model.config.model, V),
    "configs/shakespeare.py": (recipe.model, V),
    "GPT-2 small": (gpt2, 50_257),
}
rows = []
for name, (config, vocabulary) in sizes.items():
    n_params = count_params(abstract_params(GPT(config, vocabulary, resolve_execution(config)), plan.mesh))
    flops = flops_per_token(config, vocabulary)
    rows.append(
        (name, config.n_layer, config.n_head, config.d_model, config.context, vocabulary, n_params, flops)
    )
    print(f"{name:24} {config.n_layer:3} layers {config.n_head:3} heads  width {config.d_model:4}  context "
          f"{config.context:5}  V {vocabulary:6,}  {n_params:12,} parameters  {flops / 1e6:7.1f} MFLOP a token")  # fmt: skip

by_hand = count_by_hand(gpt2, 50_257) + 12 * (2 * 768 + 3 * 768 + 768 + 4 * 768 + 768) + 768  # and the biases
assert rows[-1][6] == by_hand == 124_439_808

print(f"GPT-2 small is {rows[-1][6] / rows[2][6]:.0f} times as large as configs/shakespeare.py "
      f"and needs {rows[-1][7] / rows[2][7]:.0f} times the arithmetic for each token.")  # fmt: skip

# %% [markdown]
# <details><summary><b>Question:</b> with a vocabulary of 50,257 tokens, what is the loss of a model that knows nothing, and
# why can losses per token not be compared between the two kinds of tokens?</summary>
#
# log 50,257 = 10.8 nats per token. A token of GPT-2 is several characters long, so one prediction covers more text. To
# compare, divide the total loss by the number of characters.
# </details>
#
# **Where to go next.** `docs/code.md` is a map of the code. `python train.py --config configs/shakespeare_cpu.py` trains a
# better model in a few minutes, and `python sample.py` writes with it.

# %%
print(f"this notebook took {time.monotonic() - started:.0f} s here, on {os.cpu_count()} CPU cores")
