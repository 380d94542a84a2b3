"""The step and the loop: sharding, accumulation, stopping and going on, bit for bit."""

import os
import signal

import jax
import numpy as np
import pytest
from conftest import MODERN

from gpt_jax import trainer
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.config import Config
from gpt_jax.corpus import load_corpus
from gpt_jax.errors import UserError
from gpt_jax.loss import make_loss_of_tokens
from gpt_jax.metrics import read_metrics
from gpt_jax.model import GPT
from gpt_jax.optimizer import make_optimizer
from gpt_jax.run import checkpoint_folder, load
from gpt_jax.sharding import batch_sharding, make_mesh, replicated
from gpt_jax.train_state import abstract_state, init_state
from gpt_jax.train_step import INIT_STREAM, make_train_steps, stream

MESHES = {
    "1": {"data": 1},
    "8x1x1": {"data": 8},
    "2x4x1": {"data": 2, "fsdp": 4},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}


def make_parts(config: Config):
    corpus = load_corpus(config.data.file, config.model.context, config.data.train_fraction)
    mesh = make_mesh(config.mesh)
    model = GPT(config.model, corpus.tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return corpus, mesh, model, optimizer


def run_steps(config: Config, calls=(4,)):
    """Losses of the steps, the validation loss after them, and the state."""
    corpus, mesh, model, optimizer = make_parts(config)
    keep_ema = config.optimizer.ema_decay > 0
    state = init_state(model, optimizer, keep_ema, mesh, stream(config.seed, INIT_STREAM))
    train_steps = make_train_steps(config, model, optimizer, mesh, state, 10)
    tokens = jax.device_put(corpus.train, replicated(mesh))
    losses = []
    for n in calls:
        state, metrics = train_steps(state, tokens, n)
        losses += metrics["loss"][:n].tolist()
    val = make_loss_of_tokens(model, 8, batch_sharding(mesh))(state.eval_params, corpus.val)
    return losses, val, state


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_same_losses_on_every_mesh(tiny_config, optimizer):
    results = {}
    for name, mesh in MESHES.items():
        model = MODERN if optimizer == "muon" else {"bias": True}
        config = tiny_config(mesh=mesh, model=model, optimizer={"name": optimizer, "ema_decay": 0.5})
        results[name] = run_steps(config)
        kernel = results[name][2].params["blocks"]["mlp"]["up"]["kernel"]
        shards = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
        assert kernel.addressable_shards[0].data.size * shards == kernel.size, "not sharded"
        moment = results[name][2].opt_state
        whole = [
            leaf for leaf in jax.tree.leaves(moment)
            if leaf.shape == kernel.shape and leaf.addressable_shards[0].data.size == leaf.size
        ]  # fmt: skip
        assert shards == 1 or not whole, "optimizer state not sharded"
    losses, val, _ = results["1"]
    assert losses[-1] < losses[0]
    for name in MESHES:
        np.testing.assert_allclose(results[name][0], losses, rtol=2e-5, err_msg=name)
        np.testing.assert_allclose(results[name][1], val, rtol=2e-5, err_msg=name)


def test_a_checkpoint_moves_between_meshes(tiny_config, tmp_path):
    config = tiny_config(mesh=MESHES["2x2x2"], optimizer={"ema_decay": 0.5})
    _, _, state = run_steps(config)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    items = {"params": state.params, "opt_state": state.opt_state}
    checkpoints.save(4, items, {"note": "x"}, 1.0)
    checkpoints.close()
    for name in ("1", "8x1x1", "2x4x1"):
        _, mesh, model, optimizer = make_parts(tiny_config(mesh=MESHES[name]))
        target = abstract_state(model, optimizer, True, mesh)
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        wanted = {"params": target.params, "opt_state": target.opt_state}
        restored = checkpoints.restore(4, wanted)
        checkpoints.close()
        assert_same_bits(restored, items)
        jax.tree.map(
            lambda array, leaf: array.sharding == leaf.sharding or pytest.fail(str(leaf)),
            restored,
            wanted,
        )


def test_accumulation_changes_nothing_but_rounding(tiny_config):
    whole, whole_val, _ = run_steps(tiny_config())
    parts, parts_val, _ = run_steps(tiny_config(train={"accumulate": 4}))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    np.testing.assert_allclose(parts_val, whole_val, rtol=1e-5)


def test_how_steps_are_cut_into_calls_changes_no_bit(tiny_config):
    config = tiny_config(model={"dropout": 0.2, "attention_dropout": 0.2}, optimizer={"ema_decay": 0.9})
    one = run_steps(config, (7,))
    many = run_steps(config, (1, 4, 2))
    assert one[0] == many[0]
    assert_same_bits(one[2], many[2])


def test_the_moving_average_follows_its_definition(tiny_config):
    config = tiny_config(optimizer={"ema_decay": 0.75})
    average = None
    for n in range(4):
        _, _, state = run_steps(config, (1,) * n)
        params = state.params["final_norm"]["scale"]
        average = params if average is None else 0.75 * average + 0.25 * params
    np.testing.assert_allclose(state.ema_params["final_norm"]["scale"], average, rtol=1e-5)
    assert not np.allclose(average, state.params["final_norm"]["scale"])


def train(config, workdir):
    return trainer.train(config, workdir)


def train_and_stop(config, workdir, step, monkeypatch, signal_number=signal.SIGINT):
    """Train; raise a real signal in this process when `step` steps are done."""

    def progress(self, record, val_loss, seconds_left):
        if record["step"] == step:
            os.kill(os.getpid(), signal_number)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Terminal, "progress", progress)
        patch.setattr(trainer, "SECONDS_PER_CALL", 0.0)  # one step a call, so that it stops right there
        return trainer.train(config, workdir)


def final_state(config, workdir):
    """Everything that the last checkpoint holds."""
    _, mesh, model, optimizer = make_parts(config)
    checkpoints = Checkpoints(checkpoint_folder(workdir))
    target = abstract_state(model, optimizer, config.optimizer.ema_decay > 0, mesh)
    step = checkpoints.find("last")
    items = checkpoints.restore(step, trainer._items(target))
    metadata = checkpoints.metadata(step)
    checkpoints.close()
    return items | {"losses": metadata["recent_losses"], "step": step}


def metrics_of(workdir):
    timing = ("seconds", "tokens_per_second")
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in timing} for record in records]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_same_bits(tiny_config, tmp_path, monkeypatch, signal_number, capsys):
    config = tiny_config(model={"dropout": 0.2, "attention_dropout": 0.2}, optimizer={"ema_decay": 0.9})
    assert train(config, tmp_path / "whole") == 0
    wanted = final_state(config, tmp_path / "whole")
    assert wanted["step"] == 20
    stops = (1, 10, 13) if signal_number == signal.SIGINT else (4, 19)
    for k in stops:  # 10 is an evaluation, 1, 4, 13 and 19 are between lines of the metrics
        workdir = tmp_path / f"stopped_{k}"
        status = train_and_stop(config, workdir, k, monkeypatch, signal_number)
        assert status == 128 + signal_number
        assert Checkpoints(checkpoint_folder(workdir)).find("last") == k
        assert train(config, workdir) == 0
        assert_same_bits(final_state(config, workdir), wanted)
        assert metrics_of(workdir) == metrics_of(tmp_path / "whole")
    assert f"saved after step {stops[0]} of 20. The same command goes on" in capsys.readouterr().out


def test_how_often_it_looks_changes_no_bit(tiny_config, tmp_path):
    base = {"train": {"sample_length": 0}, "model": {"dropout": 0.2}}
    often = {"eval_every": 3, "log_every": 1, "save_minutes": 1e-6, "sample_length": 5}
    assert train(tiny_config(**base), tmp_path / "seldom") == 0
    assert train(tiny_config(**base | {"train": often}), tmp_path / "often") == 0
    states = [final_state(tiny_config(**base), tmp_path / name) for name in ("seldom", "often")]
    for key in ("params", "opt_state"):
        assert_same_bits(states[0][key], states[1][key])
    assert len(metrics_of(tmp_path / "often")) == 20


def test_best_and_last_are_both_kept(tiny_config, tmp_path):
    """A rate that wrecks the model after a good start: the best step is not among the last."""
    config = tiny_config(train={"steps": 12, "eval_every": 2, "batch_size": 8})
    workdir = tmp_path / "run"
    losses = iter([2.0, 1.0, 3.0, 4.0, 5.0, 6.0])
    checkpoints = Checkpoints(checkpoint_folder(workdir))
    _, _, state = run_steps(config, ())
    for step, loss in zip(range(2, 13, 2), losses, strict=True):
        checkpoints.save(step, {"params": state.params}, {"step": step}, loss)
        checkpoints.save(step + 1, {"params": state.params}, {"step": step + 1}, None)
    checkpoints.close()
    checkpoints = Checkpoints(checkpoint_folder(workdir))
    assert checkpoints.find("best") == 4
    assert checkpoints.find("last") == 13
    assert checkpoints.steps() == [4, 12, 13]
    assert checkpoints.metadata(4) == {"step": 4}
    checkpoints.close()


def test_a_finished_run_says_so_and_trains_no_further(tiny_config, tmp_path, capsys):
    config = tiny_config(train={"steps": 4, "eval_every": 2})
    workdir = tmp_path / "run"
    assert train(config, workdir) == 0
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train(config, workdir) == 0
    assert "this run is finished: 4 of 4 steps are done" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before
    longer = tiny_config(train={"steps": 6, "eval_every": 2})
    assert train(longer, workdir) == 0
    assert [record["step"] for record in metrics_of(workdir)] == [2, 4, 5, 6]
    assert load(workdir, "last").step == 6


def test_another_recipe_or_text_is_refused(tiny_config, text_file, tmp_path):
    workdir = tmp_path / "run"
    assert train(tiny_config(train={"steps": 2}), workdir) == 0
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"with optimizer.b1 = 0.9, not 0.5: keep it"):
        train(tiny_config(train={"steps": 2}, optimizer={"b1": 0.5}), workdir)
    text_file.write_text(text_file.read_text(encoding="utf-8") + "x", encoding="utf-8")
    with pytest.raises(UserError, match="was trained on another text"):
        train(tiny_config(train={"steps": 2}), workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == files


def test_a_mesh_too_large_is_named(tiny_config):
    with pytest.raises(UserError, match="= 8 x 2 x 1 needs 16 devices, and 8 are here"):
        make_mesh(tiny_config(mesh={"data": 8, "fsdp": 2}, train={"batch_size": 16}).mesh)
