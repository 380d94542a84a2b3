"""Our tokenizers as a tokenizer.json: what the library makes of it, and what is recognized as ours again."""

import json

import numpy as np
import pytest
import tokenizers
from test_tokenizers import NASTY, no_text, train_byte_level, train_fallback

from gpt_jax.data.bpe import BYTES, END, BPETokenizer, ByteTokenizer
from gpt_jax.data.hugging_face import HuggingFaceTokenizer
from gpt_jax.data.tokenizer_json import is_same, recognize, to_tokenizer_json
from gpt_jax.data.tokenizers import CharTokenizer, make_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.paths import ARTIFACTS
from gpt_jax.paths import ROOT as REPOSITORY

KINDS = ("char", "byte", "bpe")
SHAKESPEARE = (ARTIFACTS / "input.txt").read_text(encoding="utf-8")[:60_000]
TEXT = (REPOSITORY / "tests" / "data" / "text.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def all_kinds():
    specs = {"bpe": "bpe:600"}
    return {
        kind: make_tokenizer(specs.get(kind, kind), lambda: iter([TEXT, SHAKESPEARE, NASTY]))
        for kind in KINDS
    }


@pytest.fixture(params=KINDS)
def ours(request, all_kinds):
    return all_kinds[request.param]


def read(file):
    """What the library makes of a file, with ordinary text only, as `transformers` can be told to."""
    tokenizer = tokenizers.Tokenizer.from_str(file)
    tokenizer.encode_special_tokens = True
    return tokenizer


def as_hugging_face(file):
    return HuggingFaceTokenizer.from_dict({"file": json.loads(file)})


def random_texts(tokenizer):
    """Of any characters, or of those in a vocabulary of characters, with many spaces and digits."""
    rng = np.random.default_rng(0)
    for n in range(1, 80):
        if isinstance(tokenizer, CharTokenizer):
            yield "".join(rng.choice([*tokenizer.characters], n))
        else:
            code_points = rng.integers(0, rng.choice([0x80, 0x800, 0x3000, 0x110000]), n)
            known = [chr(i) for i in code_points if not 0xD800 <= i < 0xE000]
            yield "".join(rng.choice([*known, " ", "\n", "'s", "7"], n))


def assert_same(ours, theirs, texts):
    for text in texts:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    for size in (1, 2, 300):
        ids = np.random.default_rng(size).integers(0, ours.vocab_size, size)
        assert theirs.decode(ids.tolist(), skip_special_tokens=False) == ours.decode(ids)


def test_the_library_makes_the_same_ids_and_texts(ours):
    file = to_tokenizer_json(ours)
    theirs = read(file)
    assert theirs.get_vocab_size() == ours.vocab_size
    assert_same(ours, theirs, [TEXT, SHAKESPEARE, NASTY, "", "\n", "\r\n", " ", END, *random_texts(ours)])
    ends = {i: token.content for i, token in theirs.get_added_tokens_decoder().items() if token.special}
    assert ends == ({} if ours.end_id is None else {ours.end_id: END})


def test_a_file_alone_takes_the_name_of_the_end_for_the_end(all_kinds):
    """Why the docstring says what to set."""
    for kind in ("byte", "bpe"):
        theirs = tokenizers.Tokenizer.from_str(to_tokenizer_json(all_kinds[kind]))
        assert theirs.encode(f"a{END}").ids == [*all_kinds[kind].encode("a"), all_kinds[kind].end_id]


def test_an_unknown_character_is_an_error_there_too(all_kinds):
    file = to_tokenizer_json(CharTokenizer.from_text("abc\n<unk>"))
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        read(file).encode("abcd")
    with pytest.raises(UserError, match="cannot encode the text: WordLevel error: Missing"):
        as_hugging_face(file).encode("ab日")


def test_there_and_back_is_the_same_tokenizer(ours):
    file = to_tokenizer_json(ours)
    theirs = as_hugging_face(file)
    assert to_tokenizer_json(theirs) == theirs.file and json.loads(theirs.file) == json.loads(file)
    assert (theirs.vocab_size, theirs.end_id) == (ours.vocab_size, ours.end_id)
    again = recognize(theirs)
    assert again == ours and type(again) is type(ours) and again.to_json() == ours.to_json()
    assert recognize(ours) is ours and is_same(theirs, ours) and is_same(ours, theirs)


def test_tokenizers_of_other_content_are_not_the_same(all_kinds):
    others = [*all_kinds.values(), make_tokenizer("bpe:257", lambda: iter(["a"])), CharTokenizer("ab")]
    for i, a in enumerate(others):
        for j, b in enumerate(others):
            assert is_same(as_hugging_face(to_tokenizer_json(a)), b) == (i == j)


def test_a_file_of_another_kind_is_itself():
    for made in (train_byte_level(SHAKESPEARE, 300), train_fallback(SHAKESPEARE)):  # without an end; Llama's
        theirs = as_hugging_face(made.to_str())
        assert recognize(theirs) is theirs and is_same(theirs, theirs)
        assert to_tokenizer_json(theirs) == theirs.file
        assert read(theirs.file).encode("To be").ids == theirs.encode("To be").tolist()
    broken = HuggingFaceTokenizer.from_dict({"file": {"model": {"type": "words"}}})
    with pytest.raises(UserError, match="the library tokenizers cannot read"):
        recognize(broken)


def as_transformers_has_it(file):
    """The form of the file of GPT-2 itself: written by an old version, with settings that change no ids."""
    model = {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "vocab": file["model"]["vocab"],
        "merges": [" ".join(pair) for pair in file["model"]["merges"]],
    }  # fmt: skip
    level = {"type": "ByteLevel", "trim_offsets": True}
    return file | {
        "added_tokens": [{**file["added_tokens"][0], "normalized": True}],
        "pre_tokenizer": level | {"add_prefix_space": False},
        "post_processor": level | {"add_prefix_space": True, "trim_offsets": False},
        "decoder": level | {"add_prefix_space": True},
        "model": model,
    }


def test_settings_that_change_nothing_do_not_matter(all_kinds):
    file = as_transformers_has_it(json.loads(to_tokenizer_json(all_kinds["bpe"])))
    assert recognize(as_hugging_face(json.dumps(file))) == all_kinds["bpe"]


def level(**options):
    return lambda file: file["pre_tokenizer"].update(options)


def in_model(**options):
    return lambda file: file["model"].update(options)


def swap_ids(file):
    ids = file["model"]["vocab"]
    first, second = [*ids][-3:-1]
    ids[first], ids[second] = ids[second], ids[first]


def rename_the_end(file):
    file["added_tokens"][0]["content"] = "<|end_of_text|>"
    file["model"]["vocab"]["<|end_of_text|>"] = file["model"]["vocab"].pop(END)


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "kind, change",
    [
        ("bpe", level(add_prefix_space=True)),
        ("byte", level(add_prefix_space=True)),
        ("bpe", level(use_regex=False)),
        ("bpe", lambda file: file.update(normalizer={"type": "NFC"})),
        ("char", lambda file: file.update(normalizer={"type": "Lowercase"})),
        ("bpe", lambda file: file.update(pre_tokenizer={"type": "Whitespace"})),
        ("char", lambda file: file.update(pre_tokenizer=SPLIT | {"pattern": {"Regex": "."}})),
        ("char", lambda file: file.update(pre_tokenizer=None)),
        ("char", lambda file: file.update(decoder=None)),
        ("bpe", lambda file: file.update(decoder={"type": "Fuse"})),
        ("bpe", lambda file: file.update(added_tokens=[])),
        ("char", lambda file: file.update(added_tokens=[SPECIAL])),
        ("bpe", lambda file: file["added_tokens"].append(SPECIAL)),
        ("bpe", rename_the_end),
        ("bpe", swap_ids),
        ("char", swap_ids),
        ("bpe", lambda file: file["model"]["merges"].pop()),
        ("bpe", lambda file: file["model"]["merges"].reverse()),
        ("bpe", in_model(dropout=0.5)),
        ("bpe", in_model(end_of_word_suffix="</w>")),
        ("char", in_model(unk_token="a")),
    ],
)
def test_a_file_that_differs_slightly_is_itself(all_kinds, kind, change):
    file = json.loads(to_tokenizer_json(all_kinds[kind]))
    change(file)
    theirs = as_hugging_face(json.dumps(file))
    assert recognize(theirs) is theirs and not is_same(theirs, all_kinds[kind])


SPECIAL = {
    "id": 1000, "content": "<pad>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
    "normalized": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "tokens",
    [(b"abc",), (b"abc", b"ab"), (b"ab", b"cd", b"abcde"), tuple(END[:i].encode() for i in range(2, 14))],
)
def test_a_token_that_joins_no_two_earlier_ones_is_named(tokens):
    """BPE makes it of no pair; or a text could become what is already the name of the end of text."""
    with pytest.raises(UserError, match=r"^tokenizer: BPE does not make token 2\d\d of two others: '"):
        to_tokenizer_json(BPETokenizer((*BYTES, *tokens)))


def test_pairs_of_any_vocabulary(all_kinds):
    """tiktoken joins by the ids of tokens, the library by the pairs that were found."""
    rng, n_tried = np.random.default_rng(0), 0
    texts = ["".join(rng.choice([*"aab "], 40)) for _ in range(50)]
    for _ in range(150):
        tokens = [b"a", b"b"]
        for _ in range(6):
            first, second = (tokens[i] for i in rng.integers(0, len(tokens), 2))
            tokens += [first + second] if first + second not in tokens else []
        ours = BPETokenizer((*BYTES, *tokens[2:]))
        try:
            theirs = read(to_tokenizer_json(ours))
        except UserError:
            continue
        n_tried += 1
        assert_same(ours, theirs, texts)
    assert n_tried > 50


@pytest.mark.slow
def test_gpt2s_own_file_is_gpt2(gpt2_folder):
    ours = make_tokenizer(str(gpt2_folder), no_text)
    file = to_tokenizer_json(ours)
    assert_same(ours, read(file), [TEXT, SHAKESPEARE, NASTY, END, *random_texts(ours)])
    assert recognize(as_hugging_face(file)).to_json() == ours.to_json()
    # Its ids and pairs, from the two files that OpenAI published.
    lines = (gpt2_folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    ids = json.loads((gpt2_folder / "encoder.json").read_text(encoding="utf-8"))
    made = json.loads(file)
    made["model"] |= {"vocab": ids, "merges": [line.split(" ") for line in lines]}
    theirs = as_hugging_face(json.dumps(as_transformers_has_it(made)))
    assert recognize(theirs).name == "gpt2" and is_same(ours, theirs)
    assert not is_same(ByteTokenizer(), theirs)
