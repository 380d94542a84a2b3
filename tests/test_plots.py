"""Pictures of runs: what is drawn of usual runs and of odd ones, and the command."""

import json
import math
import re

import numpy as np
import pytest

from gpt_jax.commands.plots import main
from gpt_jax.data.baselines import baseline_losses
from gpt_jax.data.corpus import load_corpus
from gpt_jax.errors import UserError
from gpt_jax.monitor.plots import draw_runs
from gpt_jax.records import RunHistory
from gpt_jax.storage.run_folder import read_history


def record(step, seconds, loss=2.0, val_loss=None, **more):
    """A line of metrics.jsonl at 100 tokens per second."""
    made = {"step": step, "seconds": seconds, "train_loss": loss, "learning_rate": 0.1, "grad_norm": 1.0}
    return made | {"tokens_per_second": 100.0} | more | ({} if val_loss is None else {"val_loss": val_loss})


def history(records, name="a", baselines=None, **more):
    facts = {"tokens_per_step": 10, "has_dropout": False, "unit": "nats per character"} | more
    return RunHistory(name, records, baselines={} if baselines is None else baselines, **facts)


def lines(axes):
    return [list(map(tuple, line.get_xydata())) for line in axes.get_lines()]


RECORDS = [
    record(10, 1.0, 3.0),
    record(20, 2.0, 2.0, 2.5),
    record(30, 3.0, 1.5, 2.2),
    record(40, 4.0, 1.0, 2.4),
]


def test_the_lines_of_a_run():
    loss, gap, rate, norm, speed = draw_runs([history(RECORDS)]).axes
    circle, training, validation = lines(loss)
    assert circle == [(30, 2.2)] and training == [(10, 3), (20, 2), (30, 1.5), (40, 1)]
    assert validation == [(20, 2.5), (30, 2.2), (40, 2.4)]
    np.testing.assert_allclose(lines(gap)[0], [(20, 0.5), (30, 0.7), (40, 1.4)])
    for axes, value in ((rate, 0.1), (norm, 1), (speed, 100)):
        assert lines(axes) == [[(step, value) for step in (10, 20, 30, 40)]]
    names = [text.get_text() for text in loss.get_legend().get_texts()]
    assert names == ["training", "validation: best 2.2000 at step 30"]
    assert loss.get_ylabel() == "loss (nats per character)"


def test_the_training_loss_of_a_model_with_dropout_is_named():
    legend = draw_runs([history(RECORDS, has_dropout=True)]).axes[0].get_legend()
    assert legend.get_texts()[0].get_text() == "training, with dropout"


@pytest.mark.parametrize(("axis", "last"), [("step", 40), ("tokens", 40 * 10 / 1e6), ("minutes", 4 / 60)])
def test_horizontal_axes(axis, last):
    for axes in draw_runs([history(RECORDS)], axis).axes:
        assert max(x for line in axes.get_lines() for x in line.get_xdata()) in (pytest.approx(last), 1)


def test_the_range_begins_where_it_matters():
    """The steep beginning is left out, and a baseline above it only named."""
    steep = [record(1, 0.1, 4.2), *RECORDS]
    axes = draw_runs([history(steep, baselines={"uniform": 4.17, "bigram": 2.6})]).axes[0]
    bottom, top = axes.get_ylim()
    assert bottom < 1 and 2.6 < top < 3
    texts = {text.get_text(): text for text in axes.texts}
    assert texts.keys() == {"↑ uniform 4.17", "bigram 2.60"}
    assert [2.6, 2.6] in [list(line.get_ydata()) for line in axes.get_lines()]


def test_a_bigram_model_that_is_better_is_shown():
    axes = draw_runs([history(RECORDS, baselines={"uniform": 0.69, "bigram": 0.5})]).axes[0]
    assert axes.get_ylim()[0] < 0.5 and len(axes.texts) == 2


def test_baselines_of_runs_that_differ_are_left_out():
    runs = [history(RECORDS, baselines={"uniform": loss}) for loss in (1.5, 2.0)]
    assert not draw_runs(runs).axes[0].texts


def test_minutes_of_a_resumed_run():
    """Seconds begin anew in each process, which shows even where they have grown."""
    seconds = [10, 20, 5, 15, 16, 26]  # the third process took 16 s until its first line; 10 s are ten steps
    resumed = [record(100 * (i + 1), s) for i, s in enumerate(seconds)]
    assert np.diff([0, *history(resumed).minutes()]) * 60 == pytest.approx([10, 10, 5, 10, 16, 10])


def test_nan_and_a_single_evaluation():
    nan = history([record(10, 1.0), record(20, 2.0, math.nan, 2.0), record(30, 3.0, math.nan)])
    single = history([record(10, 1.0, 2.0, 2.1)])
    nothing_finite = history([record(10, 1.0, math.nan)])
    for run in (nan, single, nothing_finite):
        figure = draw_runs([run])
        figure.draw_without_rendering()
        assert all(np.isfinite(axes.get_ylim()).all() for axes in figure.axes)
    loss = draw_runs([single]).axes[0]
    assert [line.get_marker() for line in loss.get_lines()] == [
        "o",
        "o",
        "o",
    ]  # a line of one point is not seen


def test_ten_runs():
    figure = draw_runs([history(RECORDS, name=f"run ${i}") for i in range(10)])
    figure.draw_without_rendering()
    assert len(lines(figure.axes[0])) == 30
    (legend,) = figure.legends
    assert legend.get_texts()[9].get_text() == "run $9: best 2.2000 at step 30"
    assert "10 runs" in figure.axes[0].get_title()


def test_baselines_are_those_of_the_data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 100, encoding="utf-8")
    losses = baseline_losses(load_corpus(path, context=8, train_fraction=0.5))
    assert losses == pytest.approx({"uniform": math.log(2), "bigram": 0}, abs=1e-3)


def test_a_run_draws_itself_and_the_command_draws_it(tiny_run, tmp_path, capsys):
    facts = json.loads((tiny_run / "run.json").read_text(encoding="utf-8"))
    assert facts["baselines"].keys() == {"uniform", "bigram"}
    run = read_history(tiny_run)
    assert run.baselines == facts["baselines"] and run.unit == "nats per character"
    for name in ("a.png", "b.svg"):
        assert command("--workdir", tiny_run, tiny_run, "--x", "minutes", "--out", tmp_path / name) == 0
        assert capsys.readouterr().out == f"written    {tmp_path / name}\n"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "b.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert len(list(tmp_path.iterdir())) == 2


def command(*arguments):
    return main([str(argument) for argument in arguments])


def test_bad_input_of_the_command(tiny_run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORDS[0]) + "\n", encoding="utf-8")
    out = tmp_path / "none" / "a.png"
    bad = {
        f"{tmp_path / 'config.json'} cannot be used (FileNotFoundError": ["--workdir", tmp_path],
        f"no numbers in {tmp_path / 'a' / 'metrics.jsonl'}: name the folder": ["--workdir", tmp_path / "a"],
        "--out a.jpg must end in .png or .svg": ["--workdir", tiny_run, "--out", "a.jpg"],
        f"the folder {tmp_path / 'none'} does not exist": ["--workdir", tiny_run, "--out", out],
    }
    for message, arguments in bad.items():
        with pytest.raises(UserError, match=re.escape(message)):
            command(*arguments)
