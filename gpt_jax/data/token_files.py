"""Layouts of token files.

Our own is a folder with `tokens.json` beside `train.bin` and `val.bin`, written by `data/prepare.py`. llm.c's
files have a header of 256 integers. nanoGPT's are raw uint16 ids, perhaps with a `meta.pkl` beside them.
"""

import glob
import hashlib
import json
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from gpt_jax.data.documents import check_within
from gpt_jax.data.tokenizers import CharTokenizer, Tokenizer, tokenizer_from_json
from gpt_jax.data.tokens import Corpus, FileTokens, TokenFile, TokenFileError
from gpt_jax.errors import UserError

HEADER, FORMAT = "tokens.json", 1
STATE = "unfinished.json"  # in place of the header: how far an interrupted `prepare` came
TRAIN, VAL, META = "train.bin", "val.bin", "meta.pkl"
MAX_HEADER = 2**24  # bytes; a larger header or meta.pkl is not read
MAX_CHECKED = 2**26  # bytes of ids that are compared with the vocabulary at once; others as they are read
SAMPLED, PIECE = 64, 4096  # pieces of files without checksums that their fingerprint looks at; ids of each
# llm.c's headers: magic number, version -> type of an id. Source: github.com/karpathy/llm.c, dev/data.
LLM_C = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}
LLM_C_BYTES = 256 * 4

# From what the files say to their tokenizer. It raises a `UserError` where that is not enough.
Resolve: TypeAlias = Callable[[Tokenizer | None], Tokenizer]


def find_token_files(path: Path) -> list[Path]:
    """The token files of a path: a `.bin` file, or those in a folder; none where the path holds texts."""
    if path.is_file():
        return [path] if path.suffix == ".bin" else []
    if path.is_dir():
        files = [file for file in path.glob("*.bin") if file.is_file() and not file.name.startswith(".")]
        check_within(files, path)
        if (path / HEADER).is_file() and not {TRAIN, VAL} <= {file.name for file in files}:
            raise UserError(f"{path} lacks {TRAIN} or {VAL}: prepare it again")
        if (path / STATE).exists() and not (path / HEADER).exists():
            raise UserError(f"{path} is not finished: run the same `prepare` again")
        return sorted(files)
    found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = [file for file in found if file.suffix == ".bin" and file.is_file()]
    if files and len(files) < len(found):
        raise UserError(f"{path} matches token files and others: name one kind, such as {files[0].name}")
    return sorted(files)


def open_tokens(path: Path, files: list[Path], train_fraction: float | None, resolve: Resolve) -> Corpus:
    """Open token files, check their sizes and headers, and split them.

    Files with "val" in their name validate, the others train; where there are only the ones or the others,
    the first `train_fraction` of the ids trains. None: any split will do.

    Raises:
        UserError: a file is damaged or cut off, its header is wrong, an id is not in the vocabulary, or the
            folder was prepared with another `train_fraction`.
    """
    try:
        corpus = _open_prepared(path, train_fraction, resolve) if (path / HEADER).is_file() else None
        corpus = corpus or _open_others(path, list(map(_open, files)), train_fraction or 0.5, resolve)
    except OSError as error:
        raise UserError(f"token file {error.filename or path} cannot be read: {error.strerror}") from None
    for tokens in (corpus.train, corpus.val):
        _check_ids(tokens, corpus.tokenizer.vocab_size, MAX_CHECKED)
    return corpus


def _open_others(path: Path, files: list[TokenFile], train_fraction: float, resolve: Resolve) -> Corpus:
    """The files of nanoGPT or of llm.c."""
    if len({file.dtype for file in files}) > 1:
        raise UserError(f"token files {path} differ in the type of their ids: name those of one kind")
    val = [file for file in files if "val" in file.path.name]
    train = [file for file in files if "val" not in file.path.name]
    if train and val:
        parts, split = (FileTokens(train), FileTokens(val)), "by file"
    else:
        n = sum(map(len, files))
        cut = int(train_fraction * n)
        parts, split = (FileTokens(files, 0, cut), FileTokens(files, cut, n)), "by position"
    found = read_meta(files[0].path.parent / META)
    tokenizer = resolve(found)
    counts = (sum(map(len, parts)), len(parts[1]), None) if found else (None, None, None)
    digest = _sampled_fingerprint([FileTokens([file]) for file in files], tokenizer)
    return Corpus(*parts, tokenizer, digest, split, *counts)


def _open(path: Path) -> TokenFile:
    with path.open("rb") as file:
        start = file.read(LLM_C_BYTES)
    if len(start) == LLM_C_BYTES:
        magic, version, n_tokens = np.frombuffer(start[:12], "<i4").tolist()
        if dtype := LLM_C.get((magic, version)):
            tokens = TokenFile(path, np.dtype(dtype), LLM_C_BYTES)
            if len(tokens) != n_tokens:
                raise UserError(
                    f"token file {path} has {len(tokens):,} ids, and its header says {n_tokens:,}: it was "
                    f"cut off or changed"
                )
            return tokens
        if magic in {known for known, _ in LLM_C}:
            raise UserError(f"token file {path} has version {version} of llm.c's header, which is not known")
    return TokenFile(path, np.dtype("<u2"))


class _PlainUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, strings and numbers: nothing that names code."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"it wants to run {module}.{name}")


def read_meta(path: Path) -> Tokenizer | None:
    """The tokenizer of nanoGPT's `meta.pkl`: one id for each character."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > MAX_HEADER:
            raise UserError(f"it has more than {MAX_HEADER:,} bytes")
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
        characters = [meta["itos"][i] for i in range(len(meta["itos"]))]
        if any(len(character) != 1 for character in characters):
            raise UserError("its tokens are not single characters")
        return CharTokenizer.from_dict({"characters": "".join(characters)})
    except (UserError, OSError, KeyError, TypeError, ValueError, pickle.UnpicklingError, EOFError, IndexError,
            AttributeError, ImportError, OverflowError, MemoryError) as error:  # fmt: skip
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} cannot be used ({' '.join(what.split())[:200]}): get another copy, or, "
            f"to train on a text, remove it and name the tokenizer with --config.data.tokenizer"
        ) from None


def _open_prepared(folder: Path, train_fraction: float | None, resolve: Resolve) -> Corpus:
    path = folder / HEADER
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError("too large")
        header = json.loads(path.read_text(encoding="utf-8"))
        if header["format"] != FORMAT:
            raise UserError(f"{path} is of format {header['format']!r}, and this version reads {FORMAT}")
        was = header["source"]["train_fraction"]
        if train_fraction is not None and train_fraction != was:
            raise UserError(
                f"{folder} was prepared with train_fraction = {was}, not {train_fraction}: give "
                f"--config.data.train_fraction={was}, or prepare the text again"
            )
        dtype = np.dtype({"uint8": "u1", "uint16": "<u2", "uint32": "<u4"}[header["dtype"]])
        tokenizer = tokenizer_from_json(header["tokenizer"])
        parts = []
        check_within([folder / TRAIN, folder / VAL], folder)
        for name in (TRAIN, VAL):
            tokens, said = TokenFile(folder / name, dtype), header["files"][name]
            if len(tokens) != said["tokens"]:
                raise UserError(
                    f"token file {tokens.path} has {len(tokens):,} ids, and {HEADER} says "
                    f"{said['tokens']:,}: it was cut off or changed; prepare it again"
                )
            if tokens.changed != said["changed"] and checksum(tokens.path) != said["sha256"]:
                raise UserError(f"token file {tokens.path} was changed after `prepare`: prepare it again")
            parts.append(FileTokens([tokens]))
        train, val = header["files"][TRAIN], header["files"][VAL]
        counts = (train["characters"] + val["characters"], val["characters"], val["bytes"])
        return Corpus(parts[0], parts[1], resolve(tokenizer), header["fingerprint"], header["split"], *counts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): prepare it again") from None


def verify(folder: Path) -> None:
    """Compare every byte of a prepared folder with its checksums, and every id with the vocabulary.

    Raises:
        UserError: it was changed or is not complete.
    """
    corpus = _open_prepared(folder, None, known)
    files = json.loads((folder / HEADER).read_text(encoding="utf-8"))["files"]
    for name, tokens in ((TRAIN, corpus.train), (VAL, corpus.val)):
        if checksum(folder / name) != files[name]["sha256"]:
            raise UserError(f"token file {folder / name} was changed after `prepare`: prepare it again")
        _check_ids(tokens, corpus.tokenizer.vocab_size)


def known(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of files that say it."""
    assert tokenizer is not None
    return tokenizer


def _check_ids(tokens: Any, vocab_size: int, max_bytes: float = math.inf) -> None:
    """Raise `UserError` if an id lies outside of the vocabulary; of many ids, when they are read."""
    tokens.vocab_size = vocab_size
    try:
        for _ids in tokens.blocks() if tokens.nbytes <= max_bytes else ():
            pass
    except TokenFileError as error:
        raise UserError(str(error)) from None


def _sampled_fingerprint(parts: Sequence[FileTokens], tokenizer: Tokenizer) -> str:
    """A fingerprint of files without checksums: sizes, pieces at equal distances, the tokenizer."""
    digest = hashlib.sha256(tokenizer.to_json().encode())
    for tokens in parts:
        digest.update(str(len(tokens)).encode())
        for first in range(0, len(tokens), max(len(tokens) // SAMPLED, PIECE)):
            digest.update(tokens[first : first + PIECE].tobytes())
    return digest.hexdigest()


def checksum(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
