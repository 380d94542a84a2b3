"""How long a run is (`--minutes`, `train.patience`), and what it is evaluated on (`train.eval_tokens`)."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import make_tiny_config, some, write_text
from test_stop import between_batches
from test_training import assert_same_bits, metadata_of, metrics_of, saved_state, train_and_stop

from gpt_jax.errors import UserError
from gpt_jax.interchange.evaluation import evaluate
from gpt_jax.interchange.exporting import export
from gpt_jax.interchange.trained_model import load
from gpt_jax.storage import checkpoints
from gpt_jax.trainer import evaluator, session
from gpt_jax.trainer.minutes import Pace, TimeLimit
from gpt_jax.trainer.run import train
from gpt_jax.training import loop

PLENTY = 60.0  # minutes


@pytest.fixture
def fourteen_fit(monkeypatch):
    """A machine on which 14 steps fit into the time."""
    monkeypatch.setattr(TimeLimit, "fitting_steps", lambda *_: 14)


@pytest.fixture(scope="module")
def run_of_fourteen(tmp_path_factory):
    """A finished run on such a machine; tests only read it."""
    folder = tmp_path_factory.mktemp("fourteen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TimeLimit, "fitting_steps", lambda *_: 14)
        config = make_tiny_config(write_text(folder / "text.txt"))
        assert train(config, folder / "run", minutes=PLENTY) == 0
    return folder / "run"


def without_choice(workdir):
    """The metrics without the evaluation at the end of the warm-up, after which the number is chosen."""
    records = metrics_of(workdir)
    assert records.pop(0).keys() >= {"val_loss"}
    return records


@pytest.mark.slow
def test_where_all_steps_fit_nothing_changes(tiny_config, tmp_path):
    config = tiny_config(model={"dropout": 0.1})
    assert train(config, tmp_path / "plain") == 0
    assert train(config, tmp_path / "minutes", minutes=PLENTY) == 0
    assert_same_bits(saved_state(config, tmp_path / "minutes"), saved_state(config, tmp_path / "plain"))
    assert without_choice(tmp_path / "minutes") == metrics_of(tmp_path / "plain")


def test_the_run_is_one_of_so_many_steps(tiny_config, tmp_path, capsys, fourteen_fit):
    """Its schedule ends at the chosen step: it is, to the bit, the run with train.steps=14."""
    config, fourteen = tiny_config(), tiny_config(train={"steps": 14})
    assert train(config, tmp_path / "run", minutes=PLENTY) == 0
    assert "steps   14 of 20 steps fit into 60 min: " in capsys.readouterr().out
    assert train(fourteen, tmp_path / "fourteen") == 0
    assert_same_bits(saved_state(config, tmp_path / "run"), saved_state(config, tmp_path / "fourteen"))
    assert without_choice(tmp_path / "run") == metrics_of(tmp_path / "fourteen")
    assert metadata_of(tmp_path / "run")["total_steps"] == 14
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["steps"] == 14


def test_a_resumed_run_keeps_the_number(
    tiny_config, run_of_fourteen, tmp_path, monkeypatch, capsys, fourteen_fit
):
    config, workdir = tiny_config(), tmp_path / "run"
    assert train_and_stop(config, workdir, 9, monkeypatch, minutes=PLENTY) == 130
    monkeypatch.setattr(TimeLimit, "fitting_steps", None)  # it is not chosen again
    capsys.readouterr()
    for minutes in (3.0, None):  # other minutes, or none: the number is that of the first start
        shutil.copytree(workdir, tmp_path / f"copy {minutes}")
        assert train(config, tmp_path / f"copy {minutes}", minutes=minutes) == 0
        assert "resume  after step 9 of 14, as --minutes chose" in capsys.readouterr().out
        assert_same_bits(
            saved_state(config, tmp_path / f"copy {minutes}"), saved_state(config, run_of_fourteen)
        )
        assert metrics_of(tmp_path / f"copy {minutes}") == metrics_of(run_of_fourteen)
    workdir = tmp_path / "copy None"
    assert json.loads((workdir / "run.json").read_text(encoding="utf-8"))["steps"] == 14
    assert train(config, workdir, minutes=3.0) == 0
    said = capsys.readouterr().out
    assert "finished: 14 of 14 steps are done. To train longer, change --config.train.steps" in said
    assert train(tiny_config(train={"steps": 17}), workdir) == 0
    assert metadata_of(workdir)["step"] == 17 and metadata_of(workdir)["total_steps"] is None


@pytest.mark.parametrize("is_in_evaluation", some(True, False))
def test_stopped_before_the_number_is_known_it_measures_again(
    tiny_config, tmp_path, monkeypatch, fourteen_fit, is_in_evaluation
):
    """In the middle of the warm-up of two steps, and in the evaluation at its end."""
    config, workdir = tiny_config(), tmp_path / "run"
    if is_in_evaluation:
        with monkeypatch.context() as patch:
            patch.setattr(evaluator, "loss_of_tokens", between_batches(2))
            assert train(config, workdir, minutes=PLENTY) == 128 + signal.SIGTERM
        assert metadata_of(workdir)["step"] == 2 and metadata_of(workdir)["unfinished"]
    else:
        assert train_and_stop(config, workdir, 1, monkeypatch, minutes=PLENTY) == 130
    assert metadata_of(workdir)["total_steps"] is None
    assert train(config, workdir, minutes=PLENTY) == 0
    assert metadata_of(workdir)["total_steps"] == metadata_of(workdir)["step"] == 14
    assert "val_loss" in metrics_of(workdir)[0]


def test_minutes_that_are_too_few(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"--minutes = 0.001 is too short here: .* at least 4 steps"):
        train(tiny_config(), tmp_path / "run", minutes=0.001)
    assert metadata_of(tmp_path / "run")["step"] == 2  # nothing is lost: it goes on from there
    assert train(tiny_config(), tmp_path / "run", minutes=PLENTY) == 0
    assert metadata_of(tmp_path / "run")["total_steps"] == 20


@pytest.mark.slow
def test_a_callback_that_raises_at_the_end_of_the_warmup(tiny_config, tmp_path):
    def fail(info):
        raise ConnectionError

    with pytest.raises(ConnectionError):
        train(tiny_config(), tmp_path / "run", minutes=PLENTY, callbacks=[loop.Callback(fail, every=2)])
    assert train(tiny_config(), tmp_path / "run", minutes=PLENTY) == 0
    assert metadata_of(tmp_path / "run")["total_steps"] == 20


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_minutes_that_are_no_time(tiny_config, tmp_path, minutes):
    with pytest.raises(UserError, match="must be above 0 and finite"):
        train(tiny_config(), tmp_path / "run", minutes=minutes)
    assert not (tmp_path / "run").exists()


def test_minutes_need_a_warmup_and_a_run_that_is_in_it(tiny_config, tmp_path):
    without = tiny_config(optimizer={"warmup_steps": 0})
    with pytest.raises(UserError, match=r"--minutes = 5 requires optimizer.warmup_steps of 1 or more"):
        train(without, tmp_path / "run", minutes=5)
    assert train(tiny_config(train={"steps": 10}), tmp_path / "run") == 0
    with pytest.raises(
        UserError, match=r"the warm-up of 2 steps of .* is over.* resume it without --minutes"
    ):
        train(tiny_config(), tmp_path / "run", minutes=5)


@pytest.fixture
def overfitting(tiny_config, text_file):
    """Settings whose validation loss soon rises: validation runs the other way than training."""
    text_file.write_text("abcd" * 140 + "dcba" * 15, encoding="utf-8")

    def make(**train):
        return tiny_config(model={"d_model": 64}, train={"steps": 120, "eval_every": 10} | train)

    return make


def losses_of(workdir, name):
    return {record["step"]: record[name] for record in metrics_of(workdir) if name in record}


@pytest.mark.slow
def test_patience(overfitting, tmp_path, monkeypatch, capsys):
    assert train(overfitting(), tmp_path / "whole") == 0
    losses = losses_of(tmp_path / "whole", "val_loss")
    best = min(losses, key=losses.get)
    config, workdir = overfitting(patience=3), tmp_path / "run"
    assert best + 30 < 120
    # Stopped in between, the resumed run counts the evaluations before, even without its metrics.
    assert train_and_stop(config, workdir, best + 15, monkeypatch) == 130
    kept = (workdir / "metrics.jsonl").read_bytes()
    (workdir / "metrics.jsonl").unlink()
    shutil.copytree(workdir, tmp_path / "without metrics")
    assert train(config, tmp_path / "without metrics") == 0
    assert load(tmp_path / "without metrics", "last").step == best + 30
    (workdir / "metrics.jsonl").write_bytes(kept)
    capsys.readouterr()
    assert train(config, workdir) == 0
    said = capsys.readouterr().out
    assert "stopping early: no new best validation loss in 3 evaluations (train.patience)" in said
    assert metrics_of(workdir) == [r for r in metrics_of(tmp_path / "whole") if r["step"] <= best + 30]
    assert load(workdir, "last").step == best + 30 and load(workdir, "best").step == best
    assert train(config, workdir) == 0
    said = capsys.readouterr().out
    assert f"this run is finished: {best + 30} of 120 steps are done. To train longer, raise " in said
    assert "raise --config.train.patience" in said
    assert train(overfitting(patience=4), workdir) == 0
    assert load(workdir, "last").step == best + 40


@pytest.mark.slow
def test_evaluating_a_part(overfitting, text_file, tmp_path, capsys):
    config, workdir = overfitting(eval_tokens=33), tmp_path / "run"
    assert train(config, workdir) == 0
    said = capsys.readouterr().out
    parts, wholes = (losses_of(workdir, name) for name in ("val_loss_part", "val_loss"))
    best = min(parts, key=parts.get)
    assert list(parts) == list(range(10, 121, 10)) and list(wholes) == [best, 120] and best < 120
    # Both by another way: the model that is read back, on the same characters.
    text = text_file.read_text(encoding="utf-8")
    first_33 = text[int(0.9 * len(text)) :][:33]
    for which, step in (("best", best), ("last", 120)):
        model = load(workdir, which)
        assert model.step == step
        assert evaluate(model).loss == pytest.approx(wholes[step], rel=1e-5)
        assert model.loss(first_33) == pytest.approx(parts[step], rel=1e-5) != wholes[step]
        assert (model.metadata.val_loss, model.metadata.val_loss_part) == (wholes[step], parts[step])
    assert losses_of(workdir, "val_bpc")[best] == pytest.approx(wholes[best] / np.log(2))
    part = r"first 33 tokens of the validation split [\d.]+"
    assert re.search(rf"^step 10: training batches [\d.]+, {part}, gap", said, flags=re.M)
    assert re.search(rf"^step 120: .*, {part}, whole validation split [\d.]+ \(", said, flags=re.M)
    assert f"best {wholes[best]:.4f} at step {best} (the lowest on the part that was evaluated)" in said
    assert train(config, workdir) == 0
    assert "this run is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_that_is_all_is_the_headline(tiny_config, tmp_path):
    assert train(tiny_config(), tmp_path / "all") == 0
    assert train(tiny_config(train={"eval_tokens": 10**6}), tmp_path / "more") == 0
    assert metrics_of(tmp_path / "more") == metrics_of(tmp_path / "all")


def test_a_run_keeps_what_it_is_evaluated_on(tiny_config, tmp_path):
    """Losses of a part and of the whole cannot be compared."""
    assert train(tiny_config(train={"steps": 10}), tmp_path / "run") == 0
    with pytest.raises(UserError, match=r"holds a run with train.eval_tokens = 0, not 50"):
        train(tiny_config(train={"eval_tokens": 50}), tmp_path / "run")


@pytest.mark.slow
def test_a_part_whose_best_checkpoint_is_still_being_saved(overfitting, tmp_path, monkeypatch):
    """The best is the newest but one, and its save takes longer than the rest of the run."""
    seal = checkpoints.seal

    def slow_seal(folder):
        time.sleep(1.0)
        seal(folder)

    monkeypatch.setattr(checkpoints, "seal", slow_seal)
    config, workdir = overfitting(eval_tokens=33, steps=40, eval_every=20), tmp_path / "run"
    assert train(config, workdir) == 0
    assert list(losses_of(workdir, "val_loss")) == [20, 40]


def test_a_chosen_length_is_in_the_card(run_of_fourteen, tmp_path):
    """The exported model is, by its card and its settings, one of 14 steps."""
    exported = export(load(run_of_fourteen, "last"), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| step | 14 of 14 (last checkpoint) |" in card and "train.steps = 14" in card
    assert exported.config.train.steps == load(tmp_path / "model").config.train.steps == 14


def test_the_promised_time_includes_the_evaluations(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "SECONDS_PER_CALL", 0.0)  # one step a call
    monkeypatch.setattr(session, "SECONDS_PER_CALL", 0.0)  # else only long calls lead to a promise
    monkeypatch.setattr(Pace, "seconds", lambda pace, *_: 1000 * bool(pace.per_evaluation) + 1234)
    assert train(tiny_config(), tmp_path / "run") == 0
    said = capsys.readouterr().out
    promises = re.findall(r"^time    about (.*) from here to the end, evaluations included", said, flags=re.M)
    assert promises == ["37 min 14 s"]
