"""Runs that are trained at once are the runs that they are alone."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
from conftest import some
from sweep import all_settings, print_table, read_lines, sweep, with_settings

from gpt_jax.config import Config, flatten
from gpt_jax.errors import UserError
from gpt_jax.monitor.metrics import read_metrics
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.trainer.run import train

SMOKE = REPOSITORY / "configs" / "smoke.py"


@pytest.fixture
def base(tiny_config):
    return tiny_config(train={"steps": 6, "eval_every": 3, "log_every": 3})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ({}, [{"optimizer.learning_rate": 0.01}, {"optimizer.learning_rate": 0.03}]),
        (
            {"optimizer.name": "muon", "optimizer.embedding_decay": 0.5},
            [
                {"optimizer.weight_decay": 0.0, "optimizer.muon_learning_rate": 0.02},
                {"optimizer.weight_decay": 0.5, "optimizer.muon_learning_rate": 0.05},
            ],
        ),
    ],
    ids=["adamw", "muon"],
)
def test_runs_trained_at_once_end_as_alone(base, tmp_path, settings, points):
    base = with_settings(base, settings, seed=1)
    sweep(base, "tiny", points, [1, 2], tmp_path / "at_once.jsonl", together=4)
    lines = read_lines(tmp_path / "at_once.jsonl")
    assert [line["together"] for line in lines] == [4] * 4
    assert len({line["val_loss"] for line in lines}) == 4
    for i, line in enumerate(lines):
        config = with_settings(base, line["settings"], line["seed"])
        defaults = flatten(Config())
        assert line["not_default"] == {k: v for k, v in flatten(config).items() if v != defaults[k]}
        train(config, tmp_path / f"run{i}")
        alone = [r for r in read_metrics(tmp_path / f"run{i}" / "metrics.jsonl") if "val_loss" in r]
        assert [step for step, _ in line["evaluations"]] == [r["step"] for r in alone] == [3, 6]
        losses = [loss for _, loss in line["evaluations"]]
        np.testing.assert_allclose(losses, [r["val_loss"] for r in alone], atol=1e-4)


@pytest.mark.slow
def test_a_run_trains_on_the_text_that_its_settings_name(base, tmp_path):
    points = []
    for name, text in (("dog", "the lazy dog sleeps. "), ("fox", "a quick fox jumps over it! ")):
        (tmp_path / name).write_text(text * 100, encoding="utf-8")
        points.append({"data.path": str(tmp_path / name)})
    sweep(base, "tiny", points, [1], tmp_path / "sweep.jsonl", together=2)
    lines = read_lines(tmp_path / "sweep.jsonl")
    assert len({line["val_loss"] for line in lines}) == 2
    for i, line in enumerate(lines):
        train(with_settings(base, points[i], seed=1), tmp_path / f"run{i}")
        alone = read_metrics(tmp_path / f"run{i}" / "metrics.jsonl")[-1]["val_loss"]
        assert line["val_loss"] == pytest.approx(alone, abs=1e-4)


@pytest.mark.slow
def test_a_run_that_is_not_finite_has_no_loss(base, tmp_path, capsys):
    points = [{"optimizer.learning_rate": 0.01}, {"optimizer.learning_rate": 1e38}]
    sweep(base, "tiny", points, [1], tmp_path / "sweep.jsonl", together=2)
    good, bad = read_lines(tmp_path / "sweep.jsonl")
    assert good["val_loss"] > 0 and bad["val_loss"] is None
    assert [loss for _, loss in bad["evaluations"]] == [None, None]
    print_table([bad, good])
    first, last = capsys.readouterr().out.splitlines()[-2:]
    assert first.split() == [f"{good['val_loss']:.4f}", "0.0000", "1", "tiny", "optimizer.learning_rate=0.01"]
    assert last.split()[:2] == ["inf", "inf"]


def test_the_table_has_means_and_spreads(tmp_path):
    file = tmp_path / "sweep.jsonl"
    losses = [("a", 2.0), ("b", 1.0), ("a", 2.5), ("b", 1.75), ("a", 3.0)]
    file.write_text(
        "".join(
            json.dumps({"config": name, "settings": {"model.n_layer": 2}, "seed": seed, "val_loss": loss})
            + "\n"
            for seed, (name, loss) in enumerate(losses)
        )
    )
    shown = sweep_command("--out", file, "--show").stdout.splitlines()
    assert [line.split() for line in shown[1:]] == [
        ["1.3750", "0.7500", "2", "b", "model.n_layer=2"],
        ["2.5000", "1.0000", "3", "a", "model.n_layer=2"],
    ]


@pytest.mark.parametrize(
    "arguments, message",
    some(
        (
            ("--config", SMOKE, "--out", "no/folder/x.jsonl"),
            "out = no/folder/x.jsonl cannot be written: No such",
        ),
        (("--config", SMOKE, "--out", "torn.jsonl"), "out = torn.jsonl: line 2 is not a run: delete it"),
        (("--out", "other.jsonl", "--show"), "out = other.jsonl: line 1 is not a run: delete it"),
        (("--config", SMOKE, "--out", "x.jsonl", "--together", "0"), "together = 0 must be 1 or above"),
        (("--config", SMOKE, "--out", "x.jsonl", "--variant", "n_layer"), "'n_layer' is not a setting"),
        (("--out", "x.jsonl"), "--config is missing"),
    ),
)
def test_what_cannot_be_swept_is_one_line(tmp_path, arguments, message):
    (tmp_path / "torn.jsonl").write_text(
        '{"config": "smoke", "settings": {}, "seed": 1, "val_loss": 3.0}\n{"config": "sm'
    )
    (tmp_path / "other.jsonl").write_text('{"step": 1}\n')
    done = sweep_command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def sweep_command(*arguments, cwd=None):
    command = [sys.executable, REPOSITORY / "benchmarks" / "sweep.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, encoding="utf-8", cwd=cwd, timeout=600)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was(base, tmp_path):
    out = tmp_path / "sweep.jsonl"
    sweep(base, "tiny", [{}], [1], out, together=1)
    first = out.read_text(encoding="utf-8")
    sweep(base, "tiny", [{}, {"model.n_layer": 2}], [1, 2], out, together=2)
    assert out.read_text(encoding="utf-8").startswith(first)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    runs = [(line["settings"].get("model.n_layer", 1), line["seed"], line["together"]) for line in lines]
    assert runs == [(1, 1, 1), (1, 2, 1), (2, 1, 2), (2, 2, 2)]


def test_grids_multiply():
    points = list(all_settings(["a.x=1,2"], ["b.y=True", "b.y=False c.z=relu2"], ["a.w=0.5"]))
    assert points == [
        {"a.w": 0.5, "a.x": x, **rest}
        for x in (1, 2)
        for rest in ({"b.y": True}, {"b.y": False, "c.z": "relu2"})
    ]


@pytest.mark.parametrize("settings", [{"model.nonsense": 1}, {"nonsense.x": 1}, {"model.n_layer": "two"}])
def test_bad_settings_are_named(settings):
    config = Config.from_dict(runpy.run_path(str(SMOKE))["get_config"]())
    with pytest.raises(UserError, match=next(iter(settings))):
        with_settings(config, settings, seed=1)
