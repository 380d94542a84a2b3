"""Models written by older versions of the code stay readable: loaded, evaluated, sampled, trained on.

tests/data/README.md says how the files were made.
"""

import json
import shutil

import jax
import numpy as np
import pytest

import gpt_jax
from gpt_jax.commands.paths import ROOT as REPOSITORY
from gpt_jax.commands.training_run import train
from gpt_jax.config import Config
from gpt_jax.data.corpus import read_text
from gpt_jax.errors import UserError
from gpt_jax.storage import format as storage_format
from gpt_jax.storage.checkpoints import METADATA
from gpt_jax.storage.format import FORMAT_VERSION, array_names, current_array_names, migrate
from gpt_jax.storage.integrity import seal
from gpt_jax.storage.metadata import Metadata

DATA = REPOSITORY / "tests" / "data"
VALIDATION = slice(1800, None)  # of the 2,000 characters of text.txt

# Losses and texts as the code that wrote the files gave them.
OLD_MODELS = {
    "run_v1": (10, 2.0910552, "to be be be be be be be be be be be be be be "),
    "run_v2": (10, 2.0923733, "to be tea\nso tea\nso tea\nso tea\nso tea\nso tea\n"),
    "export_v1": (20, 2.4570806, "to be" + 40 * " "),
    "export_v2": (20, 2.4570250, "to be" + 40 * " "),
}
# Training and validation loss at step 20, where the runs end.
ENDS = {1: (1.9035196, 1.9065072), 2: (1.9058421, 1.9097715)}
VERSIONS = range(1, FORMAT_VERSION + 1)


def test_there_is_a_run_and_an_exported_model_of_each_version():
    names = {path.name for path in DATA.iterdir() if path.is_dir()}
    assert names == {f"{kind}_v{version}" for kind in ("run", "export") for version in VERSIONS}
    assert names == OLD_MODELS.keys()
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


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_run_trains_on_nearly_as_it_would_have(version, tmp_path, capsys):
    """Muon with a moving average and skipped spikes, bigrams, convolution, dropout in two micro-batches.

    For version 1 the losses are those of today's dropout masks; the code that wrote it drew them in another
    way and reached 1.9038 and 1.9066.
    """
    workdir = tmp_path / "run"
    shutil.copytree(DATA / f"run_v{version}", workdir)
    values = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    values["data"]["path"] = str(DATA / "text.txt")
    values["mesh"]["data"] = 1  # the tests have eight devices, and four windows cannot be shared by them
    stored = {"format_version": version, "config": values}
    assert train(Config.from_dict(migrate(stored)["config"]), workdir) == 0
    said = capsys.readouterr().out
    assert ("the checkpoint does not record its precision: continuing in float32" in said) == (version == 1)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    assert (records[-1]["train_loss"], records[-1]["val_loss"]) == pytest.approx(ENDS[version], abs=1e-3)
    newest = json.loads((workdir / "checkpoints" / "20" / METADATA).read_text(encoding="utf-8"))
    assert newest["format_version"] == FORMAT_VERSION


def test_an_exported_model_can_be_trained_on(tmp_path):
    """Its parameters have the layout of training: a step of plain gradient descent lowers the loss."""
    model = gpt_jax.load(DATA / "export_v1")
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


def test_names_of_arrays_there_and_back():
    old = {"blocks": {"embedding_skip": 1, "mlp": {"up": 2}}, "final_norm": 3}
    new = {"blocks": {"x0_residual": 1, "mlp": {"up": 2}}, "final_norm": 3}
    for tree in (lambda x: x, lambda x: (x, [x]), lambda x: {"mu": x}):
        assert array_names(tree(new), 1) == tree(old)
        assert current_array_names(tree(old), 1) == tree(new)
        assert array_names(tree(new), FORMAT_VERSION) == tree(new)


def test_an_array_renamed_twice(monkeypatch):
    monkeypatch.setattr(storage_format, "FORMAT_VERSION", 4)
    renamed = {1: {"a": "b"}, 2: {"b": "c", "x": "y"}}
    monkeypatch.setattr(storage_format, "RENAMED_ARRAYS", renamed)
    for version, old in {1: {"a": 0, "x": 1}, 2: {"b": 0, "x": 1}, 3: {"c": 0, "y": 1}}.items():
        assert array_names({"c": 0, "y": 1}, version) == old
        assert current_array_names(old, version) == {"c": 0, "y": 1}


def test_old_settings_are_migrated():
    config = Config().to_dict()
    config["optimizer"]["final_fraction"] = config["optimizer"].pop("min_lr_ratio") / 2
    config["train"]["accumulate"] = config["train"].pop("grad_accum_steps") + 4
    config["model"] |= {"unroll": False, "remat": True}
    before = json.dumps(config)
    migrated = Config.from_dict(migrate({"config": config})["config"])
    assert migrated.optimizer.min_lr_ratio == 0.05 and migrated.train.grad_accum_steps == 4
    assert (migrated.model.unroll, migrated.model.remat) == ("no", "block")
    assert json.dumps(config) == before  # what was read is not changed


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


def with_a_removed_setting(values):
    values["config"]["model"]["window"] = 3
    values["versions"]["gpt_jax"] = "0.1.7"


def with_a_removed_choice(values):
    values["config"]["model"]["activation"] = "tanh"


OTHER_VERSIONS = {
    "newer": (newer, f"format {FORMAT_VERSION + 1}, written by gpt_jax 9.1, is newer than format"),
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
    model = gpt_jax.load(DATA / "run_v1")
    values = model.metadata.to_dict()
    assert Metadata.from_dict(json.loads(json.dumps(values | {"format_version": FORMAT_VERSION}))).config == (
        model.config
    )
    with pytest.raises(UserError, match="format_version = 0 must be a positive integer"):
        Metadata.from_dict(values | {"format_version": 0})
    np.testing.assert_equal(values["step"], 10)
