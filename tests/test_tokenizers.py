"""Tokenizers of `data.tokenizer`: text to ids and back, in pieces too, from JSON, and what cannot be used."""

import json
import shutil
import socket
import sys
from hashlib import sha1

import numpy as np
import pytest
import tiktoken
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gpt_jax.data import bpe as bpe_module
from gpt_jax.data import tokenizers as tokenizers_module
from gpt_jax.data.bpe import BPETokenizer
from gpt_jax.data.tokenizers import make_tokenizer, tokenizer_from_json
from gpt_jax.errors import UserError
from gpt_jax.paths import ARTIFACTS

KINDS = ("char", "byte", "bpe", "byte_level", "fallback")
GPT2_KINDS = ("bpe", "byte_level")  # which have GPT-2's pattern
NASTY = (
    "naïve — 日本語、テスト。\r\n\U0001f600👩\u200d👩\u200d👧\tzero\x00 e\u0301 \u2028\x85\xa0\x1c "
    "<|endoftext|></s> \n\n  two  spaces 12345 6 they'll don't 'S\n \n\n\n   x\n日本\n語 1\u0663²½ "
    "ـ\u0300\ufffd\u200b\ufeff end  "
)
NOTHING = np.array([], np.int32)


@pytest.fixture(scope="module")
def text():
    return (ARTIFACTS / "input.txt").read_text(encoding="utf-8")[:100_000]


def no_text():
    """For tokenizers that do not read it."""
    raise AssertionError


def train_byte_level(text, vocab_size, **options):
    """What `tokenizers` makes of a text with GPT-2's pattern."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False, **options
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def train_fallback(text):
    """As Llama has it: spaces as part of words, and a token for each byte of what is unknown."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(text[:20_000].splitlines(), trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = values["added_tokens"][: len(special)]
    return tokenizers.Tokenizer.from_str(json.dumps(values))


@pytest.fixture(scope="module")
def files(text, tmp_path_factory):
    """A tokenizer.json of each kind."""
    folder = tmp_path_factory.mktemp("files")
    byte_level = train_byte_level(text, 600, special_tokens=["<|endoftext|>"])
    # What a file may also ask for, and a text for training must not have.
    byte_level.enable_truncation(10)
    byte_level.enable_padding(length=50)
    for name, tokenizer in (("byte_level", byte_level), ("fallback", train_fallback(text))):
        tokenizer.save(str(folder / f"{name}.json"))
    return folder


@pytest.fixture(scope="module")
def all_kinds(text, files):
    specs = {"bpe": "bpe:600"} | {name: str(files / f"{name}.json") for name in ("byte_level", "fallback")}
    blocks = [text[:60_000], text[60_000:] + NASTY]
    return {kind: make_tokenizer(specs.get(kind, kind), lambda: iter(blocks)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def tokenizer(request, all_kinds):
    return all_kinds[request.param]


def pieces(tokenizer, ids, size):
    """The text of ids, decoded in pieces of a size."""
    decode = tokenizer.decoder()
    parts = [decode(ids[i : i + size]) for i in range(0, len(ids), size)]
    return "".join(parts) + decode(NOTHING, final=True)


def test_there_and_back(tokenizer, text):
    for words in (text, NASTY, "", "\x00", "\n", " a", "a ", "<|endoftext|>", "</s>"):
        ids = tokenizer.encode(words)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert tokenizer.decode(ids) == words
        assert tokenizer.end_id not in ids  # whatever the text says
        (again,) = tokenizer.encode_batch([words])
        np.testing.assert_array_equal(again, ids)
    many = [NASTY, "", *text[:3000].split(" ")]  # more than there are cores
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(many)] == many
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("size", [1, 2, 7])
def test_pieces_of_a_text_are_the_text(tokenizer, text, size):
    words = text[:2000] + NASTY + "日本\U0001f600" * 5
    assert pieces(tokenizer, tokenizer.encode(words), size) == words


def test_half_a_character_is_held_back(tokenizer):
    if tokenizer.name == "char":
        return  # has no halves
    ids, decode = tokenizer.encode("日"), tokenizer.decoder()
    assert len(ids) > 2
    for i in ids[:-1]:
        assert decode(np.array([i])).strip() == ""
    assert decode(ids[-1:]).strip() == "日"
    decode(ids[:-1])
    assert set(decode(NOTHING, final=True).strip()) == {"\ufffd"}
    assert decode(tokenizer.encode("a")).strip() == "a"  # the next text
    assert decode(NOTHING) == ""


@pytest.mark.parametrize("kind", ["byte", "bpe", "byte_level"])
def test_bytes_that_are_not_utf_8_are_replaced(all_kinds, kind):
    tokenizer, rng = all_kinds[kind], np.random.default_rng(0)
    for _ in range(100):
        ids = rng.integers(0, tokenizer.vocab_size, 40)
        shown = tokenizer.decode(ids)
        assert pieces(tokenizer, ids, 1) == pieces(tokenizer, ids, 3) == shown
        if kind != "byte_level":
            tokens = [*tokenizer.tokens, b"<|endoftext|>"]
            assert shown == b"".join(tokens[i] for i in ids).decode("utf-8", "replace")
    for wrong in (b"\xff", b"\xe2\x82a", b"\x80" * 9, b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\xaf"):
        ids = np.frombuffer(wrong, np.uint8)
        assert pieces(all_kinds["byte"], ids, 1) == wrong.decode("utf-8", "replace")


def test_random_ids_of_any_kind_are_text(tokenizer):
    ids = np.random.default_rng(1).integers(0, tokenizer.vocab_size, 2000)
    tokenizer.decode(ids).encode()
    pieces(tokenizer, ids, 1).encode()


def test_json_there_and_back(tokenizer):
    stored = tokenizer.to_json()
    again = tokenizer_from_json(json.loads(json.dumps(stored)))
    assert again == tokenizer and again.to_json() == stored
    for name in ("name", "vocab_size", "start_id", "end_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    np.testing.assert_array_equal(again.encode(NASTY), tokenizer.encode(NASTY))


def test_sizes_names_and_the_end_of_a_text(all_kinds):
    found = {kind: (t.name, t.vocab_size, t.end_id, t.start_id) for kind, t in all_kinds.items()}
    size = all_kinds["char"].vocab_size
    assert found == {
        "char": ("char", size, None, all_kinds["char"].characters.index("\n")),
        "byte": ("byte", 257, 256, 256),
        "bpe": ("bpe:600", 600, 599, 599),
        "byte_level": ("hf:600", 600, 0, 0),
        "fallback": ("hf:500", 500, 2, 2),
    }
    for kind, shown in (("byte", "<|endoftext|>"), ("bpe", "<|endoftext|>"), ("fallback", "</s>")):
        assert all_kinds[kind].decode(np.array([all_kinds[kind].end_id])) == shown


def test_bytes_are_the_ids(all_kinds):
    assert all_kinds["byte"].encode("é\x00").tolist() == [0xC3, 0xA9, 0]


def test_trained_ids_are_those_of_the_library(text):
    """tiktoken joins by the ids of tokens, `tokenizers` by a list of pairs."""
    ours, theirs = make_tokenizer("bpe:2000", lambda: iter([text])), train_byte_level(text, 1999)
    for words in (text, NASTY * 3):
        assert ours.encode(words).tolist() == theirs.encode(words).ids
    assert make_tokenizer("bpe:2000", lambda: iter([text])) == ours


def test_ids_of_a_file_are_those_of_the_library(all_kinds, files, text):
    theirs = tokenizers.Tokenizer.from_file(str(files / "byte_level.json"))
    theirs.no_truncation()
    theirs.no_padding()
    assert all_kinds["byte_level"].encode(text).tolist() == theirs.encode(text).ids


@pytest.mark.parametrize("model", ["unigram", "word_level"])
def test_no_text_is_a_special_token_that_is_in_the_vocabulary(tmp_path, model):
    """Unlike BPE, which would have to join it, these models find it there."""
    path, names = tmp_path / "tokenizer.json", ["<unk>", "</s>", "<", "/s>", "▁", "a"]
    if model == "unigram":
        made = models.Unigram([(name, -float(i)) for i, name in enumerate(names)], unk_id=0)
    else:
        made = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(made)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))
    ours = make_tokenizer(str(path), no_text)
    assert ours.end_id == 1 and ours.encode("</s>").tolist() == [2, 3]


def test_a_file_without_an_end_starts_with_a_line_feed(tmp_path):
    for names, start in (({"a": 0, "b": 1, "\n": 2}, 2), ({"a": 0, "b": 1}, 0)):
        tokenizers.Tokenizer(models.BPE(names, [])).save(str(tmp_path / "tokenizer.json"))
        ours = make_tokenizer(str(tmp_path), no_text)  # the folder
        assert (ours.end_id, ours.start_id, ours.vocab_size) == (None, start, len(names))


def encode_in_blocks(tokenizer, text, size):
    """Ids of a text that is read in blocks, as a long file is: what is after a cut waits for the next."""
    ids, rest, n_cuts = [], "", 0
    for begin in range(0, len(text), size):
        rest += text[begin : begin + size]
        cut = tokenizer.cut(rest)
        ids.append(tokenizer.encode(rest[:cut]))
        rest, n_cuts = rest[cut:], n_cuts + (cut > 0)
    return np.concatenate([*ids, tokenizer.encode(rest)]), n_cuts


@pytest.mark.parametrize("kind", ["char", "byte", *GPT2_KINDS])
def test_a_text_can_be_cut_without_changing_its_ids(all_kinds, text, kind):
    rng, tokenizer = np.random.default_rng(0), all_kinds[kind]
    parts = [*NASTY, *" \n" * 20, "  ", "\n\n", " '", "'ll", "don't", "12", *text[:3000].split(" ")]
    for _ in range(60):
        words = "".join(rng.choice(parts, 200))
        ids, n_cuts = encode_in_blocks(tokenizer, words, int(rng.integers(1, 60)))
        np.testing.assert_array_equal(ids, tokenizer.encode(words))
        assert n_cuts > 2
    ids, _ = encode_in_blocks(tokenizer, text, 997)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize(
    "words, cut",
    [("", 0), (" ", 0), ("ab", 0), ("a b c", 3), ("a  b", 0), ("a b ", 1), (" a b\n", 2), ("日\n本 \n", 1),
     ("a b\nc", 1), ("a\nb  c", 1), ("a\n b", 0), ("a\u00a0 b", 0)],
)  # fmt: skip
def test_a_cut_is_before_a_single_space(all_kinds, words, cut):
    assert all_kinds["bpe"].cut(words) == all_kinds["byte_level"].cut(words) == cut
    assert all_kinds["char"].cut(words) == all_kinds["byte"].cut(words) == len(words)


def test_wrong_ids_are_named(tokenizer):
    size = tokenizer.vocab_size
    for wrong in (-1, size, 2**40):
        for decode in (tokenizer.decode, tokenizer.decoder()):
            with pytest.raises(UserError, match=rf"^token id {wrong} must be an integer in \[0, {size}\)$"):
                decode(np.array([0, wrong]))
    with pytest.raises(UserError, match=r"token id 0\.5 must be an integer"):
        tokenizer.decode(np.array([0.5]))
    assert tokenizer.decode([]) == ""


def test_a_lone_surrogate_is_named(tokenizer):
    message = (
        "unknown characters" if tokenizer.name == "char" else r"character 2 of the text, '\\udc80', is a"
    )
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(UserError, match=message):
            encode("ab\udc80")


def test_white_space_without_end_is_one_line(all_kinds):
    """The regular expression of tiktoken runs out of stack."""
    with pytest.raises(
        UserError, match=r"^1,000,000 characters of white space at character 2: shorten them$"
    ):
        all_kinds["bpe"].encode("ab" + " " * 10**6 + "c")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "'' cannot be used: there is no file tokenizer.json; give char, byte"),
        ("words", r"'words' cannot be used: there is no file words; give char, byte, gpt2, bpe:N \(such as"),
        ("bpe:", r"'bpe:': the number of tokens must lie in \[257, 1048576\]"),
        ("bpe:256", "must lie in"),
        ("bpe:1048577", "must lie in"),
        ("bpe:8_192", "must lie in"),
        ("bpe:" + "9" * 5000, "must lie in"),
        ("bpe:2000", "bpe:2000: the text is too short for more than bpe:2[0-9][0-9]$"),
        ("a" * 300, "File name too long|there is no file"),
        ("broken.json", "'broken.json' cannot be used: it is not JSON; give char"),
        ("latin.json", "'latin.json' cannot be used: it is not JSON"),
        ("list.json", "'list.json' cannot be used: .* must be the JSON object of a tokenizer.json"),
        ("other.json", "'other.json' cannot be used: the library tokenizers cannot read"),
        ("empty.json", "'empty.json' cannot be used: the tokenizer.json has no tokens"),
        ("unknown.json", "'unknown.json' cannot be used: the tokenizer.json cannot encode the text: WordL"),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_is_one_line(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    contents = {"broken": b"{", "latin": b"\xe9", "list": b"[]", "other": b'{"added_tokens": []}'}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_bytes(content)
    tokenizers.Tokenizer(models.BPE()).save("empty.json")
    tokenizers.Tokenizer(models.WordLevel({"b": 0}, unk_token="?")).save("unknown.json")
    with pytest.raises(UserError, match=message) as error:
        make_tokenizer(spec, lambda: iter(["to be or not to be"]))
    assert "\n" not in str(error.value)


def test_what_a_checkpoint_cannot_hold_is_one_line(monkeypatch, text):
    monkeypatch.setattr(tokenizers_module, "MAX_JSON", 1000)
    message = r"'bpe:300' takes 1,\d{3} bytes, and a checkpoint has room for 1,000: use a smaller vocabulary"
    with pytest.raises(UserError, match=message):
        make_tokenizer("bpe:300", lambda: iter([text]))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"type": "words"}, "type 'words' is not known; known: char, byte, bpe, hugging_face"),
        ({"type": "bpe"}, "in base64"),
        ({"type": "bpe", "tokens": [1]}, "in base64"),
        ({"type": "bpe", "tokens": "QQ== !"}, "in base64"),
        ({"type": "bpe", "tokens": "é"}, "in base64"),
        ({"type": "bpe", "tokens": "QQ=="}, "the 256 bytes and then others"),
        ({"type": "hugging_face"}, "must be the JSON object of a tokenizer.json"),
    ],
)  # fmt: skip
def test_json_that_is_no_tokenizer_is_one_line(values, message):
    with pytest.raises(UserError, match=message):
        tokenizer_from_json(json.dumps(values))


@pytest.mark.parametrize("more", [b"", b"ab"])
def test_tokens_are_distinct_and_not_empty(more):
    tokens = (*bpe_module.BYTES, b"ab")
    assert BPETokenizer(tokens).encode("ab").tolist() == [256]
    with pytest.raises(UserError, match="each once"):
        BPETokenizer((*tokens, more))


@pytest.fixture
def two_files(tmp_path, text):
    """encoder.json and vocab.bpe of a small vocabulary."""
    train_byte_level(text, 400).model.save(str(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    return tmp_path


def test_gpt2s_two_files_by_any_name(two_files, text):
    wanted = make_tokenizer("bpe:401", lambda: iter([text]))
    path = two_files / "encoder.json"
    assert make_tokenizer(str(two_files), no_text) == make_tokenizer(str(path), no_text) == wanted
    ids = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    (two_files / "vocab.json").write_text(json.dumps(ids | {"<|endoftext|>": 400}), encoding="utf-8")
    with pytest.raises(UserError, match=r"there is no file .*tokenizer\.json; give"):
        make_tokenizer(str(two_files), no_text)
    (two_files / "vocab.bpe").rename(two_files / "merges.txt")
    assert make_tokenizer(str(two_files), no_text) == wanted
    assert make_tokenizer(str(two_files / "merges.txt"), no_text) == wanted
    train_byte_level(text, 300).save(str(two_files / "tokenizer.json"))
    assert make_tokenizer(str(two_files), no_text).name == "hf:300"  # which has all rules


@pytest.mark.parametrize("change", ["order", "hole", "special", "pair", "unknown", "json", "none"])
def test_files_that_are_not_in_order_are_one_line(two_files, change):
    path, merges = two_files / "encoder.json", two_files / "vocab.bpe"
    ids, lines = json.loads(path.read_text(encoding="utf-8")), merges.read_text(encoding="utf-8").split("\n")
    first, second = [name for name, i in ids.items() if i in (300, 301)]
    ids |= {"order": {first: ids[second], second: ids[first]}, "hole": {second: 1000}}.get(change, {})
    ids |= {"special": {"<pad>": 400}, "unknown": {"日": 400}}.get(change, {})
    path.write_text("{" if change == "json" else json.dumps(ids), encoding="utf-8")
    merges.write_text("\n".join(lines[:-2] if change == "pair" else lines), encoding="utf-8")
    if change == "none":
        merges.unlink()
        merges.mkdir()
    with pytest.raises(UserError) as error:
        make_tokenizer(str(path), no_text)
    message, name = str(error.value), str(path)
    assert name in message and "\n" not in message
    assert message.endswith("or the path of a tokenizer.json")


def test_a_missing_library_is_named_and_decoding_needs_none(all_kinds, files, monkeypatch, text):
    stored = {kind: all_kinds[kind].to_json() for kind in GPT2_KINDS}
    ids = all_kinds["bpe"].encode("to be")
    for name in ("tiktoken", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    bpe = tokenizer_from_json(stored["bpe"])
    assert (bpe.vocab_size, bpe.decode(ids)) == (600, "to be")
    message = r"this tokenizer needs {}, which is missing: pip install -e '.\[bpe\]'"
    with pytest.raises(UserError, match=message.format("tiktoken")):
        bpe.encode("a")
    for spec in ("gpt2", "bpe:300", str(files / "byte_level.json")):
        with pytest.raises(UserError, match=message.format("(tiktoken|tokenizers)")):
            make_tokenizer(spec, lambda: iter([text]))
    with pytest.raises(UserError, match=message.format("tokenizers")):
        _ = tokenizer_from_json(stored["byte_level"]).vocab_size
    assert make_tokenizer("byte", no_text).vocab_size == 257


@pytest.mark.parametrize("network", ["none", "hangs"])
def test_gpt2_without_network_is_one_line(monkeypatch, tmp_path, network):
    """Through a proxy that does not exist, or does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(bpe_module, "MAX_SECONDS", 60 if network == "none" else 0.2)
        if network == "none":
            server.close()
        with pytest.raises(UserError, match=r"cannot be downloaded \(\w*Error\): give the path of a folder"):
            make_tokenizer("gpt2", no_text)


@pytest.mark.slow
def test_gpt2_is_gpt2(gpt2_folder, text, tmp_path, monkeypatch):
    """Its ids are those of tiktoken and of `tokenizers`."""
    ours = make_tokenizer(str(gpt2_folder), no_text)
    assert (ours.name, ours.vocab_size, ours.end_id, ours.start_id) == ("gpt2", 50257, 50256, 50256)
    assert len(ours.to_json()) < 2**20 and tokenizer_from_json(ours.to_json()) == ours

    # tiktoken's cache, as a download leaves it.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(gpt2_folder / name, tmp_path / sha1(url.encode()).hexdigest())
    assert make_tokenizer("gpt2", no_text) == ours
    files = [str(gpt2_folder / name) for name in ("encoder.json", "vocab.bpe")]
    theirs = tokenizers.Tokenizer(models.BPE.from_file(*files))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for words in (text, NASTY, NASTY * 50):
        ids = ours.encode(words)
        assert (
            ids.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(words) == theirs.encode(words).ids
        )
        assert ours.decode(ids) == pieces(ours, ids, 1) == words
        cut, _ = encode_in_blocks(ours, words, 97)
        np.testing.assert_array_equal(cut, ids)
