"""Token files: their layouts, their errors, batches that are read from them, and `prepare`."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tokenizers import train_byte_level

import gpt_jax
from gpt_jax.commands import evaluate
from gpt_jax.commands import prepare as command
from gpt_jax.data import batches, corpus, prepare
from gpt_jax.data.batches import WindowReader, train_batch
from gpt_jax.data.corpus import load_corpus
from gpt_jax.data.documents import find_documents
from gpt_jax.data.token_files import verify
from gpt_jax.data.tokenizer_json import to_tokenizer_json
from gpt_jax.data.tokenizers import CharTokenizer
from gpt_jax.data.tokens import FileTokens, TokenFile, TokenFileError
from gpt_jax.errors import UserError
from gpt_jax.paths import ARTIFACTS
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.rng import BATCH_STREAM, stream
from gpt_jax.trainer.run import train
from gpt_jax.training import loop
from gpt_jax.training.loop import Callback

IDS = np.random.default_rng(0).integers(0, 65, 5000).astype("<u2")
FOX = "the quick brown fox jumps over the lazy dog\n"


def llm_c(ids, magic=20240520, version=1, says=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if says is None else says
    return header.tobytes() + ids.tobytes()


def nanogpt(folder, ids=IDS, meta=True):
    """As nanoGPT's prepare.py writes it."""
    folder.mkdir()
    ids[:4500].tofile(folder / "train.bin")
    ids[4500:].tofile(folder / "val.bin")
    if meta:
        characters = sorted(set((ARTIFACTS / "input.txt").read_text()))
        itos = dict(enumerate(characters))
        meta = {"vocab_size": 65, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def test_nanogpts_files_are_read_with_their_characters(tmp_path):
    data = load_corpus(nanogpt(tmp_path / "data"), 16, 0.9)
    np.testing.assert_array_equal(data.train[:], IDS[:4500])
    np.testing.assert_array_equal(data.val[10:30], IDS[4510:4530])
    assert data.tokenizer == CharTokenizer.from_text((ARTIFACTS / "input.txt").read_text())
    assert data.split == "by file" and data.n_val_characters == 500
    again = load_corpus(tmp_path / "data" / "train.bin", 16, 0.9)
    assert (len(again.train), len(again.val), again.split) == (4050, 450, "by position")
    assert again.fingerprint != data.fingerprint


@pytest.mark.parametrize("dtype, magic, version", [("<u2", 20240520, 1), ("<u4", 20240801, 7)])
def test_llm_cs_shards_are_one_corpus(tmp_path, dtype, magic, version):
    ids = IDS.astype(dtype)
    for i, part in enumerate(np.split(ids[:4500], 3)):
        (tmp_path / f"fineweb_train_{i:06}.bin").write_bytes(llm_c(part, magic, version))
    (tmp_path / "fineweb_val_000000.bin").write_bytes(llm_c(ids[4500:], magic, version))
    data = load_corpus(tmp_path, 16, 0.9, spec="byte")
    np.testing.assert_array_equal(data.train[:], ids[:4500])
    np.testing.assert_array_equal(data.train[1490:3010], ids[1490:3010])  # over two borders
    np.testing.assert_array_equal(data.val[:], ids[4500:])
    assert data.n_val_characters is None


def windows_of(reader, step, n_steps=1):
    return reader.read(step, n_steps)[:n_steps]


@pytest.mark.parametrize("n_tokens, batch_size", [(1000, 16), (100, 7), (26, 50), (9, 8)])
def test_batches_read_from_files_are_those_of_the_device(tmp_path, n_tokens, batch_size):
    """Also where a batch spans epochs, and where the steps of a call are not those that were read ahead."""
    ids, context, seed = np.arange(n_tokens).astype("<u2"), 8, 2**32 - 1
    for name, part in zip("abc", np.array_split(ids, 3), strict=True):
        part.tofile(tmp_path / f"{name}.bin")
    tokens = FileTokens([TokenFile(tmp_path / f"{name}.bin", np.dtype("<u2")) for name in "abc"])
    reader = WindowReader(tokens, batch_size, context, seed, 5)
    batch, key = jax.jit(train_batch, static_argnums=(3, 4)), stream(seed, BATCH_STREAM)
    for step, n_steps in ((0, 1), (1, 5), (6, 2), (8, 1), (40, 3)):
        windows = reader.read(step, n_steps)
        assert windows.shape == (5, batch_size, context + 1)
        for i in range(5):
            inputs, targets = batch(key, step + i, jnp.asarray(ids), batch_size, context)
            np.testing.assert_array_equal(windows[i, :, :-1], inputs)
            np.testing.assert_array_equal(windows[i, :, 1:], targets)


def test_positions_have_64_bits(tmp_path):
    """A file of 6 billion ids, with nothing but holes in it but for the last ones."""
    n, context = 6 * 10**9, 1000
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(2 * n)
        file.seek(2 * (n - 5 * 10**6))
        file.write(np.full(5 * 10**6, 7, "<u2").tobytes())
    tokens = FileTokens([TokenFile(tmp_path / "a.bin", np.dtype("<u2"))])
    assert len(tokens) == n and tokens[n - 3 :].tolist() == [7, 7, 7]
    reader, firsts, read = WindowReader(tokens, 4000, context, 0, 1), [], tokens.read
    tokens.read = lambda first, n: firsts.append(first) or read(first, n)
    windows = np.concatenate([reader.read(step, 1)[0] for step in range(4)])
    assert len(set(firsts[:16_000])) == 16_000 and min(firsts) < n // 1000 and max(firsts) > n - n // 1000
    assert {*windows.reshape(-1).tolist()} == {0, 7}


class Wicked:
    """What a pickle can do to whoever reads it."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('/tmp/run_by_pickle').touch()",))


@pytest.mark.parametrize(
    "meta, message",
    [
        (pickle.dumps(Wicked()), r"it wants to run builtins.exec"),
        (pickle.dumps({"itos": np.arange(3)}), r"it wants to run numpy"),
        (pickle.dumps({"vocab_size": 3}), "KeyError: 'itos'"),
        (pickle.dumps({"itos": {0: "b", 1: "a"}}), "must be a sorted string"),
        (pickle.dumps({"itos": {0: 1}}), "TypeError"),
        (pickle.dumps({"itos": {0: "ab", 1: "c"}}), "its tokens are not single characters"),
        (pickle.dumps([1]), "TypeError"),
        (b"garbage", "UnpicklingError"),
        (b"", "EOFError"),
    ],
)
def test_a_meta_pkl_runs_no_code(tmp_path, meta, message):
    (nanogpt(tmp_path / "data") / "meta.pkl").write_bytes(meta)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(tmp_path / "data", 16, 0.9)
    assert "\n" not in str(error.value) and "--config.data.tokenizer" in str(error.value)


@pytest.mark.parametrize(
    "content, spec, message",
    [
        (IDS.tobytes(), "", r"do not say which tokenizer made them: .* --config.data.tokenizer=gpt2"),
        (IDS.tobytes()[:-1], "byte", r"a.bin, 9,999 bytes, ends within an id: it was cut off"),
        (llm_c(IDS, says=5001), "byte", r"has 5,000 ids, and its header says 5,001: it was cut off"),
        (llm_c(IDS)[:-2], "byte", r"has 4,999 ids, and its header says 5,000"),
        (llm_c(IDS, says=-1), "byte", r"its header says -1"),
        (llm_c(IDS, version=3), "byte", r"version 3 of llm.c's header, which is not known"),
        (np.append(IDS, np.array([900, 901], "<u2")).tobytes(), "byte",
         r"a.bin: token 5,000 has the id 900, and the tokenizer has 257 ids: name the tokenizer"),
        (b"", "byte", "has 0 tokens: its training split of 0 tokens is shorter than one window"),
    ],
)  # fmt: skip
def test_token_files_that_lie_are_named(tmp_path, content, spec, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_corpus(tmp_path / "a.bin", 16, 0.9, spec=spec)


@pytest.fixture
def prepared(tmp_path):
    """A prepared folder of fox texts."""
    text = tmp_path / "fox.txt"
    text.write_text(FOX * 400)
    folder = tmp_path / "prepared"
    prepare.prepare(find_documents(text), "char", folder, 0.9)
    return folder


def test_a_prepared_text_is_the_text(prepared, tmp_path):
    there, direct = load_corpus(prepared, 16, 0.9), load_corpus(tmp_path / "fox.txt", 16, 0.9)
    np.testing.assert_array_equal(there.train[:], direct.train)
    np.testing.assert_array_equal(there.val[:], direct.val)
    for name in ("tokenizer", "fingerprint", "n_characters", "n_val_characters", "n_val_bytes", "split"):
        assert getattr(there, name) == getattr(direct, name)
    verify(prepared)
    shutil.copytree(prepared, tmp_path / "copy")  # another time of change: its checksums are compared
    assert load_corpus(tmp_path / "copy", 16, 0.9).fingerprint == direct.fingerprint


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[:-1], r"train.bin has 15,839 ids, and tokens.json says 15,840: it was cut off or"),
        (lambda data: data + b"a", r"train.bin has 15,841 ids"),
        (
            lambda data: data[:99] + b"\x01" + data[100:],
            r"train.bin was changed after `prepare`",
        ),
    ],
)
def test_a_folder_that_was_changed_is_noticed_at_the_start(prepared, change, message):
    file = prepared / "train.bin"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        load_corpus(prepared, 16, 0.9)
    with pytest.raises(UserError, match=message):
        verify(prepared)


@pytest.mark.parametrize("header", [b"", b"[]", b"{}", b'{"format": 1}', b"\xff", b"[" * 10**5])
def test_a_damaged_header_is_named(prepared, header):
    (prepared / "tokens.json").write_bytes(header)
    with pytest.raises(UserError, match=r"tokens.json is (damaged|of format)") as error:
        load_corpus(prepared, 16, 0.9)
    assert "\n" not in str(error.value)


def test_the_setting_must_be_the_tokenizer_of_the_data(prepared):
    load_corpus(prepared, 16, 0.9, spec="char")
    with pytest.raises(UserError, match=r"'byte' is not the tokenizer of .*, which is 'char': leave"):
        load_corpus(prepared, 16, 0.9, spec="byte")


def test_the_setting_may_be_a_tokenizer_json_of_the_same_content(prepared, tmp_path):
    tokenizer, path = load_corpus(prepared, 16, 0.9).tokenizer, tmp_path / "tokenizer.json"
    path.write_text(to_tokenizer_json(tokenizer), encoding="utf-8")
    assert load_corpus(prepared, 16, 0.9, spec=str(path)).tokenizer == tokenizer
    path.write_text(to_tokenizer_json(CharTokenizer("abc")), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"tokenizer.json' is not the tokenizer of .*, which is 'char': leave"
    ):
        load_corpus(prepared, 16, 0.9, spec=str(path))


def test_a_file_that_is_cut_or_changed_while_in_use_is_noticed_at_the_next_epoch(prepared):
    tokens = load_corpus(prepared, 16, 0.9).train
    reader, per_epoch = WindowReader(tokens, 10, 16, 0, 1), 15_840 // 16 - 1
    reader.read(0, 1)
    time.sleep(0.01)
    data = (prepared / "train.bin").read_bytes()
    (prepared / "train.bin").write_bytes(data)  # in place, with another time of change
    reader.read(50, 1)  # the same epoch
    with pytest.raises(TokenFileError, match=r"train.bin was changed while in use; restore it and resume"):
        reader.read(per_epoch // 10 + 1, 1)
    (prepared / "train.bin").write_bytes(data[:8000])
    reader = WindowReader(tokens, 200, 16, 0, 1)
    reader._epoch = 0
    with pytest.raises(TokenFileError, match=r"train.bin was cut off while in use; restore it and resume"):
        reader.read(0, 1)


def test_ids_of_a_large_file_are_checked_as_they_are_read(tmp_path):
    ids = IDS.copy()
    ids[1234] = 300
    ids.tofile(tmp_path / "a.bin")
    tokens = FileTokens([TokenFile(tmp_path / "a.bin", ids.dtype)])
    tokens.vocab_size = 257
    reader = WindowReader(tokens, 300, 16, 0, 1)
    with pytest.raises(TokenFileError, match=r"a.bin: token 1,234 has the id 300, and the tokenizer has 257"):
        reader.read(0, 1)


def test_prepare_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """At each piece, with the same files in the end."""
    for i in range(5):
        (tmp_path / "texts" / f"{i}").mkdir(parents=True)
        (tmp_path / "texts" / f"{i}" / "a.txt").write_text(FOX * (10 + i) + "é" * i)
    monkeypatch.setattr(prepare, "PIECE", 200)
    monkeypatch.setattr(prepare, "SAVE_EVERY", 300)
    documents, whole = find_documents(tmp_path / "texts"), tmp_path / "whole"
    prepare.prepare(documents, "byte", whole, 0.9)
    encode = prepare.encode
    for n in range(0, 13, 3):
        folder = tmp_path / f"after {n}"

        def failing(*arguments, n=n):
            for done, piece in enumerate(encode(*arguments)):
                if done == n:
                    raise KeyboardInterrupt
                yield piece

        with monkeypatch.context() as patch:
            patch.setattr(prepare, "encode", failing)
            with pytest.raises(KeyboardInterrupt):
                prepare.prepare(documents, "byte", folder, 0.9)
            with suppress(KeyboardInterrupt):
                prepare.prepare(documents, "byte", folder, 0.9)
        prepare.prepare(documents, "byte", folder, 0.9)
        for name in ("train.bin", "val.bin"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
        verify(folder)
        assert not (folder / prepare.STATE).exists()


def run_prepare(capsys, *arguments):
    command.main([*map(str, arguments)])
    return capsys.readouterr().out


def test_the_command_prepares_and_verifies(tmp_path, capsys):
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text(FOX * 400)
    shown = run_prepare(capsys, text, "--tokenizer", "byte", "--out", out)
    assert f"written    {out}: 15,840 training tokens, 1,761 validation tokens" in shown
    assert "tokenizer  byte, vocabulary of 257, split by position" in shown
    assert run_prepare(capsys, text, "--tokenizer", "byte", "--out", out) == shown  # again: nothing to do
    assert "every byte is as it was prepared" in run_prepare(capsys, out, "--verify")
    with pytest.raises(UserError, match="holds another prepared corpus: name a new folder"):
        run_prepare(capsys, text, "--tokenizer", "char", "--out", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(UserError, match="holds other files, such as notes: name a new folder"):
        run_prepare(capsys, text, "--out", tmp_path / "mine")
    for flags, message in ((["--out", out, "--train_fraction", "1"], "data.train_fraction = 1.0 must lie"),
                           ([], "--out is missing")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run_prepare(capsys, text, *flags)


def test_prepare_writes_a_damaged_folder_again(prepared, tmp_path):
    """Where a file is cut or missing; what has the right size is left to --verify."""
    documents, whole = find_documents(tmp_path / "fox.txt"), (prepared / "train.bin").read_bytes()
    for damage in (lambda file: file.write_bytes(whole[:-9]), lambda file: file.unlink()):
        damage(prepared / "train.bin")
        prepare.prepare(documents, "char", prepared, 0.9)
        verify(prepared)
        assert (prepared / "train.bin").read_bytes() == whole


def interrupted(tmp_path, monkeypatch, n_pieces):
    """A folder of an interrupted `prepare`, and what continues it."""
    (tmp_path / "b.txt").write_text(FOX * 400)
    monkeypatch.setattr(prepare, "PIECE", 1000)
    monkeypatch.setattr(prepare, "SAVE_EVERY", 1000)
    encode, folder = prepare.encode, tmp_path / "unfinished"
    arguments = find_documents(tmp_path / "b.txt"), "byte", folder, 0.9

    def failing(*arguments):
        yield from islice(encode(*arguments), n_pieces)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encode", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(*arguments)
    return folder, lambda: prepare.prepare(*arguments)


def test_ids_that_were_lost_are_encoded_again(tmp_path, monkeypatch):
    folder, again = interrupted(tmp_path, monkeypatch, 9)
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:3000])
    again()
    assert load_corpus(folder, 16, 0.9).train[:].tolist() == [*(FOX * 400).encode()][:15_840]


def test_an_unfinished_folder_is_no_corpus(tmp_path, monkeypatch):
    folder, again = interrupted(tmp_path, monkeypatch, 17)
    with pytest.raises(UserError, match="unfinished is not finished: run the same `prepare` again"):
        load_corpus(folder, 16, 0.9, spec="byte")
    with pytest.raises(UserError, match="holds an unfinished corpus of another source: name a new folder"):
        prepare.prepare(find_documents(tmp_path / "b.txt"), "char", folder, 0.9)
    again()
    (folder / "val.bin").unlink()
    with pytest.raises(UserError, match=r"unfinished lacks train.bin or val.bin: prepare it again"):
        load_corpus(folder, 16, 0.9)


def test_prepare_keeps_the_token_files_of_other_programs(tmp_path):
    folder = nanogpt(tmp_path / "data", meta=False)
    (tmp_path / "a.txt").write_text(FOX * 400)
    with pytest.raises(UserError, match=r"data holds other files, such as train.bin: name a new folder"):
        prepare.prepare(find_documents(tmp_path / "a.txt"), "char", folder, 0.9)
    assert (folder / "train.bin").read_bytes() == IDS[:4500].tobytes()


def test_the_split_of_a_prepared_folder_is_that_of_the_settings(prepared):
    with pytest.raises(UserError, match=r"was prepared with train_fraction = 0.9, not 0.5: give --config"):
        load_corpus(prepared, 16, 0.5)


def test_a_disk_that_is_full_is_one_line(tmp_path):
    """A limit on the size of files stands in for the disk."""
    (tmp_path / "a.txt").write_text(FOX * 400)
    command = f"ulimit -f 1; exec {sys.executable} -m gpt_jax prepare a.txt --tokenizer byte --out out"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr == "error: out = out cannot be written: File too large; the same command continues\n"


def test_prepare_refuses_to_write_into_its_texts(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(FOX)
    with pytest.raises(UserError, match=r"lies in the folder of texts .*: name a folder outside"):
        run_prepare(capsys, tmp_path, "--out", tmp_path / "x" / "out")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty.txt is empty: there is nothing to prepare"):
        run_prepare(capsys, tmp_path / "empty.txt", "--out", tmp_path / "out")
    with pytest.raises(UserError, match=r"a.txt is a file: name a folder"):
        run_prepare(capsys, tmp_path / "a.txt", "--out", tmp_path / "a.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "empty.txt"]


def test_prepare_knows_a_tokenizer_by_its_content(tmp_path):
    """Not by the name of its file."""
    (tmp_path / "a.txt").write_text(FOX * 400)
    spec = str(tmp_path / "tokenizer.json")
    for text in (FOX, FOX.upper()):
        train_byte_level(text, 270).save(spec)
        if text == FOX:
            prepare.prepare(find_documents(tmp_path / "a.txt"), spec, tmp_path / "out", 0.9)
    with pytest.raises(UserError, match="holds another prepared corpus: name a new folder"):
        prepare.prepare(find_documents(tmp_path / "a.txt"), spec, tmp_path / "out", 0.9)


@pytest.mark.parametrize("data, tokenizer", [(b"caf\xe9", "char"), (b"ab", "bpe:5"), (b"ab", "nosuch")])
def test_prepare_writes_nothing_before_the_text_was_read(tmp_path, data, tokenizer):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError):
        command.main([str(tmp_path / "a.txt"), "--tokenizer", tokenizer, "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_command_takes_several_files(tmp_path, capsys):
    """Each is a document, in the order they are named."""
    for name, text in (("b.txt", FOX * 30), ("a.txt", FOX.upper() * 5)):
        (tmp_path / name).write_text(text)
    run_prepare(capsys, tmp_path / "b.txt", tmp_path / "a.txt", "--tokenizer=byte", "--out", tmp_path / "out")
    data = load_corpus(tmp_path / "out", 16, 0.9)
    ids = np.concatenate([data.train[:], data.val[:]])
    assert data.tokenizer.decode(ids[ids != 256]) == FOX * 30 + FOX.upper() * 5
    assert (ids == 256).sum() == 2 and ids[len(FOX) * 30] == 256


@pytest.mark.parametrize("name", ["train.bin", "tokens.json", "meta.pkl"])
def test_a_pipe_among_token_files_is_not_waited_for(prepared, tmp_path, name):
    (prepared / name).unlink(missing_ok=True)
    os.mkfifo(prepared / name)
    with pytest.raises(UserError) if name != "meta.pkl" else nullcontext():
        load_corpus(prepared, 16, 0.9)


def test_a_large_text_is_prepared_once_in_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "IN_MEMORY", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "a.txt"
    text.write_text(FOX * 400)
    direct = load_corpus(text, 16, 0.9)
    assert isinstance(direct.train, FileTokens) and "tokenizing it once, into" in capsys.readouterr().out
    again = load_corpus(text, 16, 0.9)
    assert again.fingerprint == direct.fingerprint and capsys.readouterr().out == ""
    text.write_text(FOX * 401)
    assert load_corpus(text, 16, 0.9).fingerprint != direct.fingerprint


@pytest.fixture
def on_files(tiny_config, text_file, tmp_path):
    """Makes the settings of a run of seconds whose batches are read from a prepared folder."""
    prepare.prepare(find_documents(text_file), "char", tmp_path / "tokens", 0.9)

    def make(batches="host", **groups):
        return tiny_config(data={"path": str(tmp_path / "tokens"), "batches": batches}, **groups)

    return make


def losses_of(workdir):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["train_loss"], record.get("val_loss")) for record in records]


def test_training_from_files_has_the_bits_of_training_from_the_device(
    on_files, tiny_config, tiny_run, tmp_path
):
    assert train(on_files(), tmp_path / "host") == 0
    assert losses_of(tmp_path / "host") == losses_of(tiny_run)
    facts = json.loads((tmp_path / "host" / "run.json").read_text())
    assert (facts["batches"], facts["tokenizer"], facts["split"]) == ("host", "char", "by position")
    assert json.loads((tiny_run / "run.json").read_text())["batches"] == "device"


@pytest.mark.slow
def test_a_run_moves_from_a_text_to_its_files_and_back(on_files, tiny_config, tmp_path):
    constant = {"optimizer": {"schedule": "constant", "warmup_steps": 0}}
    assert train(tiny_config(**constant), tmp_path / "run") == 0
    for make, steps in ((tiny_config, 10), (on_files, 15), (tiny_config, 20)):
        assert train(make(train={"steps": steps}, **constant), tmp_path / "moving") == 0
    assert losses_of(tmp_path / "moving")[-1] == losses_of(tmp_path / "run")[-1]


@pytest.mark.slow
def test_files_feed_several_devices(on_files, tmp_path):
    eight = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
    for name in ("device", "host"):
        assert train(on_files(name, **eight), tmp_path / name) == 0
    np.testing.assert_allclose(
        losses_of(tmp_path / "host")[-1], losses_of(tmp_path / "device")[-1], rtol=1e-6
    )


def test_a_resumed_run_keeps_its_tokenizer(tiny_config, tiny_run):
    with pytest.raises(UserError, match=r"a run with data.tokenizer = 'char', not 'byte': keep it"):
        train(tiny_config(data={"tokenizer": "byte"}), tiny_run)


def test_a_run_on_one_file_is_evaluated(tiny_config, tmp_path, capsys):
    """On its validation split, which is the end of that file."""
    (tmp_path / "data").mkdir()
    IDS.tofile(tmp_path / "data" / "train.bin")
    settings = {"path": str(tmp_path / "data" / "train.bin"), "tokenizer": "byte"}
    assert train(tiny_config(data=settings), tmp_path / "run") == 0
    evaluate.main(["--workdir", str(tmp_path / "run")])
    assert "499 tokens predicted" in capsys.readouterr().out


def test_a_file_that_changes_during_a_run_ends_it_with_its_state_saved(on_files, tmp_path, monkeypatch):
    whole = (tmp_path / "tokens" / "train.bin").read_bytes()

    def cut(info):
        if info.step >= 7:
            (tmp_path / "tokens" / "train.bin").write_bytes(whole[:500])

    monkeypatch.setattr(loop, "SECONDS_PER_CALL", 0.0)  # one step for each call
    monkeypatch.setattr(batches, "READ_AT_ONCE", 1)
    with pytest.raises(
        TokenFileError, match=r"train.bin was (cut off|changed) while in use; restore it and resume"
    ):
        train(on_files(), tmp_path / "run", callbacks=[Callback(cut)])
    assert 7 <= gpt_jax.load(tmp_path / "run", "last").step < 20
    with pytest.raises(UserError, match=r"train.bin has 500 ids, and tokens.json says 2,700"):
        train(on_files(), tmp_path / "run")
    (tmp_path / "tokens" / "train.bin").write_bytes(whole)
    assert train(on_files(), tmp_path / "run") == 0


KILLED = """
import random, signal, sys, time
from pathlib import Path
from gpt_jax.data import prepare
from gpt_jax.data.documents import find_documents
prepare.PIECE, prepare.SAVE_EVERY = 2000, 10_000
prepare.prepare(find_documents(Path(sys.argv[1])), "byte", Path(sys.argv[2]), 0.9)
"""


@pytest.mark.slow
def test_twenty_kills_of_prepare_lose_nothing(tmp_path):
    text, rng = tmp_path / "text.txt", np.random.default_rng(0)
    text.write_text(FOX * 20_000)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def run(folder, seconds=None):
        process = subprocess.Popen([sys.executable, "-c", KILLED, text, folder], env=environment)
        if seconds is not None:
            time.sleep(seconds)
            process.kill()
        return process.wait(timeout=300)

    begun = time.monotonic()
    assert run(tmp_path / "whole") == 0
    seconds, kills = time.monotonic() - begun, 0
    for folder in map("killed {}".format, range(100)):
        while kills < 20 and run(tmp_path / folder, seconds * rng.uniform(0.2, 1)) == -signal.SIGKILL:
            kills += 1
        assert run(tmp_path / folder) == 0
        verify(tmp_path / folder)
        for name in ("train.bin", "val.bin"):
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        if kills == 20:
            return
