"""Models written by older versions of the code stay readable: loaded, evaluated, sampled, trained on.

tests/data/README.md says how the files were made.
"""

import json
import shutil

import jax
import numpy as np
import pytest

import gpt_jax
from gpt_jax.config import Config
from gpt_jax.data.corpus import read_text
from gpt_jax.data.tokenizers import CharTokenizer
from gpt_jax.errors import UserError
from gpt_jax.interchange.model_folder import MODEL
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.storage.checkpoints import METADATA
from gpt_jax.storage.integrity import seal
from gpt_jax.storage.metadata import FORMAT_VERSION, MIGRATIONS, FormatError, Metadata, migrate
from gpt_jax.trainer.run import train

DATA = REPOSITORY / "tests" / "data"
VALIDATION = slice(1800, None)  # of the 2,000 characters of text.txt

# Losses and texts as the code that wrote the files gave them.
OLD_MODELS = {
    "run_v2": (10, 2.0579291, "to be tea\nso tea\nso tea\nso tea\nso tea\nso tea\n"),
    "export_v2": (20, 2.4570250, "to be" + 40 * " "),
}
ENDS = {2: (1.9058421, 1.8940581)}  # training and validation loss at step 20, where the runs end
VERSIONS = range(2, FORMAT_VERSION)


def test_there_is_a_run_and_an_exported_model_of_each_older_version():
    names = {path.name for path in DATA.iterdir() if path.is_dir()}
    assert names == {f"{kind}_v{version}" for kind in ("run", "export") for version in VERSIONS}
    assert names == OLD_MODELS.keys() and MIGRATIONS.keys() == {*VERSIONS}
    for name in names:
        assert sum(path.stat().st_size for path in (DATA / name).rglob("*") if path.is_file()) < 200_000
        assert gpt_jax.load(DATA / name).metadata.format_version == int(name[-1])


@pytest.mark.parametrize("name", OLD_MODELS)
def test_an_old_model_is_read_and_sampled(name):
    step, val_loss, text = OLD_MODELS[name]
    model = gpt_jax.load(DATA / name)
    assert model.step == step
    assert model.loss(read_text(DATA / "text.txt")[VALIDATION]) == pytest.approx(val_loss, abs=1e-5)
    assert "to be" + model.generate("to be", length=40, greedy=True) == text


def copy_of_a_run(version, tmp_path):
    """A run, and the settings that continue it here."""
    workdir = tmp_path / "run"
    shutil.copytree(DATA / f"run_v{version}", workdir)
    values = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    values["data"]["path"] = str(DATA / "text.txt")
    values["mesh"]["data"] = 1  # the tests have eight devices, and four windows cannot be shared by them
    return workdir, Config.from_dict(migrate({"format_version": version, "config": values})["config"])


def train_to_the_end(workdir, config, version):
    """It reaches the losses that the version which began the run reached, and saves in the current format."""
    assert train(config, workdir) == 0
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    assert (records[-1]["train_loss"], records[-1]["val_loss"]) == pytest.approx(ENDS[version], abs=1e-3)
    newest = json.loads((workdir / "checkpoints" / "20" / METADATA).read_text(encoding="utf-8"))
    assert newest["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_run_trains_on_nearly_as_it_would_have(version, tmp_path, capsys):
    """Muon, bigram embedding, convolution, dropout in two micro-batches."""
    train_to_the_end(*copy_of_a_run(version, tmp_path), version)
    assert "precision" not in capsys.readouterr().out  # the checkpoint records it


@pytest.fixture
def invented_version(monkeypatch):
    """Version 1, in which a setting had another name. Returns what makes metadata that old."""

    def to_version_2(values):
        values["config"]["train"]["batch_size"] = values["config"]["train"].pop("windows")

    def to_version_1(values):
        values["config"]["train"]["windows"] = values["config"]["train"].pop("batch_size")
        return values | {"format_version": 1}

    monkeypatch.setitem(MIGRATIONS, 1, to_version_2)
    return to_version_1


def test_two_migrations_one_after_the_other(invented_version, tmp_path):
    """A run is loaded, and trained on."""
    workdir, config = copy_of_a_run(2, tmp_path)
    was = gpt_jax.load(workdir)
    folder = workdir / "checkpoints" / "10"
    values = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    (folder / METADATA).write_text(json.dumps(invented_version(values)), encoding="utf-8")
    (folder / "SHA256SUMS").unlink()
    seal(folder)

    model = gpt_jax.load(workdir)
    assert model.metadata.format_version == 1 and model.config == was.config
    train_to_the_end(workdir, config, 2)


def test_two_migrations_of_an_exported_model(invented_version, tmp_path):
    was = gpt_jax.load(DATA / "export_v2")
    folder = shutil.copytree(DATA / "export_v2", tmp_path / "model")
    values = json.loads((folder / MODEL).read_text(encoding="utf-8"))
    (folder / MODEL).write_text(json.dumps(invented_version(values)), encoding="utf-8")

    model = gpt_jax.load(folder)
    assert model.metadata.format_version == 1 and model.config == was.config


def test_an_exported_model_can_be_trained_on(tmp_path):
    """Its parameters have the layout of training: a step of plain gradient descent lowers the loss."""
    model = gpt_jax.load(DATA / "export_v2")
    ids = model.tokenizer.encode(read_text(DATA / "text.txt"))[: 16 * 8].reshape(8, 16)

    @jax.jit
    def loss_of(params):
        logits = model.module.apply({"params": params}, ids[:, :-1])[0]
        targets = jax.nn.one_hot(ids[:, 1:], model.tokenizer.vocab_size)
        return -(jax.nn.log_softmax(logits) * targets).sum(-1).mean()

    gradient = jax.jit(jax.grad(loss_of))(model.params)
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, model.params, gradient)
    assert model.params.keys() >= {"blocks", "token_embedding"}
    assert loss_of(stepped) < loss_of(model.params) - 1e-3


REMOVED = ("ema_decay", "skip_grad_norm_factor")


def version_2(**settings):
    """Metadata of version 2, from a larger one; what is not given is what that version had by default."""
    config = Config().to_dict()
    config["optimizer"] |= dict.fromkeys(REMOVED, 0.0) | settings
    return {"format_version": 2, "config": config, "versions": {"gpt_jax": "0.2.0"}}


def test_settings_that_were_removed_are_dropped_where_they_did_nothing():
    stored = version_2(learning_rate=0.05)
    before = json.dumps(stored)
    config = Config.from_dict(migrate(stored)["config"])
    assert config.optimizer.learning_rate == 0.05
    assert json.dumps(stored) == before  # what was read is not changed


@pytest.mark.parametrize("name", REMOVED)
def test_settings_that_were_removed_are_an_error_where_they_did_something(name):
    message = f"optimizer.{name} = 0.9; written by gpt_jax 0.2.0, and gpt_jax .* use the version that wrote"
    with pytest.raises(FormatError, match=message):
        migrate(version_2(**{name: 0.9}))


@pytest.mark.parametrize("bigram, size, is_read", [(True, 127, True), (True, 128, False), (False, 128, True)])
def test_the_bigrams_of_a_large_vocabulary_had_another_hash(bigram, size, is_read):
    """Up to (V + 1) V = 2^14 each pair of tokens has a row of its own, in both versions."""
    characters = "".join(map(chr, range(256, 256 + size)))
    values = version_2() | {"tokenizer": CharTokenizer(characters).to_json()}
    values["config"]["model"]["bigram"] = bigram
    if is_read:
        assert migrate(values)["config"]["model"]["bigram"] == bigram
        return
    message = "model.bigram with the old hash for 128 tokens; written by gpt_jax 0.2.0, and gpt_jax"
    with pytest.raises(FormatError, match=message):
        migrate(values)


def rewritten(name, tmp_path, change):
    """A run with the metadata of its checkpoint changed, and correct checksums."""
    workdir = tmp_path / "run"
    shutil.copytree(DATA / name, workdir)
    folder = workdir / "checkpoints" / "10"
    values = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    change(values)
    (folder / METADATA).write_text(json.dumps(values), encoding="utf-8")
    (folder / "SHA256SUMS").unlink()
    seal(folder)
    return workdir


def newer(values):
    values["format_version"] = FORMAT_VERSION + 1
    values["versions"]["gpt_jax"] = "9.1"


def much_older(values):
    values["format_version"] = 1
    values["versions"]["gpt_jax"] = "0.1.0"


def with_a_moving_average(values):
    values["config"]["optimizer"]["ema_decay"] = 0.9


def with_a_removed_setting(values):
    values["config"]["model"]["window"] = 3
    values["versions"]["gpt_jax"] = "0.1.7"


def with_a_removed_choice(values):
    values["config"]["model"]["activation"] = "tanh"


OTHER_VERSIONS = {
    "newer": (newer, f"format {FORMAT_VERSION + 1}, written by gpt_jax 9.1, is newer than format"),
    "much older": (much_older, "format 1; written by gpt_jax 0.1.0, and gpt_jax"),
    "average": (with_a_moving_average, r"optimizer.ema_decay = 0.9; written by gpt_jax 0.3.0, and gpt_jax"),
    "setting": (with_a_removed_setting, r"unknown setting model.window: .*; written by gpt_jax 0.1.7, and"),
    "choice": (with_a_removed_choice, r"model.activation = 'tanh' must be one of .*; written by .*gpt_jax"),
}


@pytest.mark.parametrize("change, message", OTHER_VERSIONS.values(), ids=OTHER_VERSIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_another_version_is_not_called_damaged(version, change, message, tmp_path, capsys):
    """One line that names both versions, from loading and from resuming; nothing is renamed or changed."""
    workdir = rewritten(f"run_v{version}", tmp_path, change)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    config = Config.from_dict(
        {"model": {"context": 16}, "data": {"path": str(DATA / "text.txt")}, "mesh": {"data": 1}}
    )
    for call in (lambda: gpt_jax.load(workdir), lambda: train(config, workdir)):
        with pytest.raises(UserError, match=message) as error:
            call()
        line = str(error.value)
        assert "\n" not in line and gpt_jax.__version__ in line and "damaged" not in line
        assert line.startswith(f"checkpoint {workdir / 'checkpoints' / '10'}: {METADATA}: ")
    assert "damaged" not in capsys.readouterr().err
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert after.items() >= before.items() and {path.name for path in after.keys() - before.keys()} <= {
        "lock"
    }


def test_metadata_there_and_back():
    model = gpt_jax.load(DATA / "run_v2")
    values = model.metadata.to_dict()
    assert Metadata.from_dict(json.loads(json.dumps(values | {"format_version": FORMAT_VERSION}))).config == (
        model.config
    )
    with pytest.raises(UserError, match="format_version = 0 must be a positive integer"):
        Metadata.from_dict(values | {"format_version": 0})
    np.testing.assert_equal(values["step"], 10)
