"""A trained model in a folder to give away: written, read back, damaged, and found in a fresh clone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_commands import environment

import gpt_jax
from gpt_jax.commands import sample
from gpt_jax.config import Config, flatten
from gpt_jax.data.corpus import load_corpus
from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange import exporting, model_folder
from gpt_jax.interchange.evaluation import evaluate
from gpt_jax.interchange.exporting import as_stored, export
from gpt_jax.interchange.model_folder import CARD, FILES, MODEL, PARAMS
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.paths import text_file
from gpt_jax.storage.metadata import FORMAT_VERSION
from gpt_jax.trainer.run import train


@pytest.fixture(scope="module")
def trained(fox_run):
    return gpt_jax.load(fox_run)


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory):
    """The run, exported; tests read it."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(trained, folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    """The exported model, to be damaged."""
    return shutil.copytree(model, tmp_path / "model")


def test_what_is_read_back_is_what_was_trained_bit_for_bit(trained, model):
    assert {path.name for path in model.iterdir()} == {*FILES}
    run = gpt_jax.load(model)
    np.testing.assert_array_equal(run.logits("the quick"), trained.logits("the quick"))
    assert jax.tree.all(jax.tree.map(np.array_equal, run.params, trained.params))
    assert jax.tree.structure(run.params) == jax.tree.structure(trained.params)
    assert run.generate("the", length=40, seed=3) == trained.generate("the", length=40, seed=3)
    assert (run.config, run.tokenizer, run.step) == (trained.config, trained.tokenizer, trained.step)
    assert (run.source, trained.source) == ("exported model", "best checkpoint")
    assert run.metadata.fingerprint == trained.metadata.fingerprint
    assert run.metadata.versions == trained.metadata.versions
    assert run.metadata.val_loss == evaluate(run).loss == evaluate(trained).loss
    assert run.metadata.val_loss == pytest.approx(trained.metadata.val_loss, rel=1e-5)


def test_half_the_size_costs_a_rounding(trained, model, tmp_path):
    export(trained, tmp_path / "half", "float16")
    size, full = ((folder / PARAMS).stat().st_size for folder in (tmp_path / "half", model))
    assert 0.45 * full < size < 0.6 * full
    run = gpt_jax.load(tmp_path / "half")
    for leaf, exact in zip(jax.tree.leaves(run.params), jax.tree.leaves(trained.params), strict=True):
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, np.asarray(exact, np.float16).astype(np.float32))
    # The loss that it tells is its own.
    loss = evaluate(run).loss
    assert run.metadata.val_loss == loss != trained.metadata.val_loss
    assert loss == pytest.approx(trained.metadata.val_loss, abs=1e-2)
    assert f"| loss | {loss:.4f} nats" in (tmp_path / "half" / CARD).read_text(encoding="utf-8")


def test_others_can_read_it(model, trained):
    """The format is safetensors' own, and the names say what the arrays are."""
    arrays = load_file(model / PARAMS)
    assert arrays["blocks.mlp.up.kernel"].shape == (2, 32, 1, 128)
    assert sum(array.size for array in arrays.values()) == sum(
        x.size for x in jax.tree.leaves(trained.params)
    )
    stored = read_model(model)
    assert stored["config"] == trained.config.to_dict() and stored["format_version"] == FORMAT_VERSION
    assert json.loads(stored["tokenizer"])["type"] == "char"


def test_no_file_has_a_name_that_transformers_reads(model):
    names = {path.name for path in model.iterdir()}
    assert not names & {"config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"}


def test_equal_models_make_equal_files(trained, model, tmp_path):
    export(gpt_jax.load(model), tmp_path / "again")  # an exported model can be exported, too
    for name in (PARAMS, MODEL):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()


def test_the_card_comes_from_the_run(trained, model):
    card = (model / CARD).read_text(encoding="utf-8")
    n_params = sum(leaf.size for leaf in jax.tree.leaves(trained.params))
    for text in (
        "# model\n", f"| parameters | {n_params:,} |", "stored as | float32",
        f"| loss | {evaluate(trained).loss:.4f} nats", f"| step | {trained.step} of 120 (best checkpoint) |",
        "text.txt: 2,640 characters, vocabulary of 28",
        "\nTraining split: the first 2,376 tokens. Validation split: the last 264.\n",
        trained.metadata.fingerprint, "    optimizer.learning_rate = 0.01\n", f"jax {jax.__version__}",
        "    python -m gpt_jax sample --workdir model\n", "    python -m gpt_jax evaluate --workdir model\n",
        "    python -m gpt_jax train --config model/model.json\n", "looks back at most 16",
    ):  # fmt: skip
        assert text in card, text
    assert str(text_file(trained.config.data).parent) not in card  # no other machine has it there


def test_the_settings_in_the_card_are_those_of_the_run(trained, model):
    """Those that differ from the defaults, without the folders of the text."""
    card = (model / CARD).read_text(encoding="utf-8")
    listed = dict(re.findall(r"^    ([\w.]+) = (.+)$", card, re.MULTILINE))
    settings = {name: ast.literal_eval(value) for name, value in listed.items()}
    assert settings.pop("data.path") == "text.txt"
    settings["data.path"] = trained.config.data.path
    defaults = flatten(Config())
    assert defaults | settings == flatten(trained.config)
    assert all(value != defaults[name] for name, value in settings.items())
    assert read_model(model)["config"] == trained.config.to_dict()  # what `--config` reads


def program(*command, cwd, **environ):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd, env=environment() | environ, capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_the_commands_from_a_run_to_text(trained, tmp_path):
    workdir, module = text_file(trained.config.data).parent / "run", {"PYTHONPATH": str(REPOSITORY)}
    done = program("-m", "gpt_jax", "export", "--workdir", workdir, "--out", "deep/m", cwd=tmp_path, **module)
    assert done.returncode == 0, done.stderr
    loss = gpt_jax.load(tmp_path / "deep" / "m").metadata.val_loss
    assert f"best checkpoint, step {trained.step}\n" in done.stdout
    assert "size       0.1 MB, float32\n" in done.stdout and f"loss       {loss:.5f} nats" in done.stdout
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["m"]

    done = program(REPOSITORY / "sample.py", "--workdir", "deep/m", "--out", "o.txt", "--length", "50",
                   "--prompt", "the quick", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"deep/m, exported model, step {trained.step}\n" in done.stderr
    written = (tmp_path / "o.txt").read_text(encoding="utf-8")
    assert written.startswith("the quick") and len(written) == 59

    done = program("-m", "gpt_jax", "evaluate", "--workdir", "deep/m", cwd=tmp_path, **module)
    assert f"loss       {loss:.4f} nats" in done.stdout and "deep/m, exported model" in done.stdout


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository without any run or model."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("sample.py", "gpt_jax", "configs"):
        (shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy)(REPOSITORY / name, folder / name)
    (folder / "artifacts").mkdir()
    return folder


@pytest.mark.slow
def test_a_fresh_clone_samples_from_the_model_that_comes_with_it(trained, model, clone):
    pretrained = shutil.copytree(model, clone / "artifacts" / "pretrained")
    done = program(clone / "sample.py", "--length", "20", cwd="/")
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert re.fullmatch(r"no runs in .*artifacts: using the shipped model, pretrained/", said[0])
    assert said[1] == f"{pretrained}, exported model, step {trained.step}"
    assert len((clone / "artifacts" / "output.txt").read_text(encoding="utf-8")) == 20

    # One's own run comes first.
    shutil.copytree(text_file(trained.config.data).parent / "run", clone / "artifacts" / "mine")
    done = program(clone / "sample.py", "--length", "20", cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"{clone / 'artifacts' / 'mine'}, best checkpoint, step ")


@pytest.mark.slow
def test_the_model_that_comes_with_the_code():
    folder = REPOSITORY / "artifacts" / "pretrained"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25 * 10**6
    run = gpt_jax.load(folder)
    corpus = load_corpus(text_file(run.config.data), run.config.model.context, run.config.data.train_fraction)
    assert run.metadata.fingerprint == corpus.fingerprint and run.tokenizer == corpus.tokenizer
    for text in (folder / CARD, REPOSITORY / "benchmarks" / "RECORDS.md"):
        assert f"{run.metadata.val_loss:.4f}" in text.read_text(encoding="utf-8")
    assert run.loss(corpus.tokenizer.decode(corpus.val)) == pytest.approx(run.metadata.val_loss, abs=1e-3)


def test_a_damaged_model_in_a_fresh_clone_is_named(model, clone):
    pretrained = shutil.copytree(model, clone / "artifacts" / "pretrained")
    (pretrained / PARAMS).unlink()
    done = program(clone / "sample.py", cwd="/")
    assert done.returncode == 2 and done.stdout == ""
    error = f"error: exported model, {pretrained / PARAMS}: missing: get the folder again"
    assert done.stderr.splitlines()[1:] == [error]


def test_git_takes_the_model_but_no_run_and_no_text(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("no git here")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(REPOSITORY / ".gitignore", tmp_path)
    for folder in ("pretrained", "shakespeare"):
        (tmp_path / "artifacts" / folder).mkdir(parents=True)
        (tmp_path / "artifacts" / folder / PARAMS).touch()
    (tmp_path / "artifacts" / "output.txt").touch()
    command = ["git", "-C", tmp_path, "status", "--porcelain", "-uall", "artifacts"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"?? artifacts/pretrained/{PARAMS}\n"


def read_model(folder):
    return json.loads((folder / MODEL).read_text(encoding="utf-8"))


def write_model(folder, values):
    (folder / MODEL).write_text(json.dumps(values), encoding="utf-8")


def rewrite(folder, change=lambda arrays, facts: None, checksum=True):
    """Write both files again, with what `change` makes of them and a correct checksum."""
    arrays, facts = load_file(folder / PARAMS), read_model(folder)
    change(arrays, facts)
    if checksum:
        facts["sha256"] = model_folder.checksum(arrays)
    save_file(arrays, folder / PARAMS)
    write_model(folder, facts)


def truncate(path, n):
    os.truncate(path, path.stat().st_size + n if n < 0 else n)


def set_model(folder, **settings):
    values = read_model(folder)
    values["config"]["model"] |= settings
    write_model(folder, values)


def set_tokenizer(folder, **values):
    write_model(folder, read_model(folder) | {"tokenizer": json.dumps(values)})


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder_instead(path):
    path.unlink()
    path.mkdir()


UP = "blocks.mlp.up.kernel"
FIT = "does not fit model.json"
HARM = {
    "no weights": (lambda d: (d / PARAMS).unlink(), PARAMS, "missing"),
    "no json": (lambda d: (d / MODEL).unlink(), MODEL, "missing"),
    "no config": (lambda d: rewrite(d, lambda a, f: f.pop("config")), MODEL, "config is missing"),
    "no tokenizer": (lambda d: rewrite(d, lambda a, f: f.pop("tokenizer")), MODEL, "tokenizer is missing"),
    "pipe": (lambda d: pipe(d / PARAMS), PARAMS, "not a file"),
    "folder": (lambda d: folder_instead(d / MODEL), MODEL, "not a file"),
    "empty weights": (lambda d: truncate(d / PARAMS, 0), PARAMS, "0 bytes cannot hold the [0-9,]+ param"),
    "header cut": (lambda d: truncate(d / PARAMS, 100), PARAMS, "cannot hold"),
    "last byte cut": (lambda d: truncate(d / PARAMS, -1), PARAMS, "deserializing"),
    "bytes too many": (lambda d: truncate(d / PARAMS, 10**6), PARAMS, "deserializing"),
    "flipped bit": (lambda d: flip_a_bit(d / PARAMS), PARAMS, "do not match the recorded"),
    "pickle": (lambda d: (d / PARAMS).write_bytes(b"\x80\x04K\x01." * 50_000), PARAMS, "deserializing"),
    "huge header": (lambda d: (d / PARAMS).write_bytes(b"\xff" * 10**6), PARAMS, "header too large"),
    "huge json": (lambda d: truncate(d / MODEL, 2**33), MODEL, "bytes are more than"),
    "not json": (lambda d: (d / MODEL).write_text("{"), MODEL, "Expecting property name"),
    "not utf-8": (lambda d: (d / MODEL).write_bytes(b"\xff"), MODEL, "decode byte 0xff"),
    "a list": (lambda d: (d / MODEL).write_text("[]"), MODEL, "not a JSON object"),
    "config a list": (lambda d: write_model(d, read_model(d) | {"config": []}), MODEL, "group of settings"),
    "deep json": (lambda d: (d / MODEL).write_text("[" * 10**6), MODEL, "recursion"),
    "unknown setting": (
        lambda d: set_model(d, n_layers=2), MODEL,
        "setting model.n_layers: did you mean .*; written by gpt_jax [0-9.]+, and gpt_jax [0-9.]+ does not",
    ),
    "newer": (
        lambda d: write_model(d, read_model(d) | {"format_version": 99}), MODEL,
        "format 99, written by gpt_jax [0-9.]+, is newer than format [0-9]+ of this gpt_jax [0-9.]+: install",
    ),
    "strange version": (
        lambda d: write_model(d, read_model(d) | {"format_version": "2"}), MODEL, "must be a positive integer"
    ),
    "long lines": (lambda d: set_model(d, **{"x\n" * 10**5: 2}), MODEL, "unknown setting"),
    "other width": (
        lambda d: set_model(d, d_mlp=64), PARAMS, rf"{FIT}: blocks.* there, \(2, 64, 32\) in"
    ),
    "layer missing": (
        lambda d: set_model(d, n_layer=3), PARAMS, rf"{FIT}: blocks.* there, \(3, .* in the"
    ),
    "layer too many": (lambda d: set_model(d, n_layer=1), PARAMS, rf"{FIT}: blocks.* there, \(1, .* in the"),
    "endless layers": (lambda d: set_model(d, n_layer=2**31), PARAMS, "cannot hold the 26,[0-9,]+ param"),
    "endless width": (lambda d: set_model(d, d_model=2**31, d_mlp=2**31), PARAMS, "cannot hold the"),
    "endless context": (lambda d: set_model(d, context=2**32), PARAMS, "overflow|cannot hold"),
    "endless convolution": (lambda d: set_model(d, conv_width=2**31), MODEL, "must be 64 or below"),
    "endless blocks": (lambda d: set_model(d, query_blocks=2**31), MODEL, "must be 64 or below"),
    "other characters": (
        lambda d: set_tokenizer(d, type="char", characters="ab"), PARAMS,
        rf"{FIT}: token_embedding.* \(2, 32\) in",
    ),
    "no characters": (
        lambda d: set_tokenizer(d, type="char", characters=""), MODEL, "must be a sorted string"
    ),
    "tokenizer empty": (lambda d: set_tokenizer(d), MODEL, "tokenizer: type None is not known; known: char"),
    "array missing": (lambda d: rewrite(d, lambda a, f: a.pop(UP)), PARAMS, f"{FIT}: {UP} has shape none"),
    "array too many": (lambda d: rewrite(d, lambda a, f: a.update(x=np.zeros(3))), PARAMS, f"{FIT}: x has"),
    "other shape": (lambda d: rewrite(d, lambda a, f: a.update({UP: a[UP][0]})), PARAMS, f"{FIT}: {UP}"),
    "other type": (lambda d: rewrite(d, lambda a, f: a.update({UP: a[UP] > 0})), PARAMS, f"{UP} is BOOL"),
    "changed": (lambda d: rewrite(d, lambda a, f: a[UP].fill(0), False), PARAMS, "do not match the recorded"),
    "no step": (lambda d: rewrite(d, lambda a, f: f.pop("step")), MODEL, "step is missing or has"),
    "strange loss": (lambda d: rewrite(d, lambda a, f: f.update(val_loss="1")), MODEL, "val_loss is missing"),
    "no checksum": (
        lambda d: write_model(d, {k: v for k, v in read_model(d).items() if k != "sha256"}), PARAMS,
        "do not match the recorded",
    ),
}  # fmt: skip


def test_a_model_that_is_only_rewritten_can_be_read(copy):
    """So it is the harm that the next test sees refused."""
    before = (copy / PARAMS).read_bytes()
    rewrite(copy, lambda a, f: a[UP].fill(0))
    set_model(copy, remat="block")
    run = gpt_jax.load(copy)
    assert not run.params["blocks"]["mlp"]["up"]["kernel"].any() and (copy / PARAMS).read_bytes() != before


@pytest.mark.parametrize("harm, name, message", HARM.values(), ids=HARM)
def test_a_damaged_or_hostile_model_is_one_line(copy, harm, name, message):
    harm(copy)
    with pytest.raises(UserError, match=message) as error:
        gpt_jax.load(copy)
    line = str(error.value)
    assert line.startswith(f"exported model, {copy / name}: ")
    assert "\n" not in line and len(line) < 600


def test_damage_is_exit_status_2(run_here, copy, tmp_path):
    truncate(copy / PARAMS, -1)
    done = run_here(sample.main, "--workdir", copy, "--out", "o.txt", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        rf"error: exported model, {copy / PARAMS}: Error while deserializing .*\n", done.stderr
    )
    assert not (tmp_path / "o.txt").exists()


def test_an_older_model_is_replaced_and_nothing_else(trained, copy, tmp_path):
    (copy / PARAMS).write_bytes(b"old")
    (copy / CARD).unlink()
    export(trained, copy)
    assert gpt_jax.load(copy).step == trained.step
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    (tmp_path / "empty").mkdir()
    export(trained, tmp_path / "empty")
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"out = .*model holds other files, such as notes.txt: name a new"):
        export(trained, copy)
    with pytest.raises(UserError, match=r"run holds other files, such as checkpoints: name a new folder"):
        export(trained, text_file(trained.config.data).parent / "run")
    with pytest.raises(UserError, match=r"notes.txt is not a folder: name a new one"):
        export(trained, copy / "notes.txt")
    assert (copy / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_model_of_another_program_is_not_replaced(trained, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    save_file({"x": np.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"other holds other files, such as config.json: name a new folder"):
        export(trained, folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_nothing_is_trained_over_it(trained, copy):
    before = {path: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(UserError, match="holds an exported model: choose another with --workdir"):
        train(trained.config, copy)
    assert {path: path.read_bytes() for path in copy.iterdir()} == before


def test_what_cannot_be_written_leaves_the_old(trained, copy, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    before = (copy / PARAMS).read_bytes()
    monkeypatch.setattr(exporting, "sync", full)
    with pytest.raises(RunError, match=r"out = .*model cannot be written: No space left on device"):
        export(trained, copy)
    assert (copy / PARAMS).read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error, renamed, raised",
    [
        (OSError(5, "Input/output error"), False, RunError),
        (KeyboardInterrupt(), False, KeyboardInterrupt),
        (KeyboardInterrupt(), True, KeyboardInterrupt),
    ],
)
def test_one_of_both_models_is_there(trained, copy, tmp_path, monkeypatch, error, renamed, raised):
    """Whenever the second of the two renames is interrupted, or fails."""
    rename = Path.rename

    def interrupted(path, target):
        if path.name != "new" or renamed:
            rename(path, target)
        if path.name == "new":
            raise error

    old, new = b"old", (copy / PARAMS).read_bytes()
    (copy / PARAMS).write_bytes(old)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(raised):
        export(trained, copy)
    assert (copy / PARAMS).read_bytes() == (new if renamed else old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_text_that_has_moved_can_be_named(trained, model, tmp_path):
    path = text_file(trained.config.data)
    other = tmp_path / "other.txt"
    other.write_bytes(path.read_bytes() + b"more")
    moved = path.rename(tmp_path / "moved.txt")
    command = ("-m", "gpt_jax", "export", "--workdir", path.parent / "run", "--out", tmp_path / "model")
    module = {"PYTHONPATH": str(REPOSITORY)}
    try:
        done = program(*command, cwd=tmp_path, **module)
        message = f"error: text file {path} does not exist: say where it is now with --text FILE; its"
        assert done.returncode == 2 and message in done.stderr, done.stderr
        with pytest.raises(UserError, match=r"other.txt is not the text that this run was trained on"):
            export(trained, tmp_path / "model", text=other)
        assert not (tmp_path / "model").exists()
        done = program(*command, "--text", "moved.txt", cwd=tmp_path, **module)
        assert done.returncode == 0, done.stderr
    finally:
        moved.rename(path)
    assert (tmp_path / "model" / PARAMS).read_bytes() == (model / PARAMS).read_bytes()


def test_what_cannot_be_exported(trained, tmp_path):
    with pytest.raises(UserError, match=r"dtype = 'float16' is too small for a.kernel: use --dtype float32"):
        as_stored({"a": {"kernel": np.float32([1, 1e6])}}, "float16")
    text = text_file(trained.config.data)
    old = text.read_bytes()
    try:
        text.write_bytes(old + b"more")
        with pytest.raises(UserError, match="is not the text that this run was trained on"):
            export(trained, tmp_path / "model")
    finally:
        text.write_bytes(old)
    assert list(tmp_path.iterdir()) == []
