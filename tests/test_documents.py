"""Documents: folders, patterns, compressed files, JSON lines, and what is wrong with them."""

import gzip
import json
import os
import tracemalloc

import numpy as np
import pytest

from gpt_jax.data.bpe import ByteTokenizer
from gpt_jax.data.corpus import encode_file, load_corpus
from gpt_jax.data.documents import BLOCK, MAX_EXPANSION, find_documents
from gpt_jax.data.prepare import scan
from gpt_jax.data.token_files import find_token_files
from gpt_jax.errors import UserError

zstd = pytest.importorskip("backports.zstd")
TEXTS = ["To be, or not to be.\n", "née — 日本\U0001f600\r\n", "", "zero\x00byte"]


def texts_of(path):
    """The documents of a path as strings."""
    texts, parts = [], []
    for block in find_documents(path).blocks():
        if block is None:
            texts.append("".join(parts))
            parts = []
        else:
            parts.append(block)
    assert not parts
    return texts


def write(path, text):
    """A file of one document, or of one for each line, compressed as its name says."""
    data = text.encode()
    data = gzip.compress(data) if path.suffix == ".gz" else data
    data = zstd.compress(data) if path.suffix == ".zst" else data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def lines(texts):
    return "\n\n".join(json.dumps({"id": 1, "text": text}) for text in texts)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_file_is_one_document_and_of_json_lines_each_line_is_one(tmp_path, suffix):
    long = "many blocks \U0001f600\n" * (BLOCK // 8)
    for text in (*TEXTS, "\ufeff" + long):
        write(tmp_path / f"a.txt{suffix}", text)
        assert texts_of(tmp_path / f"a.txt{suffix}") == [text.removeprefix("\ufeff")]
    write(tmp_path / f"a.jsonl{suffix}", lines([*TEXTS, long]))
    assert texts_of(tmp_path / f"a.jsonl{suffix}") == [*TEXTS, long]


def test_folders_and_patterns_are_read_in_sorted_order(tmp_path):
    for name in ("b/1.txt", "a.txt", "b.txt", "c.md", ".hidden.txt", ".git/config", "b/.x"):
        write(tmp_path / name, name)
    assert texts_of(tmp_path) == ["a.txt", "b/1.txt", "b.txt", "c.md"]
    assert texts_of(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert texts_of(tmp_path / "**" / "*.txt") == ["a.txt", "b/1.txt", "b.txt"]
    write(tmp_path / "[1].txt", "a name like a pattern")
    assert texts_of(tmp_path / "[1].txt") == ["a name like a pattern"]


def test_documents_are_not_cut_where_one_begins_after_the_position(tmp_path):
    write(tmp_path / "many.jsonl", lines(["ab" * 50, "ba" * 45, "abab", "bb" * 8]))
    corpus = load_corpus(tmp_path / "many.jsonl", 8, 0.91)
    assert (len(corpus.train), len(corpus.val), corpus.split) == (194, 16, "by document")
    write(tmp_path / "few.jsonl", lines(["ab" * 50, "ba" * 45, "abba" * 5]))
    corpus = load_corpus(tmp_path / "few.jsonl", 8, 0.9)
    assert (len(corpus.train), len(corpus.val), corpus.split) == (190, 20, "by document")
    corpus = load_corpus(tmp_path / "few.jsonl", 8, 0.95)  # within the last document
    assert (len(corpus.train), len(corpus.val), corpus.split) == (199, 11, "by position")


def test_empty_documents_are_in_no_split(tmp_path):
    for name, text in (("a.txt", "a" * 300), ("z.txt", "")):
        (tmp_path / name).write_text(text)
    corpus = load_corpus(tmp_path, 8, 0.9)
    assert (len(corpus.train), len(corpus.val), corpus.split) == (270, 30, "by position")


def test_links_to_folders_and_to_themselves_are_one_line(tmp_path):
    for name in ("texts", "others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    link = tmp_path / "texts" / "link"
    link.symlink_to(tmp_path / "others")
    with pytest.raises(UserError, match=r"link is a link that leaves .*texts: name its target"):
        find_documents(tmp_path / "texts")
    link.unlink()
    link.symlink_to("link")
    with pytest.raises(UserError, match=r"text file .*link does not exist"):
        find_documents(tmp_path / "texts")


def test_hidden_folders_are_not_read(tmp_path):
    for name in (".git/config", "a/x.txt", "a/.b/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    assert [file.relative_to(tmp_path).as_posix() for file in find_documents(tmp_path).files] == ["a/x.txt"]


def test_all_documents_of_a_text_are_counted(tmp_path):
    """Of one without a training split, as bits per byte need them."""
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("é" * 50)
    ids, n_characters, n_bytes = encode_file(tmp_path, ByteTokenizer())
    assert (len(ids), n_characters, n_bytes) == (303, 150, 300)


def test_empty_documents_are_in_the_fingerprint(tmp_path):
    found = set()
    for n, texts in enumerate((["ab", "cd"], ["ab", "", "cd"], ["", "ab", "cd"], ["ab", "cd", ""])):
        file = tmp_path / f"{n}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found.add(scan(find_documents(file), 0.9).digest)
    assert len(found) == 4


def test_files_of_tokens_are_not_read_as_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    np.arange(4, dtype="<u2").tofile(tmp_path / "b.bin")
    with pytest.raises(UserError, match=r"b.bin holds tokens: name texts only"):
        find_documents(tmp_path)
    with pytest.raises(UserError, match=r"matches token files and others: name one kind, such as b.bin"):
        load_corpus(tmp_path / "*", 16, 0.9)
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.bin").rename(tmp_path / "sub" / "b.bin")
    assert find_token_files(tmp_path / "s*" / "b.bin") == [tmp_path / "sub" / "b.bin"]
    assert find_token_files(tmp_path / "**.txt") == []


def test_the_fingerprint_tells_where_documents_end(tmp_path):
    prints = set()
    for texts in (["abab" * 20, "ab" * 20], ["abab" * 21, "ab" * 18], ["ab" * 60]):
        write(tmp_path / "a.jsonl", lines(texts))
        prints.add(load_corpus(tmp_path / "a.jsonl", 4, 0.5).fingerprint)
        (tmp_path / "text.txt").write_text("".join(texts), encoding="utf-8")
    assert len(prints) == 3
    assert load_corpus(tmp_path / "text.txt", 4, 0.5).fingerprint in prints  # one document, however stored


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b'{"text": "ok"}\n{"txt": "no"}\n', r'line 2 has no text: .* a field "text"'),
        ("a.jsonl", b'{"text": 3}\n', "line 1 has no text"),
        ("a.jsonl", b"[1]\n", "line 1 has no text"),
        ("a.jsonl", b"{\n", "line 1 is not JSON: "),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON: "),
        ("a.jsonl", b'{"text": "caf\xe9"}', "line 1 is not JSON: .*utf-8"),
        ("a.jsonl", b'{"text": "a\\ud800b"}', "line 1 has a lone surrogate at character 1: remove it"),
        ("a.txt.gz", b"no gzip", "is damaged or cut off: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"abc" * 9999)[:-20], "is damaged or cut off"),
        ("a.txt.zst", b"no zstd", "is damaged or cut off"),
        ("a.txt.zst", zstd.compress(b"abc" * 9999)[:-5], "is damaged or cut off"),
        ("a.txt", gzip.compress(b"abc"), "is compressed: let its name end in .gz, or decompress it"),
        ("a.txt", b"\x28\xb5\x2f\xfd", "is compressed: let its name end in .zst"),
        ("a.txt", b"ab\xed\xa0\x80", "is not UTF-8: byte 0xed at offset 2"),  # a surrogate
    ],
    ids=range(14),  # gzip writes the time into its bytes
)
def test_damaged_files_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        texts_of(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("compressor", ["gzip", "zstd"])
def test_a_decompression_bomb_takes_neither_memory_nor_time(tmp_path, compressor):
    path = tmp_path / ("a.txt.gz" if compressor == "gzip" else "a.jsonl.zst")
    with gzip.open(path, "wb", 9) if compressor == "gzip" else zstd.open(path, "wb") as file:
        for _ in range(100):
            file.write(b"a" * 2**20)
    assert MAX_EXPANSION * path.stat().st_size < 100 * 2**20
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"decompression bomb|is longer than"):
            load_corpus(path, 8, 0.9)
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def test_links_that_leave_a_folder_and_pipes_are_not_followed(tmp_path):
    write(tmp_path / "texts" / "a.txt", "a")
    write(tmp_path / "secret.txt", "b")
    (tmp_path / "texts" / "inside.txt").symlink_to("a.txt")
    assert texts_of(tmp_path / "texts") == ["a", "a"]
    (tmp_path / "texts" / "outside.txt").symlink_to("../secret.txt")
    with pytest.raises(UserError, match=r"outside.txt is a link that leaves .*texts: name its target"):
        find_documents(tmp_path / "texts")
    (tmp_path / "texts" / "outside.txt").unlink()
    os.mkfifo(tmp_path / "texts" / "pipe")
    with pytest.raises(UserError, match="pipe is not a regular file"):
        find_documents(tmp_path / "texts")
    with pytest.raises(UserError, match=r"no text file matches .*\*.doc: give the path"):
        find_documents(tmp_path / "*.doc")


@pytest.mark.slow
def test_a_folder_of_100_000_files(tmp_path):
    for i in range(100_000):
        folder = tmp_path / "texts" / f"{i // 1000:02}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i % 1000:03}.txt").write_text(f"text {i}\n")
    tracemalloc.start()
    try:
        corpus = load_corpus(tmp_path / "texts", 8, 0.9)
        assert tracemalloc.get_traced_memory()[1] < 10**9
    finally:
        tracemalloc.stop()
    assert corpus.n_characters == sum(len(f"text {i}\n") for i in range(100_000))
    assert corpus.split == "by document"


def test_a_file_that_grows_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ab" * BLOCK)

    def grow(done, total):
        if done > total // 2:  # in the second reading
            with path.open("a") as file:
                file.write("ab")

    with pytest.raises(UserError, match=r"a.txt was changed while it was read: start again"):
        load_corpus(path, 8, 0.9, grow)
