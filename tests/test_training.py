"""The step and the loop: sharding, accumulation, stopping and going on, bit for bit."""

import json
import os
import signal
import timeit
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODERN, make_gpt, some

from gpt_jax import plan
from gpt_jax.config import Config
from gpt_jax.data.batches import TokenWindows
from gpt_jax.data.corpus import load_corpus
from gpt_jax.errors import RunError, UserError
from gpt_jax.interchange.trained_model import load
from gpt_jax.model.loss import loss_of_tokens, next_token_loss
from gpt_jax.model.params import flops_per_token
from gpt_jax.monitor.metrics import read_metrics
from gpt_jax.parallel import execution
from gpt_jax.parallel.mesh import make_mesh, replicated
from gpt_jax.paths import text_file
from gpt_jax.plan import make_plan
from gpt_jax.rng import INIT_STREAM, stream
from gpt_jax.storage.checkpoints import Checkpoints
from gpt_jax.storage.run_folder import checkpoint_folder
from gpt_jax.trainer import evaluator, session
from gpt_jax.trainer.run import train
from gpt_jax.training import loop
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.resume import state_items
from gpt_jax.training.state import abstract_state, init_state
from gpt_jax.training.step import make_train_steps

MESHES = {
    "1": {"data": 1},
    "8x1x1": {"data": 8},
    "2x4x1": {"data": 2, "fsdp": 4},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
}

# Wider than the tiny model, and with dropout: one program for all tests that want either.
WIDE = {"d_model": 32, "context": 8, "dropout": 0.2, "attention_dropout": 0.2}


def make_parts(config: Config):
    corpus = load_corpus(text_file(config.data), config.model.context, config.data.train_fraction)
    mesh = make_mesh(config.mesh)
    model = make_gpt(config.model, corpus.tokenizer.vocab_size, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return corpus, mesh, model, optimizer


def run_steps(config: Config, calls=(4,)):
    """Losses of the steps, the validation loss after them, and the state."""
    corpus, mesh, model, optimizer = make_parts(config)
    state = init_state(model, optimizer, mesh, stream(config.seed, INIT_STREAM))
    plan = make_plan(config)
    # The program of `train`, which the tests need not compile again.
    train_steps = make_train_steps(plan, model, next_token_loss, state, loop.MAX_STEPS_PER_CALL)
    tokens_N = jax.device_put(corpus.train, replicated(mesh))
    source = TokenWindows(tokens_N, config.train.batch_size, config.model.context)
    losses, seed, last_step = [], np.uint32(config.seed), np.int32(config.train.steps)
    for n in calls:
        state, metrics = train_steps(state, source, seed, np.int32(n), last_step)
        losses += metrics["loss"][:n].tolist()
    val = loss_of_tokens(model, state.params, corpus.val, 8)
    return losses, val, state


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_same_losses_on_every_mesh(tiny_config, optimizer):
    results = {}
    for name, mesh in MESHES.items():
        model = MODERN if optimizer == "muon" else {"bias": True}
        settings = {"name": optimizer, "embedding_decay": 0.5}
        config = tiny_config(mesh=mesh, model=model, optimizer=settings)
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


@pytest.mark.parametrize("name", some("muon", "adamw"))
def test_a_checkpoint_moves_between_meshes(tiny_config, tmp_path, name):
    _, mesh, model, optimizer = make_parts(tiny_config(mesh=MESHES["2x2x2"], optimizer={"name": name}))
    rng = np.random.default_rng(0)

    def draw(leaf):
        """Another number in every place."""
        values = rng.permutation(np.prod(leaf.shape, dtype=int)).reshape(leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    state = jax.tree.map(draw, abstract_state(model, optimizer, mesh))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    items = {"params": state.params, "opt_state": state.opt_state}
    checkpoints.save(4, items, {"note": "x"})
    checkpoints.close()
    for mesh_shape in (MESHES["1"], MESHES["8x1x1"], MESHES["2x4x1"]):
        _, mesh, model, optimizer = make_parts(tiny_config(mesh=mesh_shape, optimizer={"name": name}))
        target = abstract_state(model, optimizer, mesh)
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


@pytest.mark.slow
def test_accumulation_changes_nothing_but_rounding(tiny_config):
    whole, whole_val, _ = run_steps(tiny_config())
    parts, parts_val, _ = run_steps(tiny_config(train={"grad_accum_steps": 4}))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    np.testing.assert_allclose(parts_val, whole_val, rtol=1e-5)


def test_how_steps_are_cut_into_calls_changes_no_bit(tiny_config):
    config = tiny_config(model=WIDE)
    one = run_steps(config, (7,))
    many = run_steps(config, (1, 4, 2))
    assert one[0] == many[0]
    assert_same_bits(one[2], many[2])


def train_and_stop(config, workdir, step, monkeypatch, signal_number=signal.SIGINT, **options):
    """Train; raise a real signal in this process when `step` steps are done."""

    def progress(self, record, losses, seconds_left):
        if record["step"] == step:
            os.kill(os.getpid(), signal_number)

    with monkeypatch.context() as patch:
        patch.setattr(session.Terminal, "progress", progress)
        patch.setattr(loop, "SECONDS_PER_CALL", 0.0)  # one step a call, so that it stops right there
        return train(config, workdir, **options)


@cache
def target_of(config):
    """The abstract state of a run with these settings, whose text stays as it is."""
    _, mesh, model, optimizer = make_parts(config)
    return abstract_state(model, optimizer, mesh)


def saved_state(config, workdir, step=None):
    """Everything that a checkpoint holds, the last one where no step is given."""
    checkpoints = Checkpoints(checkpoint_folder(workdir))
    target = target_of(config)
    step = checkpoints.steps()[-1] if step is None else step
    items = checkpoints.restore(step, state_items(target))
    metadata = checkpoints.metadata(step)
    checkpoints.close()
    return items | {"losses": metadata["recent_losses"], "step": step}


def metadata_of(workdir):
    """What the newest checkpoint says beside its arrays."""
    checkpoints = Checkpoints(checkpoint_folder(workdir))
    metadata = checkpoints.metadata(checkpoints.steps()[-1])
    checkpoints.close()
    return metadata


def files_of(workdir):
    """All that a run consists of, to see whether it was touched."""
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != "lock"}


def metrics_of(workdir):
    timing = ("seconds", "tokens_per_second", "mfu")
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in timing} for record in records]


@pytest.mark.parametrize(
    "signal_number, stops, settings",
    [
        (signal.SIGINT, (10, 13), {}),
        pytest.param(
            signal.SIGTERM,
            (4,),
            {"optimizer": {"name": "muon"}, "train": {"grad_accum_steps": 2}, "model": MODERN},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["adamw", "muon_accumulate"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    tiny_config, tmp_path, monkeypatch, capsys, signal_number, stops, settings
):
    config = tiny_config(**settings | {"model": WIDE | settings.get("model", {})})
    whole = tmp_path / "whole"
    assert train(config, whole) == 0
    wanted = saved_state(config, whole)
    assert wanted["step"] == 20
    for k in stops:  # 10 is an evaluation; 4 and 13 are between lines of the metrics
        workdir = tmp_path / f"stopped_{k}"
        status = train_and_stop(config, workdir, k, monkeypatch, signal_number)
        assert status == 128 + signal_number
        stopped = saved_state(config, workdir)
        assert stopped["step"] == k
        if k == 10:  # saved at once and left, or saved in passing: the steps after it touched nothing
            assert_same_bits(stopped, saved_state(config, whole, 10))
        assert train(config, workdir) == 0
        assert_same_bits(saved_state(config, workdir), wanted)
        assert metrics_of(workdir) == metrics_of(whole)
    assert f"saved after step {stops[0]} of 20. The same command resumes it" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_moves_between_meshes(tiny_config, tmp_path, monkeypatch):
    """Stopped on 2x2x2, finished on 8x1x1: the losses are those of one device, to rounding."""
    settings = {
        "model": {"dropout": 0.2}, "train": {"sample_length": 20},
    }  # fmt: skip
    assert train(tiny_config(**settings), tmp_path / "one") == 0
    moved = tmp_path / "moved"
    train_and_stop(tiny_config(mesh=MESHES["2x2x2"], **settings), moved, 12, monkeypatch)
    assert train(tiny_config(mesh=MESHES["8x1x1"], **settings), moved) == 0
    for got, wanted in zip(metrics_of(moved), metrics_of(tmp_path / "one"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_micro_batches_have_the_same_dropout_on_every_mesh(tiny_config):
    settings = {"model": {"dropout": 0.3}, "train": {"grad_accum_steps": 2, "batch_size": 16}}
    wanted, _, _ = run_steps(tiny_config(**settings))
    got, _, _ = run_steps(tiny_config(mesh=MESHES["2x2x2"], **settings))
    np.testing.assert_allclose(got, wanted, rtol=2e-5)


@pytest.mark.slow
def test_a_run_keeps_its_number_of_micro_batches(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(train={"steps": 4, "grad_accum_steps": 4})
    train_and_stop(config, tmp_path / "run", 2, monkeypatch)
    assert train(tiny_config(train={"steps": 4}), tmp_path / "run") == 0
    assert load(tmp_path / "run", "last").config.train.grad_accum_steps == 4


@pytest.mark.slow
def test_a_run_with_automatic_micro_batches_moves_to_more_devices(tiny_config, tmp_path, monkeypatch, capsys):
    """Begun on one device with micro-batches of 4 windows, which eight devices cannot share."""
    monkeypatch.setattr(plan, "CPU_TOKENS", 4 * tiny_config().model.context)
    train_and_stop(tiny_config(train={"batch_size": 16}), tmp_path, 12, monkeypatch)
    assert load(tmp_path, "last").config.train.grad_accum_steps == 4
    config = tiny_config(train={"batch_size": 16}, mesh=MESHES["8x1x1"])
    assert train(config, tmp_path) == 0
    assert "batch   1 micro-batches in an update instead of 4" in capsys.readouterr().out
    assert load(tmp_path, "last").config.train.grad_accum_steps == 1


def test_a_run_keeps_its_precision(tiny_config, tiny_run, tmp_path, monkeypatch, capsys):
    """Begun on a CPU and resumed where a new run would compute in bfloat16, it goes on in float32."""
    config, whole, moved = tiny_config(), tiny_run, tmp_path / "moved"
    assert metadata_of(whole)["compute_dtype"] == "float32"
    train_and_stop(config, moved, 12, monkeypatch)
    monkeypatch.setattr(execution, "auto_dtype", lambda *_: "bfloat16")
    monkeypatch.setattr(plan, "first_device", lambda *_: ("gpu", "9.0"))
    capsys.readouterr()
    assert train(config, moved) == 0
    said = capsys.readouterr().out
    assert ", float32 (the model's matrix products in full float32), " in said.splitlines()[0]
    assert "dtype   keeping float32, the precision of the checkpoint; a new run on this device would" in said
    assert_same_bits(saved_state(config, moved), saved_state(config, whole))
    assert metadata_of(moved)["compute_dtype"] == "float32"
    # The settings still say "auto": whatever samples takes what suits its own device.
    assert load(moved).config.model.dtype == "auto"


@pytest.mark.slow
def test_another_precision_is_taken_where_the_settings_ask_for_it(tiny_config, tmp_path, capsys):
    assert train(tiny_config(), tmp_path) == 0
    config = tiny_config(model={"dtype": "bfloat16"}, train={"steps": 24})
    assert train(config, tmp_path) == 0
    said = capsys.readouterr().out
    assert "dtype   precision changes from float32 to bfloat16, as model.dtype says" in said
    assert metadata_of(tmp_path)["compute_dtype"] == "bfloat16"
    assert train(tiny_config(train={"steps": 28}), tmp_path) == 0
    assert "dtype   keeping bfloat16, the precision of the checkpoint" in capsys.readouterr().out


def test_utilization_refers_to_what_the_cpu_reaches(tiny_config, tiny_run):
    facts = json.loads((tiny_run / "run.json").read_text(encoding="utf-8"))
    a = jnp.ones((512, 512))
    seconds = min(timeit.repeat(lambda: (a @ a).block_until_ready(), number=1, repeat=20))
    assert 0.1 < facts["peak_flops"] * seconds / (2 * 512**3) < 10  # other tests run at the same time
    flops = flops_per_token(tiny_config().model, load(tiny_run).tokenizer.vocab_size)
    for record in read_metrics(tiny_run / "metrics.jsonl"):
        utilization = record["tokens_per_second"] * flops / facts["peak_flops"]
        assert record["mfu"] == pytest.approx(utilization, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_utilization_is_not_recorded_where_the_peak_is_unknown(tiny_config, tmp_path):
    assert train(tiny_config(model={"dtype": "bfloat16"}, train={"steps": 5}), tmp_path) == 0
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["peak_flops"] is None
    assert all("mfu" not in record for record in read_metrics(tmp_path / "metrics.jsonl"))


def test_the_best_checkpoint_outlives_worse_ones(tiny_config, text_file, tmp_path):
    """Validation runs the other way than training: the surer the model, the worse it does there."""
    text_file.write_text("abcd" * 140 + "dcba" * 15, encoding="utf-8")
    config = tiny_config(
        model={"d_model": 64}, train={"steps": 120, "eval_every": 20}, optimizer={"learning_rate": 1e-2}
    )
    assert train(config, tmp_path / "run") == 0
    losses = {r["step"]: r["val_loss"] for r in metrics_of(tmp_path / "run") if "val_loss" in r}
    best = min(losses, key=losses.get)
    assert best < 100 and losses[120] > losses[best] + 0.1
    assert load(tmp_path / "run", "best").step == best
    assert load(tmp_path / "run", "last").step == 120


@pytest.mark.slow
def test_how_often_it_looks_changes_no_bit(tiny_config, tmp_path):
    base = {"train": {"sample_length": 0}, "model": {"dropout": 0.2}}
    often = {"eval_every": 3, "log_every": 1, "save_minutes": 1e-6, "sample_length": 5}
    assert train(tiny_config(**base), tmp_path / "seldom") == 0
    assert train(tiny_config(**base | {"train": often}), tmp_path / "often") == 0
    states = [saved_state(tiny_config(**base), tmp_path / name) for name in ("seldom", "often")]
    for key in ("params", "opt_state"):
        assert_same_bits(states[0][key], states[1][key])
    assert len(metrics_of(tmp_path / "often")) == 20


def test_which_checkpoints_stay(tiny_config, tmp_path):
    """The last two and the best; no candidates are those without a loss, or with NaN for one."""
    _, _, state = run_steps(tiny_config(), ())
    nan = float("nan")
    for part in ([2.0, 1.0, None], [3.0, nan, None, nan, None]):  # opened anew in between
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        first = len(part) % 3  # steps 0, 1, 2, then 2 (there already), 3, 4, 5, 6
        for step, loss in enumerate(part, start=first):
            checkpoints.save(step, {"params": state.params}, {"step": step, "val_loss": loss})
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [1, 5, 6]
    assert checkpoints.best_first() == [1, 6, 5]
    assert checkpoints.metadata(1) == {"step": 1, "val_loss": 1.0}
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
    files = files_of(workdir)
    with pytest.raises(UserError, match=r"with optimizer.b1 = 0.9, not 0.5: keep it"):
        train(tiny_config(train={"steps": 2}, optimizer={"b1": 0.5}), workdir)
    text_file.write_text(text_file.read_text(encoding="utf-8") + "x", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"another text than .*: fingerprint [0-9a-f]{12} then, [0-9a-f]{12} now;"
    ):
        train(tiny_config(train={"steps": 2}), workdir)
    assert files_of(workdir) == files


@pytest.mark.faults
def test_a_validation_loss_that_is_no_number_is_not_saved(tiny_config, tmp_path, monkeypatch):
    assert train(tiny_config(train={"steps": 10}), tmp_path / "run") == 0
    monkeypatch.setattr(evaluator, "loss_of_tokens", lambda *_: float("nan"))
    message = "step 20: the validation loss is nan; the newest checkpoint is that of step 10"
    with pytest.raises(RunError, match=message):
        train(tiny_config(), tmp_path / "run")
    assert Checkpoints(checkpoint_folder(tmp_path / "run")).steps() == [10]


def test_a_mesh_too_large_is_named(tiny_config):
    with pytest.raises(UserError, match="= 8 x 2 x 1 needs 16 devices, and there are 8"):
        make_mesh(tiny_config(mesh={"data": 8, "fsdp": 2}, train={"batch_size": 16}).mesh)
