"""The profiler trace of some updates, as the real profiler writes it."""

import gzip
import json
import signal

import jax
from test_training import assert_same_bits, metrics_of, saved_state, train_and_stop

from gpt_jax.trainer.run import train
from gpt_jax.training.loop import Callback


def events_of(workdir):
    """The names of the events of the only trace."""
    (folder,) = (workdir / "profile" / "plugins" / "profile").iterdir()
    assert list(folder.glob("*.xplane.pb"))  # for xprof
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_a_trace_has_the_program_and_changes_nothing(tiny_config, tiny_run, tmp_path, capsys):
    """Updates 9 to 12, with the evaluation after 10 between them."""
    config, ends = tiny_config(train={"profile_steps": "9:12"}), []
    callbacks = [Callback(lambda info: ends.append(info.step))]
    assert train(config, tmp_path, callbacks=callbacks) == 0
    assert {8, 10, 12} <= set(ends)
    names = events_of(tmp_path)
    calls = sum("train_steps" in name for name in names)
    assert calls in (2, 4)  # of updates 9 and 10, and 11 and 12; an event has two names in some versions
    assert any("window_losses" in name for name in names)
    assert f"profile {tmp_path}/profile/: for xprof, TensorBoard and Perfetto\n" in capsys.readouterr().out
    assert metrics_of(tmp_path) == metrics_of(tiny_run)
    assert_same_bits(saved_state(config, tmp_path), saved_state(config, tiny_run))


def test_a_run_stopped_within_its_trace(tiny_config, tiny_run, tmp_path, monkeypatch, capsys):
    """The trace ends, and the resumed run, which begins after its first update, makes no other."""
    config = tiny_config(train={"profile_steps": "3:6"})
    assert train_and_stop(config, tmp_path, 4, monkeypatch) == 128 + signal.SIGINT
    assert any("train_steps" in name for name in events_of(tmp_path))
    assert train(config, tmp_path) == 0
    events_of(tmp_path)
    assert capsys.readouterr().out.count("\nprofile ") == 1
    assert metrics_of(tmp_path) == metrics_of(tiny_run)
    assert_same_bits(saved_state(config, tmp_path), saved_state(config, tiny_run))


def test_a_run_resumed_after_its_trace_says_so(tiny_config, tmp_path, monkeypatch, capsys):
    assert train_and_stop(tiny_config(), tmp_path, 4, monkeypatch) == 128 + signal.SIGINT
    assert train(tiny_config(train={"profile_steps": "2:3"}), tmp_path) == 0
    assert "WARNING: no profile: update 2 was made before" in capsys.readouterr().out


def test_where_another_trace_is_under_way_there_is_none(tiny_config, tmp_path, capsys):
    with jax.profiler.trace(str(tmp_path / "other")):
        assert train(tiny_config(train={"profile_steps": "3:6"}), tmp_path / "run") == 0
    assert "WARNING: no profile: " in capsys.readouterr().out and not (tmp_path / "run" / "profile").exists()
