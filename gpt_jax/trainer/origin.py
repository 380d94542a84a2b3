"""Where a run starts: at its own checkpoint, or else its parent, the model that `init_from` names, or else
random parameters.

A new run takes shape, vocabulary and parameters from its parent. A resumed run takes them from its own
checkpoint, since the parent may be gone or changed by then.
"""

from contextlib import closing, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from gpt_jax.config import FREE, Config, ModelConfig
from gpt_jax.data.corpus import INHERITED, characters_of, is_named
from gpt_jax.data.tokenizers import CharTokenizer, Tokenizer
from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange.trained_model import (
    TrainedModel,
    frozen_params,
    load,
    params_sha256,
    with_context,
)
from gpt_jax.model.layers import Params
from gpt_jax.model.options import MAX_BIGRAMS
from gpt_jax.model.params import init_params
from gpt_jax.model.transformer import GPT
from gpt_jax.paths import expand, relative_to_root, text_file
from gpt_jax.rng import INIT_STREAM, stream
from gpt_jax.storage.checkpoints import Checkpoints, read_metadata
from gpt_jax.storage.run_folder import checkpoint_folder

SHAPE = [field.name for field in fields(ModelConfig) if field.name not in FREE]

FIXED_ROWS = ("lora_rank", "vocab_size")  # new rows would not be trained; rows have no tokens yet


@dataclass
class Origin:
    """What a run goes on from."""

    config: Config  # the settings, with the shape of the model
    spec: str  # for `load_corpus`, like `tokenizer`
    tokenizer: Tokenizer | None = None
    record: dict[str, Any] | None = None  # the parent, as `Metadata` has it
    message: str = ""  # what a new run takes from its parent
    params: Params | None = None  # for a new run; None: random ones


def find_origin(config: Config, workdir: Path) -> Origin:
    """The newest checkpoint in `workdir`, or else the parent, or neither.

    Raises:
        UserError: the parent cannot be used with these settings or this text.
    """
    spec, named = config.data.tokenizer, f"init_from = {config.init_from!r}"
    if not config.init_from and not spec.startswith("bpe:"):
        return Origin(config, spec)
    if config.init_from and expand(config.init_from).resolve() == workdir.resolve():
        raise UserError(f"{named} is the run itself: leave it out, since a run resumes by itself")
    saved = parent = None
    with closing(Checkpoints(checkpoint_folder(workdir))) as checkpoints:
        for step in checkpoints.steps():
            with suppress(UserError):  # it is damaged: the newest one that is not decides
                saved = read_metadata(checkpoints, step)
    if not config.init_from:  # training a tokenizer again might give another one
        return Origin(config, spec, saved.tokenizer if saved and saved.tokenizer.name == spec else None)
    if not saved:
        try:
            parent = load(config.init_from)
        except (UserError, RunError) as error:
            raise UserError(f"{named} cannot be used: {error}") from None
    source = parent.metadata if parent else saved
    assert source
    if not is_named(spec, source.tokenizer):
        name = source.tokenizer.name
        raise UserError(f"data.tokenizer = {spec!r} is not that of {named}, {name!r}: leave the setting out")
    given, default, there = map(vars, (config.model, ModelConfig(), source.config.model))
    taken = {name: there[name] for name in SHAPE if given[name] == default[name] != there[name]}
    other = [name for name in SHAPE if given[name] not in (default[name], there[name])]
    if parent and other:
        values = ", ".join(f"model.{name} = {given[name]!r} (there {there[name]!r})" for name in other)
        raise UserError(f"the model of {named} has another shape: leave out {values}")
    config = replace(config, model=replace(config.model, **taken))
    if saved:
        params = frozen_params(saved) if config.model.lora_rank else None
        return Origin(config, INHERITED, saved.tokenizer, saved.parent, params=params)
    assert parent
    return _begin(config, parent, taken)


def _begin(config: Config, parent: TrainedModel, taken: dict[str, Any]) -> Origin:
    """The origin of a new run; `taken` are the settings of its model that are the parent's."""
    path, sha256 = parent.workdir.absolute(), params_sha256(parent.params)
    record = {"path": str(path), "source": parent.source, "step": parent.step, "sha256": sha256}
    message = f"start   from {relative_to_root(path)} ({parent.source}, step {parent.step:,})"
    message += f", parameters sha256 {sha256[:12]}"
    if taken:
        message += "\nshape   as there: " + ", ".join(f"{name} = {value!r}" for name, value in taken.items())
    if config.model.position == "learned" and config.model.context > parent.config.model.context:
        most = parent.config.model.context
        raise UserError(
            f"model.context = {config.model.context} exceeds the parent's positions: use {most} or less"
        )
    params = with_context(parent.params, config.model)
    tokenizer, new = _vocabulary(config, parent.tokenizer)
    if new and (fixed := next((name for name in FIXED_ROWS if getattr(config.model, name)), None)):
        raise UserError(f"data.extend_vocabulary = True does not go with model.{fixed}: leave one out")
    if new:
        message += f"\nvocab   extended by {len(new):,}: {', '.join(map(repr, new))}"
        model = GPT(config.model, tokenizer.vocab_size, parent.plan.execution)
        ids_V = tokenizer.encode(parent.tokenizer.decode(np.arange(parent.tokenizer.vocab_size)))
        params |= _with_new_rows(params, model, ids_V, stream(config.seed, INIT_STREAM))
    return Origin(config, INHERITED, tokenizer, record, message, params)


def _vocabulary(config: Config, tokenizer: Tokenizer) -> tuple[Tokenizer, list[str]]:
    """The parent's tokenizer, extended as `data.extend_vocabulary` says, and the new characters."""
    extend = config.data.extend_vocabulary
    if not isinstance(tokenizer, CharTokenizer):
        if extend:
            raise UserError("data.extend_vocabulary = True is for a vocabulary of characters: leave it out")
        return tokenizer, []
    new = sorted({*characters_of(text_file(config.data))} - {*tokenizer.characters})
    try:
        tokenizer.encode("" if extend else "".join(new))
    except UserError as error:
        raise UserError(f"{error}; --config.data.extend_vocabulary=True adds them") from None
    return CharTokenizer.from_text("".join([tokenizer.characters, *new])), new


def _with_new_rows(params: Params, model: GPT, ids_V: np.ndarray, key: jax.Array) -> Params:
    """Embeddings and head of a larger vocabulary, which has the old tokens at `ids_V`; `key` draws others."""
    size, bigram = model.vocab_size, model.config.bigram
    if bigram and (size + 1) * size > MAX_BIGRAMS:
        raise UserError(f"data.extend_vocabulary = True: model.bigram hashes the pairs of {size} characters")
    # As `bigram_ids` numbers the pairs; `size` stands for no token before.
    pairs = (np.append(ids_V, size)[:, None] * size + ids_V).ravel()
    places = {"token_embedding": ids_V, "bigram_embedding": pairs, "head": (slice(None), ids_V)}
    draw = jax.jit(lambda key: {k: part for k, part in init_params(model, key).items() if k in places})
    drawn = jax.tree.map(np.array, nn.unbox(draw(key)))
    for name, part in drawn.items():
        for leaf, array in part.items():
            array[places[name]] = params[name][leaf]
    return drawn
