"""Training from Python: `gpt_jax.train(...)`, and `gpt_jax.Trainer` for a run to stop from elsewhere."""

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ml_collections

from gpt_jax.config import Config
from gpt_jax.config_files import read_config
from gpt_jax.errors import UserError
from gpt_jax.interchange.trained_model import TrainedModel, load
from gpt_jax.jax_settings import default_jax_settings
from gpt_jax.paths import ARTIFACTS, expand
from gpt_jax.trainer.run import train as train_run
from gpt_jax.trainer.signals import StopRequest
from gpt_jax.training.loop import Callback, StepInfo
from gpt_jax.training.step import Objective

Settings: TypeAlias = Config | Mapping[str, Any] | ml_collections.ConfigDict | str | Path
Function: TypeAlias = Callback | Callable[[StepInfo], object]


class Trainer:
    """One run of training, in any thread; it leaves nothing behind in the process.

    Attributes:
        config: the settings.
        workdir: the folder of the run.
    """

    def __init__(
        self,
        config: Settings,
        workdir: str | Path | None = None,
        *,
        minutes: float | None = None,
        callbacks: Sequence[Function] = (),
        objective: Objective | None = None,
        **overrides: Any,
    ):
        """Read and check the settings; nothing is written yet.

        Args:
            config: settings, or the path of a config file (see `config_files.py`).
            workdir: the folder of the run, which is resumed if it was begun before. None:
                artifacts/<name of the config file>.
            minutes: make as many steps as fit into this time, `train.steps` at most.
            callbacks: functions of a `StepInfo`, called after each call of the compiled steps, about once a
                second; or `Callback(function, every=N)`, called after every N steps and after the last one.
                What one raises ends the run, which is saved first; the callbacks after it are not called.
            objective: a function (params, model, batch, key) -> a scalar to minimise, see `training/step.py`;
                None: `next_token_loss`. It is not recorded: give it again to resume.
            **overrides: settings by name, such as `**{"train.batch_size": 16}`.

        Raises:
            UserError: a setting is wrong, or there is no `workdir` and no name to make it from.
        """
        self.config = read_config(config, overrides)
        if not workdir:
            if workdir == "" or not isinstance(config, str | Path):
                raise UserError("workdir is missing: name the folder of the run, such as workdir='runs/a'")
            workdir = ARTIFACTS / Path(config).stem
        self.workdir = expand(workdir)
        if minutes is not None and not isinstance(minutes, int | float):
            raise UserError(f"minutes = {minutes!r} must be a number")
        if not isinstance(callbacks, Sequence):
            raise UserError(f"callbacks = {callbacks!r} must be a list of functions")
        self._minutes, self._objective = minutes, objective
        self._callbacks = [call if isinstance(call, Callback) else Callback(call) for call in callbacks]
        self._stop = StopRequest()

    @default_jax_settings()
    def train(self) -> TrainedModel:
        """Train, or resume, the run to its end, or until it is stopped.

        In the main thread, Ctrl-C and SIGTERM save the newest state, and act as usual then: Ctrl-C raises
        KeyboardInterrupt.

        Returns:
            The best model of the run; its `history` has the numbers of the run.

        Raises:
            UserError: bad settings or data, too few `minutes`, the run belongs to another process, or it was
                stopped before there was anything to save.
            RunError: a checkpoint could not be read or saved, or a loss, gradient or update is not finite.
                What was saved before is still there.
        """
        stop = self._stop
        try:
            train_run(self.config, self.workdir, None, self._minutes, self._callbacks, stop, self._objective)
        finally:
            self._stop = StopRequest()  # another call resumes the run
        if stop.signal is signal.SIGINT:
            raise KeyboardInterrupt
        if stop.signal is not None:
            signal.raise_signal(stop.signal)
        return load(self.workdir)

    def stop(self) -> None:
        """End the run soon, as Ctrl-C does: from a callback, or from another thread.

        The newest state is saved, and `train` returns. Calling `train` again resumes the run.
        """
        self._stop.request()


def train(
    config: Settings,
    workdir: str | Path | None = None,
    *,
    minutes: float | None = None,
    callbacks: Sequence[Function] = (),
    objective: Objective | None = None,
    **overrides: Any,
) -> TrainedModel:
    """Train, or resume, a run, and return its best model. Short for `Trainer(...).train()`.

    The arguments are those of `Trainer`:

        model = gpt_jax.train("configs/shakespeare_cpu.py", workdir="runs/a", minutes=5)
        model.generate("ROMEO:", length=200)
    """
    trainer = Trainer(config, workdir, minutes=minutes, callbacks=callbacks, objective=objective, **overrides)
    return trainer.train()
