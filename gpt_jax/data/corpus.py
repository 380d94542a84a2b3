"""A text as two arrays of token ids: the training split and the validation split.

A small text is tokenized in memory, which takes one byte per character of ASCII. A large one is prepared
once, in the user's cache folder, and read from there. Token files are read where they are.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np

from gpt_jax.data.documents import GIVE_A_PATH, Documents, Progress, find_documents, no_progress, readable
from gpt_jax.data.prepare import (
    Scan,
    encode,
    fingerprint,
    id_type,
    identity,
    make_tokenizer_of,
    prepare,
    scan,
)
from gpt_jax.data.token_files import FORMAT, HEADER, find_token_files, known, open_tokens
from gpt_jax.data.tokenizer_json import is_same
from gpt_jax.data.tokenizers import Tokenizer, make_tokenizer
from gpt_jax.data.tokens import Corpus
from gpt_jax.errors import UserError

INHERITED = "inherited"  # in place of the setting `data.tokenizer`: the tokenizer is that of another model
ADVICE = f"{GIVE_A_PATH} with --config.data.path=FILE"
IN_MEMORY = 2**26  # bytes of documents on the disk, or characters in them; more are prepared in the cache


def load_corpus(
    path: Path,
    context: int,
    train_fraction: float,
    progress: Progress = no_progress,
    spec: str = "",
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Read a text; the first `int(train_fraction * N)` characters train, the rest validates.

    Several documents are not cut: the first one that begins after that position begins the validation split.
    Both splits must hold at least one window of `context` inputs and the target after it.

    Args:
        path: a UTF-8 text file, a .jsonl file, either compressed as .gz or .zst; a folder or a pattern of
            such files; a token file, or a folder of them.
        context: T.
        train_fraction: of the characters, or of the tokens where one token file holds all.
        progress: called with the bytes that are done and all bytes.
        spec: the setting `data.tokenizer`, or `INHERITED`.
        tokenizer: the one that `spec` made when training began; None: make it.

    Raises:
        UserError: the text cannot be read, or is too short, or the tokenizer is not that of the token files.
    """
    with readable(path):
        files = find_token_files(path)
    if files:
        resolve = partial(_resolve, path, spec, tokenizer)
        corpus = open_tokens(path, files, train_fraction, resolve)
    else:
        documents = find_documents(path, ADVICE)
        corpus = _in_memory(documents, train_fraction, progress, spec, tokenizer) or _prepared(
            documents, train_fraction, progress, spec, tokenizer
        )
    _check_length(path, corpus, context)
    return corpus


def characters_of(path: Path) -> str:
    """The distinct characters of a text, none of token files; a `UserError` if it cannot be read."""
    with readable(path):
        files = find_token_files(path)
    return "" if files else scan(find_documents(path, ADVICE), 0.5).characters


def fingerprint_of(path: Path, tokenizer: Tokenizer, advice: str = GIVE_A_PATH) -> str:
    """The `fingerprint` of a corpus, if this is its tokenizer.

    Raises:
        UserError: the text cannot be read. Where there is none, the error ends in `advice`.
    """
    with readable(path):
        files = find_token_files(path)
    if files:
        return open_tokens(path, files, None, lambda found: found or tokenizer).fingerprint
    return fingerprint(scan(find_documents(path, advice), 0.5).digest, tokenizer)


def encode_file(
    path: Path, tokenizer: Tokenizer, progress: Progress = no_progress
) -> tuple[np.ndarray, int, int]:
    """The token ids of a text [N], and its numbers of characters and of bytes as UTF-8.

    Raises:
        UserError: the text cannot be read, or has unknown characters.
    """
    documents = find_documents(path)
    found = scan(documents, 0.0)
    ids_N, counts = _encode(documents, found, tokenizer, progress)
    return ids_N, counts["val_characters"], counts["val_bytes"]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; line ends stay as they are.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    return "".join(block or "" for block in find_documents(path).blocks())


def _in_memory(
    documents: Documents, train_fraction: float, progress: Progress, spec: str, tokenizer: Tokenizer | None
) -> Corpus | None:
    """A small text as arrays; None: it is too large, compressed or not."""
    if documents.size > IN_MEMORY:
        return None
    found = scan(documents, train_fraction, lambda done, total: progress(done // 2, total))
    if found.n_characters > IN_MEMORY:
        return None
    tokenizer = tokenizer or make_tokenizer_of(documents, found, spec)
    ids_N, counts = _encode(
        documents, found, tokenizer, lambda done, total: progress((total + done) // 2, total)
    )
    return Corpus(
        train=ids_N[: counts["train_tokens"]],
        val=ids_N[counts["train_tokens"] :],
        tokenizer=tokenizer,
        fingerprint=fingerprint(found.digest, tokenizer),
        n_characters=found.n_characters,
        n_val_characters=counts["val_characters"],
        n_val_bytes=counts["val_bytes"],
        split=found.split,
    )


def _encode(
    documents: Documents, found: Scan, tokenizer: Tokenizer, progress: Progress
) -> tuple[np.ndarray, dict[str, int]]:
    """All ids [N], and what `Corpus` counts."""
    ids_N, counts = bytearray(), {"train_tokens": 0, "val_characters": 0, "val_bytes": 0}
    for piece, ids in encode(documents, found, tokenizer, progress):
        ids_N += ids.astype(id_type(tokenizer)).data
        if piece.is_train:
            counts["train_tokens"] += len(ids)
        else:
            counts["val_characters"] += len(piece.text)
            counts["val_bytes"] += len(piece.text.encode())
    return np.frombuffer(ids_N, id_type(tokenizer)), counts


def _resolve(path: Path, spec: str, tokenizer: Tokenizer | None, found: Tokenizer | None) -> Tokenizer:
    """The tokenizer of token files: what they say, or else what the settings say."""
    if found is None:
        if tokenizer is None and (spec in ("", "char") or spec.startswith("bpe:")):
            raise UserError(
                f"token files {path} do not say which tokenizer made them: name it, such as "
                f"--config.data.tokenizer=gpt2"
            )
        return tokenizer or make_tokenizer(spec, lambda: iter(()))
    if tokenizer and not is_same(found, tokenizer):
        raise UserError(f"{path} holds tokens of another tokenizer than the model's: name the text instead")
    if not tokenizer and not is_named(spec, found):
        raise UserError(
            f"data.tokenizer = {spec!r} is not the tokenizer of {path}, which is {found.name!r}: leave the "
            f"setting out"
        )
    return found


def is_named(spec: str, tokenizer: Tokenizer) -> bool:
    """Whether a setting `data.tokenizer` is empty, or the name of a tokenizer, or its file."""
    if spec in ("", tokenizer.name):
        return True
    is_name = identity(spec, tokenizer) == spec
    return not is_name and is_same(make_tokenizer(spec, lambda: iter(())), tokenizer)


def _prepared(
    documents: Documents, train_fraction: float, progress: Progress, spec: str, tokenizer: Tokenizer | None
) -> Corpus:
    """A large text from token files in the user's cache, which are prepared when it is used first."""
    from platformdirs import user_cache_path  # only here: small texts work without it

    source = json.dumps([documents.identity(), identity(spec, tokenizer), train_fraction, FORMAT])
    folder = user_cache_path("gpt_jax") / "tokens" / hashlib.sha256(source.encode()).hexdigest()[:16]
    if not (folder / HEADER).exists():
        print(f"data    {documents.size / 1e9:.1f} GB of text: tokenizing it once, into {folder}", flush=True)
    prepare(documents, spec, folder, train_fraction, progress, tokenizer)
    return open_tokens(folder, [], train_fraction, known)


def _check_length(path: Path, corpus: Corpus, context: int) -> None:
    n_train, n_val = len(corpus.train), len(corpus.val)
    longest = min(n_train, n_val) - 1  # the context that fits both splits
    if longest >= context:
        return
    split, n_tokens = ("training", n_train) if n_train < context + 1 else ("validation", n_val)
    unit = "characters" if n_train + n_val == corpus.n_characters else "tokens"
    raise UserError(
        f"{path} has {n_train + n_val:,} {unit}: its {split} split of {n_tokens:,} token"
        f"{'s' if n_tokens != 1 else ''} is shorter than one window of model.context + 1 = {context + 1}; "
        f"use a longer text" + (f", or --config.model.context={longest}" if longest > 0 else "")
    )
