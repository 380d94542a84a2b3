"""A trained model: sampling, logits, attention weights, loss."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.adapters import merge, trained_params
from gpt_jax.config import Config, MeshConfig, ModelConfig
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.data.tokens import Tokens
from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange.explanation import Explanation
from gpt_jax.interchange.hugging_face import is_hugging_face, read_hugging_face
from gpt_jax.interchange.look_inside import explain
from gpt_jax.interchange.model_folder import checksum, is_exported, read_exported
from gpt_jax.interchange.nanogpt import is_nanogpt, read_nanogpt
from gpt_jax.jax_settings import default_jax_settings, each_with_default_jax_settings
from gpt_jax.model.layers import Params
from gpt_jax.model.loss import loss_of_tokens, losses_of_batches
from gpt_jax.model.params import count_params, name_leaves, unstack_layers
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.devices import local_devices
from gpt_jax.paths import expand
from gpt_jax.plan import Plan, make_plan
from gpt_jax.records import Record, read_metrics
from gpt_jax.rng import SAMPLE_STREAM, stream
from gpt_jax.sampling.decode import Drawn
from gpt_jax.sampling.generate import WINDOWS, generate_pieces
from gpt_jax.sampling.rules import SamplingRules, make_rules
from gpt_jax.sampling.texts import GrowingText, Piece
from gpt_jax.storage.integrity import DamagedError
from gpt_jax.storage.metadata import Metadata
from gpt_jax.storage.run_folder import METRICS, checkpoint_folder, has_checkpoint

MAX_COMPRESSION = 100  # real parameters compress less; a decompression bomb does not


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and what it needs."""

    metadata: Metadata  # from the checkpoint: settings, loss, data fingerprint, library versions
    plan: Plan  # the device and the precision that it computes with here
    module: GPT
    params: Params  # as training has them
    source: str  # "best checkpoint", "last checkpoint", "exported model", "Hugging Face folder" ...
    workdir: Path  # the folder it was read from

    @property
    def config(self) -> Config:
        """The settings that it was trained with."""
        return self.metadata.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return self.metadata.tokenizer

    @property
    def step(self) -> int:
        """Updates that made the parameters."""
        return self.metadata.step

    @property
    def history(self) -> list[Record]:
        """The lines of the run's metrics.jsonl; empty for an exported model."""
        return read_metrics(self.workdir / METRICS)

    @overload
    def generate(self, prompt: str = "", length: int = 500, **how: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str], length: int = 500, **how: Any) -> list[str]: ...

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        length: int = 500,
        *,
        seed: int = 0,
        window: str = "half",
        stop: str | Sequence[str] = (),
        **rules: Any,
    ) -> str | list[str]:
        """Continue `prompt` by at most `length` tokens and return their text, without the prompt.

        Several prompts, of any lengths, are continued side by side: a list of texts. An empty prompt stands
        for end of text, or for a line feed where the tokenizer has none. The same seed gives the same text.
        `window` is what the model sees past its context (`sampling/generate.py`). A text ends before the
        first of the strings `stop`, or at the tokenizer's end of text. The rules are temperature, top_k,
        top_p, min_p, greedy and repetition_penalty (`sampling/rules.py`, `make_rules`). Raises `UserError` if
        an argument is out of its range, or if a character is unknown.
        """
        pieces = self.stream(prompt, length, make_rules(**rules), seed=seed, window=window, stop=stop)
        n_texts = 1 if isinstance(prompt, str) else len(prompt)
        texts: list[list[str]] = [[] for _ in range(n_texts)]
        for piece in pieces:
            for text, new in zip(texts, piece, strict=True):
                text.append(new)
        joined = ["".join(text) for text in texts]
        return joined[0] if isinstance(prompt, str) else joined

    @default_jax_settings()
    def stream(
        self,
        prompt: str | Sequence[str],
        length: int,
        rules: SamplingRules,
        *,
        num_samples: int = 1,
        seed: int = 0,
        window: str = "half",
        stop: str | Sequence[str] = (),
    ) -> Iterator[list[Piece]]:
        """Like `generate`, as the text comes: a `Piece` for each text, `num_samples` texts for each prompt.

        A `Piece` is a string with two attributes: `ended` says why the text ends with it (None: it goes on),
        and `tokens` has id, text, and with `make_rules(logprobs=True)` log probability of each token.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not prompts:
            raise UserError("prompt = [] must have a text or more")
        if "" in stops:
            raise UserError("stop = '' must have a character or more")
        if length < 0:
            raise UserError(f"length = {length} must be 0 or above")
        if num_samples < 1:
            raise UserError(f"num_samples = {num_samples} must be 1 or above")
        if window not in WINDOWS:
            raise UserError(f"window = {window!r} must be one of {', '.join(map(repr, WINDOWS))}")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed = {seed} must lie in [0, 2**32)")
        # The model predicts from at least one token.
        start, tokenizer = np.array([self.tokenizer.start_id], np.int32), self.tokenizer
        encoded = [ids if len(ids) else start for ids in map(tokenizer.encode, prompts)]
        rows = [ids for ids in encoded for _ in range(num_samples)]  # one array for all texts of a prompt
        end_id = getattr(tokenizer, "end_id", None)  # a tokenizer of your own may have none
        texts = [GrowingText(tokenizer.decoder(), stops, end_id) for _ in rows]
        key, rules = stream(seed, SAMPLE_STREAM), rules.replace(n_tokens=tokenizer.vocab_size)
        pieces = generate_pieces(self.module, self.params, rows, length, rules, key, window)
        return _grow(texts, length, each_with_default_jax_settings(pieces))

    @default_jax_settings()
    def logits(self, text: str) -> np.ndarray:
        """The logits of the token after each token of a text: float32 [T, V].

        `jax.nn.softmax` of row t gives the probabilities of token t + 1. The text must have 1 to `context`
        tokens, else it is a `UserError`.
        """
        return np.asarray(_logits(self.module, self.params, self._window(text))[0])

    @default_jax_settings()
    def attention(self, text: str) -> np.ndarray:
        """Attention weights, float32 [L, H, T, T], of a text as for `logits`.

        Entry [l, h, t, s] is the weight with which head h of layer l reads token s for token t. Each row t
        sums to 1, and is 0 where s > t.
        """
        return np.asarray(_attention(self.module, self.params, self._window(text)))

    @default_jax_settings()
    def explain(self, text: str) -> Explanation:
        """The surprise, guesses, attention and logit lens of a text as for `logits`; a notebook shows it."""
        return explain(self.module, self.params, self.tokenizer, self._window(text)[0])

    @default_jax_settings()
    def loss(self, text: str | Tokens) -> float:
        """Nats per token of a text of two tokens or more, or of its ids [N]: see `loss_of_tokens`."""
        tokens_N = self.tokenizer.encode(text) if isinstance(text, str) else text
        return loss_of_tokens(self.module, self.params, tokens_N, self.plan.micro_batch_size)

    @default_jax_settings()
    def losses(self, text: str | Tokens) -> np.ndarray:
        """Nats of each token but the first, float32 [N - 1], whose mean is the `loss` but for rounding."""
        tokens_N = self.tokenizer.encode(text) if isinstance(text, str) else text
        how = self.module, self.params, tokens_N, self.plan.micro_batch_size, lambda: None
        return np.concatenate([*losses_of_batches(*how, each=True)]).ravel()[: len(tokens_N) - 1]

    def _window(self, text: str) -> np.ndarray:
        ids, context = self.tokenizer.encode(text), self.config.model.context
        if not 0 < len(ids) <= context:
            raise UserError(f"text of {len(ids):,} tokens must have 1 to {context} (the context)")
        return ids[None]


def _grow(texts: list[GrowingText], length: int, pieces: Iterator[Drawn]) -> Iterator[list[Piece]]:
    """The pieces of texts of at most `length` tokens, until all have ended."""
    n_left = length
    for tokens_BxN, logprobs_BxN in pieces:
        n_left -= tokens_BxN.shape[1]
        logprobs = [None] * len(texts) if logprobs_BxN is None else logprobs_BxN
        new = zip(texts, tokens_BxN, logprobs, strict=True)
        yield [text.add(ids_N, logprobs_N, n_left == 0) for text, ids_N, logprobs_N in new]
        if all(text.ended for text in texts):
            return


@partial(jax.jit, static_argnums=0)
def _logits(module: GPT, params: Params, tokens_BxT: np.ndarray) -> jax.Array:
    return module.apply({"params": params}, tokens_BxT)[0]


@partial(jax.jit, static_argnums=0)
def _attention(module: GPT, params: Params, tokens_1xT: np.ndarray) -> jax.Array:
    _, recorded = module.apply({"params": unstack_layers(params)}, tokens_1xT, mutable=["intermediates"])
    layers = recorded["intermediates"]
    weights = [layers[f"block_{i}"]["attention"]["weights_BxHxTxS"][0][0] for i in range(len(layers))]
    return jnp.stack(weights)


@default_jax_settings()
def load(workdir: str | Path, which: str = "best") -> TrainedModel:
    """Read the model of a run, or of a folder: exported, of Hugging Face's transformers, or of nanoGPT.

    `which` checkpoint of a run: the "best", by validation loss, or the "last". A damaged one is named on
    stderr, and the next good one is used.

    Raises:
        UserError: there is no model, its arrays do not fit its settings, it is of another version that cannot
            be read, or an exported model is damaged.
        RunError: all checkpoints are damaged.
    """
    workdir = expand(workdir)
    if which not in ("best", "last"):
        raise UserError(f"which = {which!r} must be 'best' or 'last'")
    local_devices()  # one error for a missing platform, whatever is read
    if has_checkpoint(workdir):
        source, (metadata, params) = f"{which} checkpoint", _read_checkpoint(workdir, which)
    elif is_exported(workdir):
        source, (metadata, params) = "exported model", read_exported(workdir, _shapes_of_params)
    elif is_hugging_face(workdir):
        source, (metadata, params) = "Hugging Face folder", read_hugging_face(workdir, _shapes_of_params)
    elif is_nanogpt(workdir):
        source, (metadata, params) = "checkpoint of nanoGPT", read_nanogpt(workdir, _shapes_of_params)
    else:
        raise UserError(
            f"no trained model in {workdir}: name another folder, or train one (README.md says how)"
        )
    return TrainedModel(metadata, *_for_one_device(metadata), params, source, workdir)


def _for_one_device(metadata: Metadata) -> tuple[Plan, GPT]:
    """The plan and the module, for one device of this machine whatever training had."""
    train = replace(metadata.config.train, grad_accum_steps=0)
    config = replace(metadata.config, mesh=MeshConfig(data=1), train=train)
    plan = make_plan(config, devices=local_devices()[:1])
    if metadata.total_steps is not None:
        plan = replace(plan, steps=metadata.total_steps, steps_were_chosen=True)
    vocab_size = config.model.vocabulary(metadata.tokenizer.vocab_size)
    return plan, GPT(plan.config.model, vocab_size, plan.execution)


def _shapes_of_params(metadata: Metadata) -> Params:
    plan, module = _for_one_device(metadata)
    return trained_params(module, plan.mesh)


def params_sha256(params: Params) -> str:
    """The SHA-256 of parameters, with their names."""
    return checksum({name: np.ascontiguousarray(leaf) for name, leaf in name_leaves(params).items()})


def with_context(params: Params, config: ModelConfig) -> Params:
    """Parameters with the learned positions of a context that may be shorter."""
    if config.position != "learned":
        return params
    rows_TxD = params["position_embedding"]["embedding"][: config.context]
    return params | {"position_embedding": {"embedding": rows_TxD}}


def frozen_params(metadata: Metadata) -> Params:
    """What the adapters of a run adapt: the parameters of its parent.

    Raises:
        UserError: the parent is gone, or has other parameters.
    """
    path, parent = metadata.config.init_from, metadata.parent
    try:
        params = load(path).params
    except (UserError, RunError) as error:
        raise UserError(f"init_from = {path!r}, which this run adapts, cannot be read: {error}") from None
    if not parent or params_sha256(params) != parent["sha256"]:
        raise UserError(f"init_from = {path!r} has other parameters than this run adapts: restore them")
    return with_context(params, metadata.config.model)


def _read_checkpoint(workdir: Path, which: str) -> tuple[Metadata, Params]:
    # Only here: Orbax takes a second to import, and exported models do not need it.
    from gpt_jax.storage.checkpoints import Checkpoints, read_metadata

    def read(step: int) -> tuple[Metadata, Params]:
        metadata, folder = read_metadata(checkpoints, step), checkpoints.folder / str(step)
        target = _shapes_of_params(metadata)
        n_bytes = 4 * count_params(target)
        on_disk = sum(file.stat().st_size for file in (folder / "params").rglob("*") if file.is_file())
        if n_bytes > MAX_COMPRESSION * on_disk + 2**20:
            raise DamagedError(
                f"checkpoint {folder} claims {n_bytes:,} bytes of params in {on_disk:,} on disk"
            )
        return metadata, checkpoints.restore(step, {"params": target})["params"]

    with closing(Checkpoints(checkpoint_folder(workdir))) as checkpoints:
        steps = checkpoints.best_first if which == "best" else lambda: checkpoints.steps()[::-1]
        metadata, params = checkpoints.first_good(steps, read)[0]
    if not metadata.config.model.lora_rank:
        return metadata, params
    model = replace(metadata.config.model, lora_rank=0)  # merged, it is like any other
    return replace(metadata, config=replace(metadata.config, model=model)), merge(
        frozen_params(metadata), params
    )
