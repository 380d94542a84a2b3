"""From documents to ids, in constant memory, and the command `prepare`'s folder of token files.

The documents are read twice: to count and to find the vocabulary (`scan`), then to encode (`encode`).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from gpt_jax.data.documents import Documents, Progress, no_progress
from gpt_jax.data.token_files import FORMAT, HEADER, STATE, TRAIN, VAL, checksum
from gpt_jax.data.tokenizers import CharTokenizer, Tokenizer, make_tokenizer, tokenizer_from_json
from gpt_jax.errors import RunError, UserError
from gpt_jax.files import write_durably
from gpt_jax.version import __version__

LOCK = "lock"
BETWEEN = b"\xff"  # documents, where their digest is computed: no text has this byte
PIECE = 2**18  # characters that are encoded at once
MAX_PIECE = 2**24  # of a text that can be cut nowhere
PIECES_AT_ONCE = 16  # shared by all cores
SAVE_EVERY = 2**26  # characters
SAMPLE = 2**27  # characters of the training split that a tokenizer is trained on, at most


@dataclass(frozen=True)
class Scan:
    """What the first reading of the documents found."""

    n_characters: int
    n_train: int  # characters before the position of the split
    split: str  # "by position", or "by document": at the first document that begins after it
    digest: str  # SHA-256 of the text; of a single file without compression, of its bytes
    characters: str  # the distinct ones, sorted


def scan(documents: Documents, train_fraction: float, progress: Progress = no_progress) -> Scan:
    """Read all documents: count, collect the characters, compute the digest."""
    digest, characters, n, last_start, start = hashlib.sha256(), set[str](), 0, 0, 0
    n_ends = 0  # of documents since the last text
    if documents.starts_with_bom:
        digest.update(b"\xef\xbb\xbf")
    for block in documents.blocks(progress):
        if block is None:
            last_start = start if n > start else last_start  # an empty document is in neither split
            start = n
            n_ends += 1
        else:
            digest.update(BETWEEN * n_ends + block.encode())
            n_ends = 0
            characters.update(block)
            n += len(block)
    digest.update(BETWEEN * (n_ends - 1))
    n_train = int(train_fraction * n)
    split = "by document" if last_start >= max(n_train, 1) else "by position"
    return Scan(n, n_train, split, digest.hexdigest(), "".join(sorted(characters)))


@dataclass(frozen=True)
class Piece:
    """A part of a document, to be encoded at once."""

    text: str
    is_train: bool
    ends_document: bool


def encode(
    documents: Documents, found: Scan, tokenizer: Tokenizer, progress: Progress = no_progress, start: int = 0
) -> Iterator[tuple[Piece, np.ndarray]]:
    """The pieces of the documents with their ids, int32 [n], from piece number `start` on.

    An end-of-text token follows each document, where the tokenizer has one.

    Raises:
        UserError: the documents are not those of the scan, or have characters that no token stands for.
    """
    pieces = islice(_pieces(documents, found, tokenizer, progress), start, None)
    while group := list(islice(pieces, PIECES_AT_ONCE)):
        for piece, ids in zip(group, tokenizer.encode_batch([piece.text for piece in group]), strict=True):
            end = [tokenizer.end_id] if piece.ends_document and tokenizer.end_id is not None else []
            yield piece, np.concatenate([ids, np.array(end, np.int32)]) if end else ids


def _pieces(documents: Documents, found: Scan, tokenizer: Tokenizer, progress: Progress) -> Iterator[Piece]:
    """The documents in pieces that can be encoded one by one: the same ones in every reading."""
    text = ""
    for block, is_train, ends_document in _split(documents, found, progress):
        text += block or ""
        while (cut := _cut(text, tokenizer, block is None)) or block is None:
            is_end = block is None and cut == len(text)
            yield Piece(text[:cut], is_train, is_end and ends_document)
            text = text[cut:]
            if is_end:
                break


def _split(documents: Documents, found: Scan, progress: Progress) -> Iterator[tuple[str | None, bool, bool]]:
    """The blocks of the documents, whether they belong to the training split, and whether a document ends.

    A block is None where a document ends or is cut by the split.
    """
    n, is_train = 0, found.n_train > 0
    for block in documents.blocks(progress):
        if block is None:
            yield None, is_train, True
            is_train &= n < found.n_train
            continue
        n += len(block)
        if n > found.n_characters:
            break
        if is_train and n > found.n_train and found.split == "by position":
            cut = len(block) - (n - found.n_train)
            yield block[:cut], True, False
            yield None, True, False
            block, is_train = block[cut:], False
        yield block, is_train, False
    if n != found.n_characters:
        raise UserError(f"text file {documents.files[0]} was changed while it was read: start again")


def _cut(text: str, tokenizer: Tokenizer, is_whole: bool) -> int:
    """How many characters of a text to encode next; 0: wait for more of it, unless it is whole."""
    for size in (PIECE, MAX_PIECE):
        if len(text) <= size and is_whole:
            return len(text)
        if len(text) < size:
            return 0
        if cut := tokenizer.cut(text[:size]):
            return cut
    return MAX_PIECE  # no place is safe


def sample_of(documents: Documents, found: Scan) -> Iterator[str]:
    """The beginning of the training split in blocks, for a tokenizer to be trained on."""
    left = min(found.n_train, SAMPLE)
    for block in documents.blocks():
        if left <= 0:
            return
        if block:
            yield block[:left]
            left -= len(block)


def make_tokenizer_of(documents: Documents, found: Scan, spec: str) -> Tokenizer:
    """The tokenizer that the setting `data.tokenizer` names, "" for characters."""
    if spec in ("", "char"):
        return CharTokenizer(found.characters)
    return make_tokenizer(spec, partial(sample_of, documents, found))


def prepare(
    documents: Documents,
    spec: str,
    folder: Path,
    train_fraction: float,
    progress: Progress = no_progress,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write the ids of documents to a folder of token files, or go on where a killed call ended.

    `tokenizer` is the one that `spec` made when training began; None: make it.

    Raises:
        UserError: the documents cannot be read or encoded, or the folder holds something else.
        RunError: the folder cannot be written.
    """
    files_digest = hashlib.sha256(json.dumps(documents.identity()).encode()).hexdigest()
    made_by = identity(spec, tokenizer)
    source = {"files": files_digest, "tokenizer": made_by, "train_fraction": train_fraction}
    if folder.exists():
        _check_folder(folder)
        if _is_done(folder, source):
            return
    state = _read(folder / STATE)
    if state and state.get("source") != source:
        raise UserError(f"out = {folder} holds an unfinished corpus of another source: name a new folder")
    if not _has_files_of(state, folder):
        found = scan(documents, train_fraction, _half(progress, 0))
        if found.n_characters == 0:
            raise UserError(f"text file {documents.files[0]} is empty: there is nothing to prepare")
        tokenizer = tokenizer or make_tokenizer_of(documents, found, spec)
        files = {name: {"tokens": 0, "characters": 0, "bytes": 0} for name in (TRAIN, VAL)}
        state = {"source": source, "scan": asdict(found), "tokenizer": tokenizer.to_json(), "pieces": 0,
                 "files": files}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)  # nothing is written before
    with _locked(folder / LOCK):
        if _is_done(folder, source):  # by another process, meanwhile
            return
        try:
            write_durably(folder / STATE, json.dumps(state))
            (folder / HEADER).unlink(missing_ok=True)
            _write(documents, state, folder, _half(progress, 1))
            (folder / STATE).unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"out = {folder} cannot be written: {error.strerror}; the same command continues"
            ) from None


def identity(spec: str, tokenizer: Tokenizer | None = None) -> str:
    """What changes when the tokenizer of a setting `data.tokenizer` does; `tokenizer`: see `prepare`."""
    if spec in ("", "char", "byte", "gpt2") or spec.startswith("bpe:"):
        return spec
    tokenizer = tokenizer or make_tokenizer(spec, lambda: iter(()))
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def _check_folder(folder: Path) -> None:
    """Raise `UserError` if a folder holds files that no `prepare` wrote."""
    if not folder.is_dir():
        raise UserError(f"out = {folder} is a file: name a folder")
    names = {path.name for path in folder.iterdir()}
    ours = {HEADER, TRAIN, VAL, STATE, LOCK} if names & {HEADER, STATE} else {LOCK}
    if others := sorted(names - ours - {f"{HEADER}.tmp", f"{STATE}.tmp"}):
        raise UserError(f"out = {folder} holds other files, such as {others[0]}: name a new folder")


def _has_files_of(state: dict[str, Any], folder: Path) -> bool:
    """Whether the token files have at least the ids that an unfinished `prepare` wrote."""
    if not state:
        return False
    size = id_type(tokenizer_from_json(state["tokenizer"])).itemsize
    files = [(folder / name, said["tokens"]) for name, said in state["files"].items() if said["tokens"]]
    return all(file.is_file() and file.stat().st_size >= size * n_tokens for file, n_tokens in files)


def _is_done(folder: Path, source: dict[str, Any]) -> bool:
    """Whether the folder has all token files of a source; a `UserError` if they are those of another."""
    header = _read(folder / HEADER)
    if not header:
        return False
    if header.get("source") != source:
        raise UserError(f"out = {folder} holds another prepared corpus: name a new folder")
    try:
        size = np.dtype(header["dtype"]).itemsize
        files = [(folder / name, size * said["tokens"]) for name, said in header["files"].items()]
        return all(file.is_file() and file.stat().st_size == n_bytes for file, n_bytes in files)
    except (KeyError, TypeError, AttributeError):  # it is damaged
        return False


def _write(documents: Documents, state: dict[str, Any], folder: Path, progress: Progress) -> None:
    """Encode what is left of the documents, and write the header at the end."""
    tokenizer, found, files = tokenizer_from_json(state["tokenizer"]), Scan(**state["scan"]), state["files"]
    dtype = id_type(tokenizer)
    if state["pieces"] == 0:
        for name in (TRAIN, VAL):
            (folder / name).unlink(missing_ok=True)
    opened = {name: (folder / name).open("ab") for name in (TRAIN, VAL)}
    with opened[TRAIN], opened[VAL]:
        for name, file in opened.items():
            file.truncate(files[name]["tokens"] * dtype.itemsize)
        saved = 0
        for piece, ids in encode(documents, found, tokenizer, progress, state["pieces"]):
            name = TRAIN if piece.is_train else VAL
            opened[name].write(ids.astype(dtype).tobytes())
            for unit, n in (
                ("tokens", len(ids)), ("characters", len(piece.text)), ("bytes", len(piece.text.encode()))
            ):  # fmt: skip
                files[name][unit] += n
            state["pieces"] += 1
            saved += len(piece.text)
            if saved >= SAVE_EVERY:
                _flush(opened.values())
                write_durably(folder / STATE, json.dumps(state))
                saved = 0
        _flush(opened.values())
    for name in opened:
        files[name] |= {"sha256": checksum(folder / name), "changed": (folder / name).stat().st_mtime_ns}
    header = {
        "format": FORMAT,
        "gpt_jax": __version__,
        "dtype": dtype.name,
        "split": found.split,
        "fingerprint": fingerprint(found.digest, tokenizer),
        "files": files,
        "source": state["source"],
        "tokenizer": state["tokenizer"],
    }
    write_durably(folder / HEADER, json.dumps(header, indent=1) + "\n")


def id_type(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned integer type that holds the vocabulary."""
    return np.dtype(np.min_scalar_type(tokenizer.vocab_size - 1)).newbyteorder("<")


def fingerprint(digest: str, tokenizer: Tokenizer) -> str:
    """What a run compares when it resumes: of a text's digest and the tokenizer."""
    return hashlib.sha256((digest + tokenizer.to_json()).encode()).hexdigest()


def _flush(files: Iterable[BinaryIO]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise UserError(f"out = {path.parent} is being written by another process: wait for it") from None


def _half(progress: Progress, number: int) -> Progress:
    """The progress of the first or the second reading, 0 or 1."""
    return lambda done, total: progress((number * total + done) // 2, total)
