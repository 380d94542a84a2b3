"""Stop signals while a run compiles, evaluates, samples or plots, and what the resumed run makes of it."""

import os
import signal
import threading

import pytest
from conftest import some
from test_training import metrics_of

from gpt_jax.model.loss import loss_of_tokens
from gpt_jax.storage.checkpoints import Checkpoints
from gpt_jax.storage.run_folder import checkpoint_folder
from gpt_jax.trainer import evaluator, run, session
from gpt_jax.trainer.run import train

never = threading.Event()


def send():
    os.kill(os.getpid(), signal.SIGTERM)


def block():
    """As a compilation that takes minutes."""
    send()
    never.wait(60)
    raise AssertionError("it was waited for")


def at(calls, function, disturb):
    """`function`, with `disturb` called at the beginning of the call number `calls`."""
    done = []

    def disturbed(*args, **kwargs):
        done.append(function)
        if len(done) == calls:
            disturb()
        return function(*args, **kwargs)

    return disturbed


def between_batches(calls):
    """A `loss_of_tokens` that gets a signal after the first batch of a call."""
    done = []

    def disturbed(model, params, tokens_N, batch_size, between=lambda: None):
        done.append(tokens_N)
        looked = []

        def look():
            looked.append(between)
            if len(done) == calls and len(looked) == 2:
                send()
            between()

        return loss_of_tokens(model, params, tokens_N, batch_size, look)

    return disturbed


def pieces(calls, disturb):
    """A `generate_tokens` that is disturbed before a piece, counted over all samples."""
    generate, done = evaluator.generate_tokens, []

    def disturbed(*args):
        for piece in generate(*args):
            done.append(piece)
            if len(done) == calls:
                disturb()
            yield piece

    return disturbed


# Where: the module, what is replaced there, by what; the step at which the run then stops; whether its
# evaluation is left to the resumed run. Evaluations are at 10 and 20; before the first, the loss function is
# called once, to compile. A sample has three pieces.
CASES = {
    "compile": (run, "compile_steps", lambda: lambda *_: block(), 0, False),
    "evaluation": (evaluator, "loss_of_tokens", lambda: between_batches(2), 10, True),
    "sampling": (evaluator, "generate_tokens", lambda: pieces(2, send), 10, True),
    "plot": (session, "plot_losses", lambda: lambda *_: block(), 10, False),
    "initial state": (run, "init_state", lambda: lambda *_: block(), None, False),
    "compile evaluation": (evaluator, "loss_of_tokens", lambda: at(1, loss_of_tokens, block), 10, True),
    "last evaluation": (evaluator, "loss_of_tokens", lambda: between_batches(3), 20, True),
    "compile sampling": (evaluator, "generate_tokens", lambda: pieces(1, block), 10, True),
    "last sample": (evaluator, "generate_tokens", lambda: pieces(4, send), 20, True),
    "last plot": (session, "plot_losses", lambda: at(2, session.plot_losses, send), 20, False),
}  # fmt: skip


def results(workdir):
    """What must be as in the undisturbed run: all lines, the samples, and the losses of the checkpoints."""
    checkpoints = Checkpoints(checkpoint_folder(workdir))
    names = ("step", "val_loss", "val_loss_part", "best_loss", "since_best", "unfinished", "recent_losses")
    saved = [{name: checkpoints.metadata(step)[name] for name in names} for step in checkpoints.best_first()]
    checkpoints.close()
    samples = [
        line.rpartition(",")[0] if line.startswith("---") else line  # which ends in the time
        for line in (workdir / "samples.txt").read_text(encoding="utf-8").splitlines()
    ]
    return metrics_of(workdir), saved, samples


WHOLE = {}  # what the undisturbed run left, by its settings


def undisturbed(config, workdir):
    """The `results` of the undisturbed run, which is trained once."""
    key = config.train.eval_tokens
    if key not in WHOLE:
        assert train(config, workdir) == 0
        WHOLE[key] = results(workdir)
    return WHOLE[key]


@pytest.mark.parametrize("eval_tokens", some(0, 200), ids=["whole", "part"])
@pytest.mark.parametrize("case", some(*CASES, quick=2))
def test_a_stop_waits_for_nothing_and_the_resumed_run_catches_up(
    tiny_config, tmp_path, monkeypatch, capsys, case, eval_tokens
):
    module, name, make, stopped_at, left = CASES[case]
    config = tiny_config(train={"sample_length": 20, "eval_tokens": eval_tokens})
    wanted = undisturbed(config, tmp_path / "whole")
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, make())
        capsys.readouterr()
        status = train(config, workdir)
    said = capsys.readouterr().out
    if case == "last plot":  # by then all of the run is saved
        assert status == 0 and "done in" in said
    else:
        assert status == 128 + signal.SIGTERM
        if stopped_at is None:
            advice = "Run the same command to begin again"
            assert said.endswith(f"stopped by SIGTERM before the first step. {advice}\n")
        else:
            assert f"stopped by SIGTERM; saved after step {stopped_at} of 20" in said
    if left:
        checkpoints = Checkpoints(checkpoint_folder(workdir))
        metadata = checkpoints.metadata(checkpoints.steps()[-1])
        checkpoints.close()
        assert metadata["step"] == stopped_at and metadata["unfinished"]["step"] == stopped_at
        assert metadata["val_loss"] is metadata["val_loss_part"] is None
        assert metrics_of(workdir)[-1]["step"] < stopped_at
    assert train(config, workdir) == 0
    assert results(workdir) == wanted


@pytest.mark.slow
def test_stopped_again_and_again_in_the_same_evaluation(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(train={"sample_length": 20})
    wanted = undisturbed(config, tmp_path / "whole")
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(evaluator, "loss_of_tokens", between_batches(2))
            assert train(config, tmp_path / "run") == 128 + signal.SIGTERM
    assert train(config, tmp_path / "run") == 0
    assert results(tmp_path / "run") == wanted


def test_stopped_while_the_resumed_run_compiles(tiny_config, tmp_path, monkeypatch):
    """The last evaluation is outstanding until it is done, however often the run is stopped before it."""
    config = tiny_config(train={"sample_length": 20})
    wanted = undisturbed(config, tmp_path / "whole")
    for name, make in (("loss_of_tokens", between_batches(3)), (None, None), (None, None)):
        with monkeypatch.context() as patch:
            if name:
                patch.setattr(evaluator, name, make)
            else:
                patch.setattr(run, "compile_steps", lambda *_: block())
            assert train(config, tmp_path / "run") == 128 + signal.SIGTERM
    assert train(config, tmp_path / "run") == 0
    assert results(tmp_path / "run") == wanted


def test_an_error_in_the_thread_is_raised():
    """What is called in a thread, in order to be interruptible, fails as it would without one."""
    from gpt_jax.trainer.signals import StopRequest

    def fail():
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        StopRequest().during(fail)
    assert StopRequest().during(lambda: 5) == 5
