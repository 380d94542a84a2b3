"""Training from Python: `gpt_jax.train` and `gpt_jax.Trainer`."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import jax
import ml_collections
import pytest
from conftest import some
from test_training import WIDE, assert_same_bits, metrics_of, saved_state

import gpt_jax
from gpt_jax.config_files import read_config
from gpt_jax.errors import UserError
from gpt_jax.paths import ROOT as REPOSITORY
from gpt_jax.trainer.run import train as train_run


def test_it_trains_and_returns_the_best_model(tiny_config, tmp_path):
    config, seen, at_fives = tiny_config(), [], []
    model = gpt_jax.train(
        config, tmp_path / "run",
        callbacks=[seen.append, gpt_jax.Callback(lambda info: at_fives.append(info.step), every=3)],
        **{"train.log_every": 4},
    )  # fmt: skip
    assert isinstance(model, gpt_jax.TrainedModel) and model.config.train.log_every == 4
    assert at_fives == [3, 6, 9, 12, 15, 18, 20]
    assert seen[-1].step == seen[-1].last_step == 20 and seen[-1].is_last
    assert seen[-1].record["val_loss"] == model.history[-1]["val_loss"]
    assert [line["step"] for line in model.history] == [4, 8, 10, 12, 16, 20]
    assert len(model.generate("to be", length=5)) == 5
    # Callbacks change nothing: it is the run of the command.
    assert train_run(replace(config, train=replace(config.train, log_every=4)), tmp_path / "plain") == 0
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "plain")
    assert_same_bits(saved_state(config, tmp_path / "run"), saved_state(config, tmp_path / "plain"))


def test_settings_may_come_from_anywhere(tiny_config, tmp_path):
    config = tiny_config()
    python = tmp_path / "my.py"
    python.write_text(
        f"import ml_collections\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({config.to_dict()!r})\n",
        encoding="utf-8",
    )
    stored = tmp_path / "config.json"
    stored.write_text(config.to_json(), encoding="utf-8")
    exported = tmp_path / "model.json"
    exported.write_text(json.dumps({"config": config.to_dict(), "step": 3}), encoding="utf-8")
    for old in ("run_v2/config.json", "export_v2/model.json"):  # with settings that are gone
        assert gpt_jax.Trainer(REPOSITORY / "tests" / "data" / old, tmp_path / "run").config.model.n_layer
    values = config.to_dict()
    sources = (config, values, ml_collections.ConfigDict(values), python, str(stored), exported)
    wanted = replace(config, train=replace(config.train, steps=7))
    for source in sources:
        assert gpt_jax.Trainer(source, tmp_path / "run", **{"train.steps": 7}).config == wanted
    assert gpt_jax.Trainer(python).workdir == REPOSITORY / "artifacts" / "my"
    with pytest.raises(UserError, match="workdir is missing"):
        gpt_jax.Trainer(config)
    with pytest.raises(UserError, match=r"unknown setting train.step: did you mean train.steps\?"):
        gpt_jax.Trainer(config, tmp_path / "run", **{"train.step": 7})
    with pytest.raises(UserError, match=r"train\.steps = '7' must be"):
        gpt_jax.Trainer(config, tmp_path / "run", **{"train.steps": "7"})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "does not exist"),
        ("x = (", r"line 1: '\(' was never closed"),
        ("x = 1\ny = x / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("import nothing_at_all", "line 1: ModuleNotFoundError: No module named 'nothing_at_all'"),
        ("batch_size = 12", "has no get_config().*nanoGPT's settings have other names here"),
        ("def get_config():\n    return 3", r"get_config\(\) returned int"),
        ("def get_config():\n    return {}['a']", "line 2: KeyError: 'a'"),
    ],
    ids=str,
)
def test_a_config_file_that_cannot_be_used(text, message, tmp_path):
    path = tmp_path / "my.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        read_config(path)
    assert str(error.value).startswith(f"config file {path}") and "\n" not in str(error.value)


def test_two_runs_of_different_shape_in_one_process_and_in_a_thread(tiny_config, tiny_run, tmp_path):
    """Both are, to the bit, the runs of the command; no global state is left behind."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    before = (handlers, sys.stdout, sys.stderr, jax.config.values.copy())
    configs = {"small": tiny_config(), "wide": tiny_config(model=WIDE)}
    models = {}
    for name, config in configs.items():
        work = threading.Thread(
            target=lambda name=name, config=config: models.update(
                {name: gpt_jax.train(config, tmp_path / name)}
            )
        )
        work.start()
        work.join()
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    assert before == (handlers, sys.stdout, sys.stderr, jax.config.values.copy())
    assert models["wide"].params["final_norm"]["scale"].shape == (32,)
    assert train_run(configs["wide"], tmp_path / "again") == 0
    for name, again in (("small", tiny_run), ("wide", tmp_path / "again")):
        assert metrics_of(tmp_path / name) == metrics_of(again)
        assert_same_bits(saved_state(configs[name], tmp_path / name), saved_state(configs[name], again))


def test_stop_saves_and_another_trainer_goes_on(tiny_config, tiny_run, tmp_path):
    config = tiny_config()
    stops = gpt_jax.Callback(lambda info: trainer.stop() if info.step == 6 else None, every=3)
    trainer = gpt_jax.Trainer(config, tmp_path / "run", callbacks=[stops])
    assert trainer.train().step == 6
    assert gpt_jax.train(config, tmp_path / "run").history[-1]["step"] == 20
    assert metrics_of(tmp_path / "run") == metrics_of(tiny_run)
    assert_same_bits(saved_state(config, tmp_path / "run"), saved_state(config, tiny_run))


@pytest.mark.parametrize(
    "error", some(ConnectionError("it is down"), KeyboardInterrupt(), ZeroDivisionError())
)
@pytest.mark.parametrize("step", some(6, 10, 20))
def test_what_a_callback_raises_ends_the_run_which_is_saved(tiny_config, tiny_run, tmp_path, step, error):
    """Between evaluations, at one, and at the last step."""

    def fail(info):
        if info.step == step:
            raise error

    config = tiny_config()
    with pytest.raises(type(error)) as raised:
        gpt_jax.train(config, tmp_path / "run", callbacks=[gpt_jax.Callback(fail, every=2)])
    assert raised.value is error
    assert gpt_jax.load(tmp_path / "run", "last").step == step
    gpt_jax.train(config, tmp_path / "run")
    assert metrics_of(tmp_path / "run") == metrics_of(tiny_run)
    assert_same_bits(saved_state(config, tmp_path / "run"), saved_state(config, tiny_run))


def test_a_callback_cannot_change_the_run(tiny_config, tmp_path):
    def meddle(info):
        info.is_last, info.last_step = True, 3
        info.record["train_loss"] = -1.0

    model = gpt_jax.train(tiny_config(), tmp_path / "run", callbacks=[meddle])
    assert model.history[-1]["step"] == 20 and all(line["train_loss"] > 0 for line in model.history)


@pytest.mark.slow
def test_minutes_include_the_callbacks(tiny_config, tmp_path, capsys):
    """A tenth of a second after each of at most 400 steps: so many do not fit into half a minute."""
    waits = gpt_jax.Callback(lambda info: time.sleep(0.1), every=1)
    config = tiny_config(train={"steps": 400, "eval_every": 400})
    begun = time.monotonic()
    gpt_jax.train(config, tmp_path / "run", minutes=0.5, callbacks=[waits])
    (fitting,) = re.findall(r"^steps   (\d+) of 400 steps fit", capsys.readouterr().out, flags=re.M)
    assert int(fitting) < 300 and time.monotonic() - begun < 60  # without the callbacks all of them would


def test_a_trainer_can_be_stopped_from_another_thread_and_used_again(tiny_config, tmp_path):
    config, reached = tiny_config(), threading.Event()
    trainer = gpt_jax.Trainer(
        config, tmp_path / "run", callbacks=[lambda info: reached.set() or time.sleep(0.2)]
    )
    models = []
    work = threading.Thread(target=lambda: models.append(trainer.train()))
    work.start()
    assert reached.wait(120)
    trainer.stop()
    work.join(120)
    assert models[0].history == [] or models[0].history[-1]["step"] < 20
    assert trainer.train().history[-1]["step"] == 20


def test_another_objective(tiny_config, tiny_run, tmp_path):
    """Training minimises what is asked for: here the square of each parameter."""

    def decay(params, model, batch, key):
        return sum(jax.numpy.sum(leaf**2) for leaf in jax.tree.leaves(params))

    config = tiny_config(train={"steps": 40, "eval_every": 40})
    model = gpt_jax.train(config, tmp_path / "run", objective=decay)
    losses = [line["train_loss"] for line in model.history]
    assert losses[-1] < 0.8 * losses[0]
    plain = gpt_jax.load(tiny_run)
    size = [sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(m.params)) for m in (model, plain)]
    assert size[0] < 0.8 * size[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"config": None}, "config = None must be settings, or the path of a config file"),
        ({"config": {"train": 3}, "train.steps": 5}, "train = 3 must be a group of settings"),
        ({"workdir": ""}, "workdir is missing"),
        ({"minutes": "5"}, "minutes = '5' must be a number"),
        ({"callbacks": print}, "callbacks = <built-in function print> must be a list of functions"),
        ({"callbacks": [None]}, "callback None must be a function of a StepInfo"),
    ],
    ids=str,
)
def test_arguments_that_are_wrong(tiny_config, tmp_path, arguments, message):
    arguments = {"config": tiny_config(), "workdir": tmp_path / "run"} | arguments
    with pytest.raises(UserError, match=re.escape(message)):
        gpt_jax.Trainer(**arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("every", [-1, 0.5, True])
def test_an_interval_that_is_none(every):
    with pytest.raises(UserError, match="of a callback must be a whole number, 0 or above"):
        gpt_jax.Callback(print, every)


def test_ctrl_c_saves_and_raises_keyboard_interrupt(tiny_config, tmp_path):
    def interrupt(info):
        if info.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        gpt_jax.train(tiny_config(), tmp_path / "run", callbacks=[gpt_jax.Callback(interrupt, every=3)])
    assert gpt_jax.load(tmp_path / "run", "last").step == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


TERMINATED = """
import os, signal, sys
import gpt_jax
def kill(info):
    if info.step == 6:
        os.kill(os.getpid(), signal.SIGTERM)
gpt_jax.train(sys.argv[1], sys.argv[2], callbacks=[gpt_jax.Callback(kill, every=3)])
print("not reached")
"""


@pytest.mark.slow
def test_sigterm_saves_and_ends_the_process(tiny_config, tmp_path):
    (tmp_path / "config.json").write_text(tiny_config().to_json(), encoding="utf-8")
    command = [sys.executable, "-c", TERMINATED, tmp_path / "config.json", tmp_path / "run"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert "saved after step 6 of 20" in done.stdout and "not reached" not in done.stdout
    assert gpt_jax.load(tmp_path / "run", "last").step == 6


def test_a_run_stopped_before_its_first_step_has_no_model(tiny_config, tmp_path):
    trainer = gpt_jax.Trainer(tiny_config(), tmp_path / "run")
    trainer.stop()
    with pytest.raises(UserError, match="no trained model in"):
        trainer.train()


def test_the_module_of_the_old_command_is_not_the_function():
    with pytest.raises(ImportError, match=r"call gpt_jax\.train"):
        importlib.import_module("gpt_jax.train")
    assert callable(gpt_jax.train)
    assert {"train", "Trainer", "StepInfo", "Callback"} <= set(dir(gpt_jax.trainer.trainer))
