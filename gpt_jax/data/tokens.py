"""Tokens: an array, or ids on the disk that are read in pieces and never as a whole.

Files are read with `read`, not mapped into memory: where a mapped file is cut, the process gets a SIGBUS. The
system caches what is read in both cases.
"""

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gpt_jax.data.tokenizer import Tokenizer
from gpt_jax.errors import RunError, UserError

MAX_READ = 2**24  # bytes; Linux reads no more than 2 GiB at once


class TokenFileError(RunError):
    """A token file cannot be used any more."""


@dataclass(eq=False)
class TokenFile:
    """The ids in one file."""

    path: Path
    dtype: np.dtype
    start: int = 0  # bytes before the first id
    size: int = field(init=False)  # of the file
    changed: int = field(init=False)  # when it was changed last, in nanoseconds

    def __post_init__(self) -> None:
        if not self.path.is_file():  # opening a pipe would wait forever
            raise UserError(f"token file {self.path} is not a regular file: prepare it again, or restore it")
        # Not a file object: Python warns of those that nobody closes.
        self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._descriptor)
        stat = os.fstat(self._descriptor)
        self.size, self.changed = stat.st_size, stat.st_mtime_ns
        if (self.size - self.start) % self.dtype.itemsize:
            raise UserError(f"token file {self.path}, {self.size:,} bytes, ends within an id: it was cut off")

    def __len__(self) -> int:
        return (self.size - self.start) // self.dtype.itemsize

    def read(self, first: int, n: int) -> np.ndarray:
        """The ids [n] from number `first` on; raises `TokenFileError` if they are gone."""
        data, n_bytes = bytearray(), n * self.dtype.itemsize
        with self._lock:
            os.lseek(self._descriptor, self.start + first * self.dtype.itemsize, os.SEEK_SET)
            while part := os.read(self._descriptor, min(n_bytes - len(data), MAX_READ)):
                data += part
        if len(data) < n_bytes:
            raise TokenFileError(f"token file {self.path} was cut off while in use; restore it and resume")
        return np.frombuffer(data, self.dtype)

    def check(self) -> None:
        """Raise `TokenFileError` if the file was changed, cut or removed since it was opened."""
        try:
            stat = self.path.stat()
            same = (stat.st_size, stat.st_mtime_ns) == (self.size, self.changed)
        except OSError:
            same = False
        if not same:
            raise TokenFileError(f"token file {self.path} was changed while in use; restore it and resume")


class FileTokens:
    """The ids of several files, one after another, or of a part of them: like an array [N] in slices.

    Attributes:
        vocab_size: V, with which ids are compared when they are read; None: they are not.
    """

    vocab_size: int | None = None

    def __init__(self, files: Sequence[TokenFile], first: int = 0, last: int | None = None):
        self.files = files
        self.ends = np.cumsum([len(file) for file in files])
        self.first, self.last = first, int(self.ends[-1]) if last is None else last
        self.dtype = files[0].dtype

    def __len__(self) -> int:
        return self.last - self.first

    @property
    def shape(self) -> tuple[int]:
        """(N,)."""
        return (len(self),)

    @property
    def nbytes(self) -> int:
        """Bytes of the ids."""
        return len(self) * self.dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        first, last, _ = part.indices(len(self))
        return self.read(first, max(last - first, 0))

    def _locate(self, number: int) -> tuple[TokenFile, int]:
        """The file that has the id of this number, and its number within the file."""
        i = int(np.searchsorted(self.ends, self.first + number, side="right"))
        return self.files[i], self.first + number - (int(self.ends[i]) - len(self.files[i]))

    def read(self, first: int, n: int) -> np.ndarray:
        """The ids [n] from number `first` on.

        Raises:
            TokenFileError: a file was cut, or has an id that is not in the vocabulary.
        """
        pieces, place = [np.empty(0, self.dtype)], first
        while place < first + n:
            file, within = self._locate(place)
            pieces.append(file.read(within, min(first + n - place, len(file) - within)))
            place += len(pieces[-1])
        ids_N = pieces[1] if len(pieces) == 2 else np.concatenate(pieces)
        if self.vocab_size is not None and ids_N.max(initial=0) >= self.vocab_size:
            wrong = int(np.argmax(ids_N >= self.vocab_size))
            file, within = self._locate(first + wrong)
            found = (
                f"token {within:,} has the id {ids_N[wrong]:,}, and the tokenizer has {self.vocab_size:,} ids"
            )
            advice = "name the tokenizer that made the data, with --config.data.tokenizer"
            raise TokenFileError(f"token file {file.path}: {found}: {advice}")
        return ids_N

    def check(self) -> None:
        """Raise `TokenFileError` if a file was changed, cut or removed since it was opened."""
        for file in self.files:
            file.check()

    def blocks(self, size: int = 2**22) -> Iterator[np.ndarray]:
        """All ids in blocks."""
        return (self[first : first + size] for first in range(0, len(self), size))


Tokens = np.ndarray | FileTokens


@dataclass(frozen=True)
class Corpus:
    """A text, tokenized and split."""

    train: Tokens  # ids [N] in the smallest unsigned integer type that holds the vocabulary
    val: Tokens
    tokenizer: Tokenizer
    fingerprint: str  # of the text and the tokenizer; a run resumes only on the same data
    split: str  # "by position", "by document" or "by file"
    n_characters: int | None  # of the whole text; None: not known
    n_val_characters: int | None
    n_val_bytes: int | None
