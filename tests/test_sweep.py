"""Runs that are trained at once are the runs that they are alone."""

import json
import runpy

import numpy as np
import pytest
from sweep import all_settings, read_lines, sweep, with_settings

from gpt_jax.config import REPOSITORY, Config
from gpt_jax.errors import UserError
from gpt_jax.metrics import read_metrics
from gpt_jax.trainer import train


@pytest.fixture
def base(tiny_config):
    return tiny_config(train={"steps": 6, "eval_every": 3, "log_every": 3})


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
        train(config, tmp_path / f"run{i}")
        alone = [r for r in read_metrics(tmp_path / f"run{i}" / "metrics.jsonl") if "val_loss" in r]
        assert [step for step, _ in line["evaluations"]] == [r["step"] for r in alone] == [3, 6]
        losses = [loss for _, loss in line["evaluations"]]
        np.testing.assert_allclose(losses, [r["val_loss"] for r in alone], atol=1e-4)


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


def test_a_sweep_goes_on_where_it_was(base, tmp_path, capsys):
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
    config = Config.from_dict(runpy.run_path(str(REPOSITORY / "configs" / "smoke.py"))["get_config"]())
    with pytest.raises(UserError, match=next(iter(settings))):
        with_settings(config, settings, seed=1)
