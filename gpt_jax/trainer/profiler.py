"""A profiler trace of some updates of a run (`train.profile_steps`)."""

from collections.abc import Callable
from pathlib import Path

import jax

from gpt_jax.paths import relative_to_root
from gpt_jax.training.loop import StepInfo


class Profiler:
    """Traces the calls that make some updates, and what is done between them. An error is only a warning."""

    def __init__(self, updates: tuple[int, int], folder: Path, show: Callable[[str], None]):
        """`updates`: the first and the last one, 0 and 0 for none; `show` gets a line at the end."""
        self.ends = (updates[0] - 1, updates[1])  # updates done: a call has to end at each
        self._folder, self._show, self._is_on = folder, show, False

    def begin_after(self, info: StepInfo) -> None:
        """Begin the trace if the next call makes the first update."""
        if info.step == self.ends[0] and not info.is_last:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # an evaluation between the calls would be a million events
            try:
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
                self._is_on = True
            except Exception as error:  # another trace is under way, for example
                self._show(f"WARNING: no profile: {error}")

    def end(self) -> None:
        """End the trace, if it is under way, and say where it is."""
        if self._is_on:
            self._is_on = False
            try:
                jax.profiler.stop_trace()
                self._show(f"profile {relative_to_root(self._folder)}/: for xprof, TensorBoard and Perfetto")
            except Exception as error:  # a full disk, for example
                self._show(f"WARNING: no profile: {error}")
