"""The cache of compiled programs on the disk, and messages while a program compiles.

JAX's persistent compilation cache does the work. This module adds a folder for each kind of CPU and number of
threads, since a program compiled for another machine may compute other bits or not run at all.
"""

import hashlib
import os
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

MAX_BYTES = 2**29  # per folder; JAX evicts the programs that were least recently used
HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"

# Lines of /proc/cpuinfo that decide which programs a CPU can run; other lines change from boot to boot.
CPU_LINES = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features",
)  # fmt: skip

print_at_once = partial(print, flush=True)

_events: Counter[str] = Counter()  # what JAX has reported since `_count_events`


@dataclass
class Compilation:
    """What `compiling` fills in at its end."""

    seconds: float = 0.0  # to trace and compile the program


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder. For a command: it changes JAX in the whole process.

    JAX's own environment variables take precedence: JAX_ENABLE_COMPILATION_CACHE=false turns the cache off,
    and JAX_COMPILATION_CACHE_DIR names another folder.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    _count_events()
    if jax.config.jax_compilation_cache_dir is not None:
        return
    from platformdirs import user_cache_path  # only here: training works without it, but without a cache

    folder = user_cache_path("gpt_jax") / machine_key(_read_cpuinfo(), _n_threads())
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # programs from there are run
        _delete_incomplete(folder)
    except OSError as error:
        print(
            f"note: no compilation cache: {folder} cannot be used ({error.strerror or error})",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    # Keep programs that compile fast too: with a limit, chance would decide what is kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # XLA's own cache, of kernel choices on GPUs, would have no limit.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # On a full disk, for example: JAX compiles the program anyway.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


@contextmanager
def compiling(what: str, write: Any = print_at_once) -> Iterator[Compilation]:
    """Print that `what` is being compiled, then on the same line how long that took.

    After `use_compilation_cache`, it also says whether the program was read from the cache. Around the first
    call of a jitted function, the time includes that call. `write` is called like `print`, also with `end`.
    """
    before, begun = _events.copy(), time.monotonic()
    write(f"compile {what} ...", end="")
    outcome, compilation = "", Compilation()  # an exception only ends the line
    try:
        yield compilation
        events = _events - before
        compilation.seconds = round(time.monotonic() - begun, 3)
        outcome = f" {compilation.seconds:.1f} s"
        if events[HIT] and not events[MISS]:
            outcome += " (read from the cache)"
    finally:
        write(outcome)


def compiling_on_stderr(what: str) -> AbstractContextManager[Compilation]:
    """`compiling` for programs whose result goes to stdout."""
    return compiling(what, partial(print, file=sys.stderr, flush=True))


def machine_key(cpuinfo: str, n_threads: int) -> str:
    """The name of a cache folder: what decides, besides JAX's own key, whether a program can be reused.

    `cpuinfo` is the text of /proc/cpuinfo, or another name of the CPU. `n_threads` are those of JAX's CPU
    client: programs are divided among them when they are compiled.
    """
    first_core = cpuinfo.split("\n\n")[0].splitlines()
    lines = [line for line in first_core if line.split(":")[0].strip() in CPU_LINES] or first_core
    return hashlib.sha256("\n".join([*lines, str(n_threads)]).encode()).hexdigest()[:16]


def _delete_incomplete(folder: Path) -> None:
    """Delete what a kill or a full disk left of a program: it has no time of use, which JAX writes last."""
    # JAX would never replace such a program, and JAX 0.9 would add no others.
    for program in folder.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
            program.unlink(missing_ok=True)


@cache  # only once: JAX has no public way to take a listener back
def _count_events() -> None:
    jax.monitoring.register_event_listener(lambda event, **_: _events.update([event]))


def _read_cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system: use its programs on this machine only
        return f"{platform.machine()} {platform.processor()} {platform.node()}"


def _n_threads() -> int:
    """As JAX's CPU client counts them."""
    threads = os.environ.get("PJRT_NPROC", "")
    if threads.isdecimal():
        return int(threads)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
