"""Training that starts from another model: what is taken from it, what is refused, and what is recorded."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import make_gpt, make_tiny_config, some, write_text
from test_training import assert_same_bits, metrics_of, saved_state

import gpt_jax
from gpt_jax.commands import train as train_command
from gpt_jax.config import Config, ModelConfig, parse_setting
from gpt_jax.data import corpus
from gpt_jax.data.corpus import load_corpus
from gpt_jax.data.documents import find_documents
from gpt_jax.data.prepare import prepare
from gpt_jax.errors import UserError
from gpt_jax.interchange.evaluation import evaluate
from gpt_jax.interchange.exporting import export, export_elsewhere
from gpt_jax.interchange.model_folder import CARD, MODEL
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.plan import make_plan
from gpt_jax.trainer.origin import SHAPE
from gpt_jax.trainer.run import train
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.state import abstract_state, init_state

STILL = {"learning_rate": 1e-12, "warmup_steps": 0}  # parameters stay as they are, but for rounding
FEW = {"steps": 2, "eval_every": 2, "log_every": 1}
WORDS = "question the is that not or be to perchance sleep, \n"  # in another order than the parent read them


@pytest.fixture
def other(tmp_path):
    """Another text in the characters of `tiny_run`."""
    path = tmp_path / "other.txt"
    path.write_text(WORDS * 40, encoding="utf-8")
    return path


def child_config(text, parent, **groups):
    """The settings of a child: those of the shape are left out."""
    values = make_tiny_config(text, init_from=str(parent), **groups).to_dict()
    shape = {name: value for name, value in values["model"].items() if name not in SHAPE}
    return Config.from_dict(values | {"model": shape | groups.get("model", {})})


def facts_of(workdir):
    return json.loads((workdir / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", some("run", "exported model", "Hugging Face folder", quick=3))
def test_a_child_begins_as_its_parent_is(tiny_run, other, tmp_path, capsys, kind):
    parent = gpt_jax.load(tiny_run)
    if kind == "exported model":
        export(parent, tmp_path / "parent")
    if kind == "Hugging Face folder":
        export_elsewhere(parent, tmp_path / "parent", "hf")
        parent = gpt_jax.load(tmp_path / "parent")  # with biases of zero
    folder = tiny_run if kind == "run" else tmp_path / "parent"
    capsys.readouterr()
    child = gpt_jax.train(child_config(other, folder, optimizer=STILL, train=FEW), tmp_path / "child")
    said = capsys.readouterr().out
    assert child.config.model == parent.config.model and child.tokenizer == parent.tokenizer
    assert child.step == 2
    tokens = load_corpus(other, 16, 0.9, tokenizer=parent.tokenizer).val
    assert child.history[-1]["val_loss"] == pytest.approx(parent.loss(tokens), rel=1e-6)
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old, atol=1e-9), child.params, parent.params
    )
    # What is said and recorded.
    source = "best checkpoint" if kind == "run" else kind
    record = facts_of(tmp_path / "child")["parent"]
    assert record == child.metadata.parent
    assert {name: record[name] for name in ("path", "source", "step")} == {
        "path": str(folder), "source": source, "step": parent.step,
    }  # fmt: skip
    if kind == "exported model":  # the checksum of its parameters is that which its own file has
        assert record["sha256"] == json.loads((folder / MODEL).read_text(encoding="utf-8"))["sha256"]
    step = f"{source}, step {parent.step:,}"
    assert f"start   from {folder} ({step}), parameters sha256 {record['sha256'][:12]}\n" in said
    more = "\n" if kind != "Hugging Face folder" else ""  # it names widths and biases too
    assert f"shape   as there: n_layer = 1, n_head = 2, d_model = 16{more}" in said
    assert "vocab " not in said and "resume" not in said


def test_the_same_model_has_the_same_checksum_wherever_it_lies(tiny_run, other, tmp_path):
    export(gpt_jax.load(tiny_run), tmp_path / "exported")
    for name, folder in (("a", tiny_run), ("b", tmp_path / "exported")):
        train(child_config(other, folder, train=FEW, optimizer=STILL), tmp_path / name)
    assert facts_of(tmp_path / "a")["parent"]["sha256"] == facts_of(tmp_path / "b")["parent"]["sha256"]


def test_it_learns_from_there_on(tiny_run, other, tmp_path):
    parent = gpt_jax.load(tiny_run)
    child = gpt_jax.train(child_config(other, tiny_run), tmp_path / "child")
    tokens = load_corpus(other, 16, 0.9, tokenizer=parent.tokenizer).val
    assert child.history[-1]["val_loss"] < parent.loss(tokens) - 0.3
    assert facts_of(tmp_path / "child")["parent"]["step"] == 20  # its own steps count from 0
    assert [line["step"] for line in child.history] == [5, 10, 15, 20]


def test_a_shorter_context_takes_the_first_positions(tiny_run, other, tmp_path):
    parent = gpt_jax.load(tiny_run)
    config = child_config(other, tiny_run, optimizer=STILL, train=FEW, model={"context": 8})
    child = gpt_jax.train(config, tmp_path / "child")
    assert child.params["position_embedding"]["embedding"].shape == (8, 16)
    np.testing.assert_allclose(child.logits("to be or"), parent.logits("to be or"), atol=1e-5)


def test_a_longer_context_with_rope(text_file, other, tmp_path):
    rope = {"position": "rope", "context": 8}
    parent = gpt_jax.train(make_tiny_config(text_file, model=rope, train=FEW), tmp_path / "parent")
    config = child_config(other, tmp_path / "parent", optimizer=STILL, train=FEW, model={"context": 32})
    child = gpt_jax.train(config, tmp_path / "child")
    assert child.config.model == replace(parent.config.model, context=32)
    np.testing.assert_allclose(child.logits("to be or"), parent.logits("to be or"), atol=1e-5)
    assert child.logits(WORDS[:32]).shape == (32, parent.tokenizer.vocab_size)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_characters_change_nothing_for_the_known_ones(text_file, other, tmp_path, capsys, tied):
    """They lie before, between and after the known ones, so every known row moves."""
    settings = {"tied_embedding": tied, "bigram": True}
    parent = gpt_jax.train(make_tiny_config(text_file, model=settings), tmp_path / "parent")
    assert np.abs(parent.params["bigram_embedding"]["embedding"]).max() > 0.01, "it learned no pairs"
    other.write_text(f"{WORDS}!Xé" * 40, encoding="utf-8")
    extend = {"extend_vocabulary": True}
    config = child_config(other, tmp_path / "parent", optimizer=STILL, train=FEW, data=extend)
    capsys.readouterr()
    child = gpt_jax.train(config, tmp_path / "child")
    assert "vocab   extended by 3: '!', 'X', 'é'\n" in capsys.readouterr().out
    assert child.tokenizer.characters == "".join(sorted({*parent.tokenizer.characters, *"!Xé"}))
    known = child.tokenizer.encode(parent.tokenizer.characters)
    text = "that is not or b"
    np.testing.assert_allclose(child.logits(text)[:, known], parent.logits(text), atol=1e-5)
    # The new rows are what a new run draws.
    fresh = gpt_jax.train(
        make_tiny_config(other, model=settings, train=FEW, optimizer=STILL), tmp_path / "fresh"
    )
    assert fresh.tokenizer == child.tokenizer
    new = child.tokenizer.encode("!Xé")
    for name, leaf, axis in (("token_embedding", "embedding", 0), ("head", "kernel", 1)):
        if name in child.params:
            rows, drawn = (np.asarray(m.params[name][leaf]).take(new, axis) for m in (child, fresh))
            np.testing.assert_allclose(rows, drawn, atol=1e-9)
            assert np.abs(rows).max() > 0.001
    # It can be evaluated, sampled, and resumed, without the parent.
    shutil.rmtree(tmp_path / "parent")
    assert evaluate(child).loss == pytest.approx(child.history[-1]["val_loss"], rel=1e-5)
    assert len(child.generate("Xé", length=5)) == 5
    longer = gpt_jax.train(replace(config, train=replace(config.train, steps=3)), tmp_path / "child")
    assert longer.history[-1]["step"] == 3 and longer.tokenizer == child.tokenizer


def test_a_vocabulary_need_not_grow(tiny_run, other, tmp_path, capsys):
    config = child_config(other, tiny_run, train=FEW, data={"extend_vocabulary": True, "tokenizer": "char"})
    child = gpt_jax.train(config, tmp_path / "child")
    assert child.tokenizer == gpt_jax.load(tiny_run).tokenizer
    assert "vocab  " not in capsys.readouterr().out


def test_a_stopped_run_goes_on_bit_for_bit_without_its_parent(tiny_run, other, tmp_path, capsys):
    parent = shutil.copytree(tiny_run, tmp_path / "parent")
    config, whole = child_config(other, parent), make_tiny_config(other)
    assert train(config, tmp_path / "whole") == 0
    stops = gpt_jax.Callback(lambda info: trainer.stop() if info.step == 6 else None, every=3)
    trainer = gpt_jax.Trainer(config, tmp_path / "run", callbacks=[stops])
    assert trainer.train().step == 6
    shutil.rmtree(parent)
    (tmp_path / "run" / "run.json").unlink()
    capsys.readouterr()
    model = gpt_jax.train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "resume  after step 6 of 20" in said and "start  " not in said
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert_same_bits(saved_state(whole, tmp_path / "run"), saved_state(whole, tmp_path / "whole"))
    assert facts_of(tmp_path / "run")["parent"] == facts_of(tmp_path / "whole")["parent"]
    assert facts_of(tmp_path / "run")["parent"] == model.metadata.parent
    # Its own file of settings resumes it too, and so does another way to write the path.
    assert (
        train(Config.from_dict(json.loads((tmp_path / "run" / "config.json").read_text())), tmp_path / "run")
        == 0
    )
    # An export carries it.
    export(model, tmp_path / "exported")
    assert gpt_jax.load(tmp_path / "exported").metadata.parent == model.metadata.parent
    card = (tmp_path / "exported" / CARD).read_text(encoding="utf-8")
    assert "| started from | parent |\n" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    "change, message",
    [
        ({"init_from": ""}, "holds a run with init_from = '.*parent', not ''"),
        ({"init_from": "elsewhere"}, "holds a run with init_from = '.*parent', not '.*elsewhere'"),
        ({"model.n_layer": 2}, "holds a run with model.n_layer = 1, not 2"),
        ({"model.dropout": 0.5}, "holds a run with model.dropout = 0.0, not 0.5"),
        ({"data.extend_vocabulary": True}, "holds a run with data.extend_vocabulary = False, not True"),
        ({"data.tokenizer": "byte"}, "data.tokenizer = 'byte' is not that of init_from = .*, 'char'"),
    ],
)
def test_another_setting_is_another_run(child_run, tmp_path, change, message):
    config, workdir = child_run
    with pytest.raises(UserError, match=message) as error:
        gpt_jax.Trainer(config, workdir, **change).train()
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def child_run(tiny_run, tmp_path_factory):
    """The settings and the folder of a child; its parent is called `parent`, and is gone."""
    folder = tmp_path_factory.mktemp("child")
    parent = shutil.copytree(tiny_run, folder / "parent")
    config = child_config(write_text(folder / "text.txt"), parent, train=FEW, optimizer=STILL)
    assert train(config, folder / "run") == 0
    shutil.rmtree(parent)
    return config, folder / "run"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model.n_layer": 3},
            r"the model of init_from = '.*' has another shape: leave out model\.n_layer = 3 \(there 1\)",
        ),
        (
            {"model.norm": "rmsnorm", "model.d_mlp": 32},
            r"leave out model\.d_mlp = 32 \(there 0\), model\.norm = 'rmsnorm' \(there 'layernorm'\)",
        ),
        ({"model.context": 17}, "model.context = 17 exceeds the parent's positions: use 16 or less"),
        ({"data.tokenizer": "byte"}, "data.tokenizer = 'byte' is not that of init_from = '.*', 'char'"),
        ({"data.tokenizer": "bpe:300"}, "data.tokenizer = 'bpe:300' is not that of init_from"),
        ({"mesh.tensor": 4, "mesh.data": 1}, "model.n_head = 2 cannot be split equally over mesh.tensor = 4"),
        ({"init_from": "/nowhere"}, "init_from = '/nowhere' cannot be used: no trained model in /nowhere"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_parent_is_one_line(tiny_run, other, tmp_path, change, message):
    config = child_config(other, tiny_run, model={"context": 16})
    with pytest.raises(UserError, match=message) as error:
        gpt_jax.Trainer(config, tmp_path / "child", **change).train()
    assert "\n" not in str(error.value) and not (tmp_path / "child").exists()


def test_what_the_parent_has_may_also_be_named(tiny_run, other, tmp_path):
    """With more heads than a mesh of 2 can split, if the defaults of the shape were used."""
    config = child_config(other, tiny_run, train=FEW, model={"n_layer": 1, "d_model": 16, "n_head": 2})
    child = gpt_jax.train(config, tmp_path / "child", **{"data.tokenizer": "char", "model.dropout": 0.5})
    assert child.config.model.dropout == 0.5 and child.config.model.n_layer == 1


def test_unknown_characters_are_listed(tiny_run, other, tmp_path):
    other.write_text(f"{WORDS}\r!é" * 40, encoding="utf-8")
    with pytest.raises(UserError) as error:
        train(child_config(other, tiny_run), tmp_path / "child")
    assert str(error.value).startswith("unknown characters: '\\r' (nearest known: '\\n'), '!', 'é' (nearest")
    assert str(error.value).endswith("; --config.data.extend_vocabulary=True adds them")
    assert not (tmp_path / "child").exists()


def test_what_cannot_be_extended(text_file, other, tmp_path):
    with pytest.raises(UserError, match=r"data.extend_vocabulary = True is for a run with init_from"):
        make_tiny_config(other, data={"extend_vocabulary": True})
    extend = {"data": {"extend_vocabulary": True}, "train": FEW}
    train(make_tiny_config(text_file, data={"tokenizer": "byte"}, train=FEW), tmp_path / "bytes")
    with pytest.raises(UserError, match=r"data.extend_vocabulary = True is for a vocabulary of characters"):
        train(child_config(other, tmp_path / "bytes", **extend), tmp_path / "child")
    train(make_tiny_config(text_file, model={"bigram": True}, train=FEW), tmp_path / "pairs")
    other.write_text(WORDS * 40 + "".join(map(chr, range(0x4E00, 0x4E00 + 120))), encoding="utf-8")
    with pytest.raises(UserError, match=r"model.bigram hashes the pairs of 138 characters"):
        train(child_config(other, tmp_path / "pairs", **extend), tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_a_run_is_not_its_own_parent_and_a_damaged_one_is_none(tiny_run, other, tmp_path, capsys):
    damaged = shutil.copytree(tiny_run, tmp_path / "damaged")
    with pytest.raises(UserError, match=r"init_from = '.*damaged' is the run itself: leave it out"):
        train(child_config(other, damaged), damaged)
    config = child_config(other, damaged, train=FEW)
    for file in (damaged / "checkpoints").glob("*/metadata.json"):
        file.write_bytes(file.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(
        UserError, match=r"init_from = '.*damaged' cannot be used: all checkpoints in"
    ) as error:
        train(config, tmp_path / "child")
    assert "\n" not in str(error.value) and not (tmp_path / "child").exists()


def test_the_parameters_are_split_like_the_state(tiny_run):
    """On any mesh, with the optimizer's state, and the same numbers."""
    parent = gpt_jax.load(tiny_run)
    mesh = make_mesh(Config.from_dict({"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}).mesh)
    model = make_gpt(parent.config.model, parent.tokenizer.vocab_size, mesh)
    optimizer = make_optimizer(parent.config.optimizer, 20)
    state = init_state(model, optimizer, mesh, jax.random.key(0), parent.params)
    target = abstract_state(model, optimizer, mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, state, target))
    assert_same_bits(state.params, parent.params)
    assert int(state.step) == 0 and not any(
        np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state)
    )
    assert_same_bits(gpt_jax.load(tiny_run).params, parent.params)


def test_token_files_must_be_the_parents(tiny_run, text_file, other, tmp_path):
    prepare(find_documents(other), "", tmp_path / "same", 0.9)
    other.write_text("the lazy dog\n" * 100, encoding="utf-8")
    prepare(find_documents(other), "", tmp_path / "others", 0.9)
    with pytest.raises(UserError, match="others holds tokens of another tokenizer than the model's"):
        train(child_config(tmp_path / "others", tiny_run, train=FEW), tmp_path / "child")
    # Those of the text of the parent have its characters.
    prepare(find_documents(text_file), "", tmp_path / "own", 0.9)
    child = gpt_jax.train(child_config(tmp_path / "own", tiny_run, train=FEW), tmp_path / "child")
    assert evaluate(child).loss == pytest.approx(child.history[-1]["val_loss"], rel=1e-5)


def test_a_large_text_is_prepared_apart_for_the_parents_tokenizer(tiny_run, tmp_path, monkeypatch):
    """The cache keeps the ids of a text by its own characters and those by a parent's apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "IN_MEMORY", 100)
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 100, encoding="utf-8")  # with fewer characters than the parent's
    parent = gpt_jax.load(tiny_run)
    child = gpt_jax.train(child_config(text, tiny_run, train=FEW), tmp_path / "child")
    assert child.tokenizer == parent.tokenizer
    alone = gpt_jax.train(make_tiny_config(text, train=FEW), tmp_path / "alone")
    assert alone.tokenizer.characters == "\n benort"
    for model in (child, alone):
        assert evaluate(model).loss == pytest.approx(model.history[-1]["val_loss"], rel=1e-5)


def test_a_trained_tokenizer_is_the_parents(text_file, other, tmp_path):
    """Not that of the child's text, also where the setting names one of the same size."""
    data = {"tokenizer": "bpe:270"}
    parent = gpt_jax.train(make_tiny_config(text_file, data=data, train=FEW), tmp_path / "parent")
    child = gpt_jax.train(child_config(other, tmp_path / "parent", data=data, train=FEW), tmp_path / "child")
    assert child.tokenizer == parent.tokenizer
    assert load_corpus(other, 16, 0.9, spec="bpe:270").tokenizer != parent.tokenizer


def test_the_setting_on_the_command_line(tiny_run, other, tmp_path, run_here):
    assert parse_setting("init_from", "a b") == "a b"
    config = tmp_path / "config.json"
    config.write_text(make_tiny_config(other, train=FEW).to_json(), encoding="utf-8")
    shutil.copytree(tiny_run, tmp_path / "parent")
    command = ["--config", config, "--workdir", tmp_path / "child"]
    done = run_here(train_command.main, *command, "--config.init_from=parent", cwd=tmp_path)
    assert done.returncode == 0 and f"start   from {tmp_path / 'parent'} (best" in done.stdout, done.stderr
    assert "shape  " not in done.stdout  # the settings have it
    again = run_here(train_command.main, *command, f"--config.init_from={tmp_path}/parent", cwd=tmp_path)
    assert again.returncode == 0 and "this run is finished" in again.stdout
    other_one = run_here(train_command.main, *command, "--config.init_from=else", cwd=tmp_path)
    assert other_one.returncode == 2 and other_one.stderr.count("\n") == 1
    nothing = run_here(
        train_command.main,
        "--config",
        config,
        "--workdir",
        tmp_path / "x",
        "--config.init_from=",
        cwd=tmp_path,
    )
    assert nothing.returncode == 0 and facts_of(tmp_path / "x")["parent"] is None


def test_the_mesh_is_checked_with_the_shape_of_the_parent(tmp_path):
    """Settings alone do not say it: 6 heads, the default, cannot be split over 4 devices."""
    config = Config.from_dict({"init_from": str(tmp_path), "mesh": {"data": 1, "tensor": 4}})
    with pytest.raises(UserError, match=r"model\.n_head = 6 cannot be split equally over mesh.tensor = 4"):
        make_plan(config)
    assert make_plan(replace(config, model=ModelConfig(n_head=8))).mesh.shape["tensor"] == 4
