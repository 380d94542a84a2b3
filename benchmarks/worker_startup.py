"""sample.py or train.py as a user runs it, which also writes when its parts began and ended: see startup.py.

    python worker_startup.py STARTED FILE sample|train ARGUMENT...

Moments are those of `time.monotonic`, which all processes of a machine share.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED, FILE, COMMAND = float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
sys.argv = [f"{COMMAND}.py", *sys.argv[4:]]

import jax  # noqa: E402

from gpt_jax.commands.run_main import run_main  # noqa: E402

if COMMAND == "sample":
    from gpt_jax.commands import sample
else:
    from gpt_jax.commands import train
    from gpt_jax.trainer import run

IMPORTED = time.monotonic()
SPANS: dict[str, list[tuple[float, float]]] = {"data": [], "compile": []}
HITS: list[float] = []  # when a compiled program was found in the cache


def note_compilation(event: str, duration_secs: float, **_: Any) -> None:
    """Tracing, lowering, compiling, or reading from the cache."""
    if event.startswith("/jax/core/compile/"):
        now = time.monotonic()
        SPANS["compile"].append((now - duration_secs, now))


def note_hit(event: str, **_: Any) -> None:
    """A compiled program that was found in the cache."""
    if event == "/jax/compilation_cache/cache_hits":
        HITS.append(time.monotonic())


def timed(read: Callable[..., Any]) -> Callable[..., Any]:
    """A function that reads data, with a note of when."""

    def read_and_note(*arguments: Any, **options: Any) -> Any:
        begun = time.monotonic()
        result = read(*arguments, **options)
        SPANS["data"].append((begun, time.monotonic()))
        return result

    return read_and_note


def main() -> Any:
    """Run the command, and write the moments."""
    try:
        return sample.main() if COMMAND == "sample" else train.main(started=STARTED)
    finally:
        FILE.write_text(json.dumps({"imported": IMPORTED, "hits": HITS, **SPANS}), encoding="utf-8")


jax.monitoring.register_event_duration_secs_listener(note_compilation)
jax.monitoring.register_event_listener(note_hit)
if COMMAND == "sample":
    sample.load = timed(sample.load)
else:
    run.load_corpus = timed(run.load_corpus)
sys.exit(run_main(main))
