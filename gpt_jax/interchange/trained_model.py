"""A trained model: to sample from, to look into, to evaluate."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.config import Config, MeshConfig
from gpt_jax.data.batches import micro_batch_size
from gpt_jax.data.tokenizers import Tokenizer
from gpt_jax.errors import UserError
from gpt_jax.interchange.model_folder import is_exported, read_exported
from gpt_jax.model.layers import Params
from gpt_jax.model.loss import Announce, LossOfTokens, make_loss_of_tokens, silent
from gpt_jax.model.params import abstract_params, count_params, unstack_layers
from gpt_jax.model.transformer import GPT
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.rng import SAMPLE_STREAM, stream
from gpt_jax.sampling.generate import WINDOWS, generate_tokens
from gpt_jax.sampling.rules import SamplingRules, make_rules
from gpt_jax.storage.format import array_names, current_array_names
from gpt_jax.storage.integrity import DamagedError
from gpt_jax.storage.metadata import Metadata
from gpt_jax.storage.run_folder import checkpoint_folder, has_checkpoint

MAX_COMPRESSION = 100  # real parameters compress less; a decompression bomb does not


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and what it needs.

    Attributes:
        config: the settings that it was trained with.
        module: the `GPT`.
        params: its parameters, as training has them; the moving average where the run kept one.
        tokenizer: text to ids and back.
        step: updates that made the parameters.
        metadata: of the checkpoint: loss, data fingerprint, library versions.
        source: "best checkpoint", "last checkpoint", or "exported model".
    """

    config: Config
    module: GPT
    params: Params
    tokenizer: Tokenizer
    step: int
    metadata: Metadata
    source: str

    def generate(
        self,
        prompt: str = "",
        length: int = 500,
        *,
        seed: int = 0,
        window: str = "half",
        **rules: Any,
    ) -> str:
        """Continue `prompt` by `length` tokens and return their text, without the prompt.

        Args:
            prompt: any text that the tokenizer can encode; an empty one stands for a line feed.
            length: tokens to generate.
            seed: the same seed gives the same text.
            window: what the model sees past its context: see `sampling/generate.py`.
            **rules: temperature, top_k, top_p, min_p, greedy: see `sampling/rules.py`, `make_rules`.

        Raises:
            UserError: an argument out of its range, or unknown characters.
        """
        pieces = self.stream(prompt, length, make_rules(**rules), seed=seed, window=window)
        return "".join(texts[0] for texts in pieces)

    def stream(
        self,
        prompt: str,
        length: int,
        rules: SamplingRules,
        *,
        num_samples: int = 1,
        seed: int = 0,
        window: str = "half",
    ) -> Iterator[list[str]]:
        """Like `generate`, for several samples at once, piece by piece.

        Yields:
            One piece of new text for each sample.
        """
        if length < 0:
            raise UserError(f"length = {length} must be 0 or above")
        if num_samples < 1:
            raise UserError(f"num_samples = {num_samples} must be 1 or above")
        if window not in WINDOWS:
            raise UserError(f"window = {window!r} must be one of {', '.join(map(repr, WINDOWS))}")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed = {seed} must lie in [0, 2**32)")
        # The model predicts from at least one token.
        ids = self.tokenizer.encode(prompt) if prompt else np.array([self.tokenizer.start_id], np.int32)
        decoders = [self.tokenizer.decoder() for _ in range(num_samples)]
        # No window reaches further back.
        end_BxT = np.tile(ids[-self.config.model.context :], (num_samples, 1))
        pieces = generate_tokens(
            self.module, self.params, end_BxT, length, rules, stream(seed, SAMPLE_STREAM), window,
            n_before=len(ids) - end_BxT.shape[1],
        )  # fmt: skip
        return ([decode(row) for decode, row in zip(decoders, piece, strict=True)] for piece in pieces)

    def logits(self, text: str) -> np.ndarray:
        """The logits of the token after each token of a text: float32 [T, V].

        `jax.nn.softmax` of row t gives the probabilities of token t + 1.

        Raises:
            UserError: unknown characters, an empty text, or more tokens than the context.
        """
        return np.asarray(_logits(self.module, self.params, self._window(text))[0])

    def attention(self, text: str) -> np.ndarray:
        """Attention weights, float32 [L, H, T, T].

        Entry [l, h, t, s] is the weight with which head h of layer l reads token s for token t. Each row t
        sums to 1, and is 0 where s > t.

        Raises:
            UserError: unknown characters, an empty text, or more tokens than the context.
        """
        return np.asarray(_attention(self.module, self.params, self._window(text)))

    def loss(self, text: str, announce: Announce = silent) -> float:
        """Nats per token of a text, by the headline protocol (`model/loss.py`).

        Args:
            text: two tokens or more.
            announce: a context in which the program compiles, such as `compiling` of
                `storage/compilation_cache.py`.

        Raises:
            UserError: unknown characters, or fewer than two tokens.
        """
        return self.loss_of_tokens(self.tokenizer.encode(text), announce)

    def loss_of_tokens(self, tokens_N: np.ndarray, announce: Announce = silent) -> float:
        """`loss` of a text that is encoded already: integer ids [N].

        Raises:
            UserError: fewer than two tokens.
        """
        if len(tokens_N) < 2:
            raise UserError(f"text of {len(tokens_N)} token(s) must have 2 or more for a loss")
        return self._loss_of_tokens(self.params, tokens_N, announce)

    @cached_property
    def _loss_of_tokens(self) -> LossOfTokens:
        context, platform = self.config.model.context, jax.default_backend()
        batch_size = micro_batch_size(self.config.train, context, 1, platform)
        return make_loss_of_tokens(self.module, batch_size)

    def _window(self, text: str) -> np.ndarray:
        ids, context = self.tokenizer.encode(text), self.config.model.context
        if not 0 < len(ids) <= context:
            raise UserError(f"text of {len(ids):,} tokens must have 1 to {context} (the context)")
        return ids[None]


@partial(jax.jit, static_argnums=0)
def _logits(module: GPT, params: Params, tokens_BxT: np.ndarray) -> jax.Array:
    return module.apply({"params": params}, tokens_BxT)[0]


@partial(jax.jit, static_argnums=0)
def _attention(module: GPT, params: Params, tokens_1xT: np.ndarray) -> jax.Array:
    variables = {"params": unstack_layers(params)}
    _, recorded = module.apply(variables, tokens_1xT, mutable=["intermediates"])
    layers = recorded["intermediates"]
    weights = [layers[f"block_{i}"]["attention"]["weights_BxHxTxS"][0][0] for i in range(len(layers))]
    return jnp.stack(weights)


def load(workdir: str | Path, which: str = "best") -> TrainedModel:
    """Read the model of a run, or an exported one.

    A damaged checkpoint is named on stderr, and the next good one is used.

    Args:
        workdir: the folder of the run, or one that `python -m gpt_jax.export` wrote.
        which: "best" (by validation loss) or "last"; ignored for an exported model.

    Raises:
        UserError: there is no checkpoint, its arrays do not fit its settings, it is of another version that
            cannot be read, or an exported model is damaged.
        RunError: all checkpoints are damaged.
    """
    workdir = Path(workdir).expanduser()
    if which not in ("best", "last"):
        raise UserError(f"which = {which!r} must be 'best' or 'last'")
    if has_checkpoint(workdir):
        source = f"{which} checkpoint"
        metadata, params = _read_checkpoint(workdir, which)
    elif is_exported(workdir):
        source = "exported model"
        metadata, params = read_exported(workdir)
    else:
        raise UserError(
            f"no trained model in {workdir}: name another folder, or train one (README.md says how)"
        )
    config, tokenizer = metadata.config, metadata.tokenizer
    module = GPT(config.model, tokenizer.vocab_size)
    return TrainedModel(config, module, params, tokenizer, metadata.step, metadata, source)


def _read_checkpoint(workdir: Path, which: str) -> tuple[Metadata, Params]:
    # Only here: Orbax takes a second to import, and exported models do not need it.
    from gpt_jax.storage.checkpoints import Checkpoints, read_metadata

    checkpoints = Checkpoints(checkpoint_folder(workdir))

    def steps() -> list[int]:
        return checkpoints.best_first() if which == "best" else checkpoints.steps()[::-1]

    def read(step: int) -> tuple[Metadata, Params]:
        metadata = read_metadata(checkpoints, step)
        config, vocab_size = metadata.config, metadata.tokenizer.vocab_size
        # One device samples, whatever the mesh was in training.
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        target = abstract_params(GPT(config.model, vocab_size), mesh)
        item = "ema_params" if config.optimizer.ema_decay > 0 else "params"
        n_bytes, on_disk = 4 * count_params(target), checkpoints.disk_size(step, item)
        if n_bytes > MAX_COMPRESSION * on_disk + 2**20:
            raise DamagedError(
                f"checkpoint {checkpoints.folder / str(step)} claims {n_bytes:,} bytes of {item} in "
                f"{on_disk:,} on disk"
            )
        stored = metadata.format_version
        restored = checkpoints.restore(step, {item: array_names(target, stored)})[item]
        return metadata, current_array_names(restored, stored)

    try:
        (metadata, params), _ = checkpoints.first_good(steps, read)
    finally:
        checkpoints.close()
    return metadata, params
