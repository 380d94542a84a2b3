"""Documents: the texts of files, compressed or not, read block by block in constant memory."""

import codecs
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError

BLOCK = 2**20  # bytes that are read and decoded at a time
MAX_LINE = 2**26  # bytes of one line of a .jsonl file
# What decompresses to more than this many times its size, after the first 64 MiB, is taken for a bomb.
MAX_EXPANSION, UNCHECKED = 200, 2**26
COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # how such files begin
GIVE_A_PATH = "give the path of a UTF-8 text file"

Progress = Callable[[int, int], None]  # called with the bytes that are done and all bytes


def no_progress(_done: int, _total: int) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True)
class Documents:
    """The texts of some files, in order. Each file is one document; of a .jsonl file, each line is one."""

    files: tuple[Path, ...]
    size: int  # bytes on the disk

    def blocks(self, progress: Progress = no_progress) -> Iterator[str | None]:
        """The text in blocks, without byte order marks; None ends each document.

        Raises:
            UserError: a file cannot be read, or is not what its name says.
        """
        done = 0
        for path in self.files:
            with readable(path), path.open("rb", buffering=0) as file:
                stream, name = _decompressed(path, file)
                parts = _json_lines(path, stream) if name.endswith(".jsonl") else _decode(path, stream)
                for block in parts:
                    yield block
                    progress(min(done + file.tell(), self.size), self.size)
                done += file.tell()

    @property
    def starts_with_bom(self) -> bool:
        """Whether the first file begins with a byte order mark, which is no part of the text."""
        with readable(self.files[0]), self.files[0].open("rb") as file:
            return file.read(3) == codecs.BOM_UTF8

    def identity(self) -> list[Any]:
        """What changes when a file is replaced: path, size, and time of the last change of each."""
        found = [(path, path.stat()) for path in self.files]
        return [[str(path.absolute()), stat.st_size, stat.st_mtime_ns] for path, stat in found]


def find_documents(path: Path, advice: str = GIVE_A_PATH) -> Documents:
    """The files of a path: one file, all files in a folder, or those that match a pattern, in sorted order.

    Hidden files in a folder do not count. Raises `UserError`: there is none, or one cannot be read as a text.
    Where the path does not exist, the error ends in `advice`.
    """
    with readable(path):
        files = _find_files(path, advice)
        return Documents(tuple(files), sum(file.stat().st_size for file in files))


def _find_files(path: Path, advice: str) -> list[Path]:
    if path.is_dir():
        files = _walk(path)
        check_within(files, path)
        if not files:
            raise UserError(f"text folder {path} has no files: {advice}")
    elif path.exists() or not glob.has_magic(str(path)):
        files = [path]
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise UserError(f"no text file matches {path}: {advice}")
    for file in files:
        if not file.is_file():  # reading a pipe would wait forever
            reason = "is not a regular file" if file.exists() else "does not exist"
            raise UserError(f"text file {file} {reason}: {advice}")
        if file.suffix == ".bin":
            raise UserError(f"text file {file} holds tokens: name texts only, or only files of tokens")
    return files


def _walk(path: Path) -> list[Path]:
    """All files in a folder and its subfolders except hidden ones, in sorted order."""
    files: list[Path] = []

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(path, onerror=fail):
        check_within([Path(folder, name) for name in folders], path)
        folders[:] = [name for name in folders if not name.startswith(".")]  # where `walk` goes next
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files)


def check_within(files: Iterable[Path], folder: Path) -> None:
    """Raise `UserError` if one of the files of a folder is a link that leaves it."""
    for file in files:
        if file.is_symlink() and not _real(file).is_relative_to(_real(folder)):
            raise UserError(f"file {file} is a link that leaves {folder}: name its target instead")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `resolve` fails on a link to itself


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into one line that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"text file {path} is damaged or cut off: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"text file {path} cannot be read: {error.strerror}") from None


def _decompressed(path: Path, file: io.FileIO) -> tuple[io.RawIOBase, str]:
    """The bytes of a file, and its name in lower case without the suffix of the compression."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return _Bounded(path, file, gzip.open(file)), name[: -len(".gz")]
    if name.endswith(".zst"):
        return _Bounded(path, file, _zstd(path).open(file)), name[: -len(".zst")]
    return file, name


def _zstd(path: Path) -> Any:
    with suppress(ImportError):
        from compression import zstd  # Python 3.14

        return zstd
    try:
        from backports import zstd as backport
    except ImportError:
        raise UserError(
            f"text file {path} needs a package that is missing: pip install -e '.[zstd]'"
        ) from None
    return backport


class _Bounded(io.RawIOBase):
    """Decompressed bytes, as long as they are not out of proportion to the file's."""

    def __init__(self, path: Path, file: io.FileIO, stream: Any):
        self.path, self.file, self.stream, self.done = path, file, stream, 0

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        try:
            n = int(self.stream.readinto(buffer))
        except Exception as error:  # the libraries raise many types
            raise EOFError(error) from None
        self.done += n
        if self.done > max(UNCHECKED, MAX_EXPANSION * self.file.tell()):
            raise UserError(
                f"text file {self.path} expands to more than {MAX_EXPANSION} times its size: it may be a "
                f"decompression bomb; decompress it first if it is a text"
            )
        return n


def _decode(path: Path, stream: io.RawIOBase) -> Iterator[str | None]:
    """The text of UTF-8 bytes in blocks, then None."""
    decoder = codecs.getincrementaldecoder("utf-8")()  # keeps the half of a character at the end of a block
    end, is_first = 0, True
    while True:
        data = stream.read(BLOCK) or b""
        if suffix := next((s for magic, s in COMPRESSED.items() if not end and data.startswith(magic)), None):
            raise UserError(f"text file {path} is compressed: let its name end in {suffix}, or decompress it")
        end += len(data)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            found = (
                f"byte {error.object[error.start]:#04x} at offset {end - len(error.object) + error.start:,}"
            )
            raise UserError(f"text file {path} is not UTF-8: {found}; save it as UTF-8") from None
        if text:
            yield text.removeprefix("\ufeff") if is_first else text
            is_first = False
        if not data:
            yield None
            return


def _json_lines(path: Path, stream: io.RawIOBase) -> Iterator[str | None]:
    """The field "text" of each line in blocks, then None."""
    lines = io.BufferedReader(stream, BLOCK)
    try:
        for number in count(1):
            line = lines.readline(MAX_LINE + 1)
            if not line:
                return
            if line.strip():
                yield from _text_of(line, f"text file {path}, line {number:,}")
    finally:
        lines.detach()  # else it would close the stream


def _text_of(line: bytes, where: str) -> Iterator[str | None]:
    if len(line) > MAX_LINE:
        raise UserError(f"{where} is longer than {MAX_LINE:,} bytes: split it")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {' '.join(str(error).split())[:200]}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} has no text: each line must be an object with a field "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has a lone surrogate at character {error.start:,}: remove it") from None
    for begin in range(0, len(text), BLOCK):
        yield text[begin : begin + BLOCK]
    yield None
