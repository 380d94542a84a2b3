"""The cache of compiled programs on the disk, and messages while a program compiles.

JAX's persistent compilation cache does the work. This module adds a folder for each kind of CPU and number of
threads, since a program compiled for another machine may compute other bits or not run at all; and a checksum
for each file, since JAX does not notice all damage. If the folder cannot be used, a note says so.
"""

import atexit
import hashlib
import os
import platform
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock

from gpt_jax.storage.integrity import checksum

MAX_BYTES = 2**29  # per folder; JAX evicts the programs that were least recently used
PROGRAM, USED, CHECKSUM = "-cache", "-atime", ".sha256"  # endings of file names; the first two are JAX's
PROBLEM = "Error (reading|writing) persistent compilation cache"  # how JAX's warnings begin
HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"

# Lines of /proc/cpuinfo that decide which programs a CPU can run; other lines change from boot to boot.
CPU_LINES = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features",
)  # fmt: skip

print_at_once = partial(print, flush=True)

_events: Counter[str] = Counter()  # what JAX has reported so far
jax.monitoring.register_event_listener(lambda event, **_: _events.update([event]))
_folder: Path | None = None  # of the cache in use, if it is not JAX's own


@dataclass
class Compilation:
    """How long a program took to compile, filled in at the end.

    Attributes:
        seconds: with tracing.
        was_cached: whether it was read from the cache instead.
    """

    seconds: float = 0.0
    was_cached: bool = False


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder.

    JAX's own environment variables take precedence: JAX_ENABLE_COMPILATION_CACHE=false turns the cache off,
    and JAX_COMPILATION_CACHE_DIR names a folder, which JAX then uses without the checksums.
    """
    global _folder
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir is not None:
        return
    from platformdirs import user_cache_path  # only here: training works without it, but without a cache

    folder = user_cache_path("gpt_jax") / machine_key(_read_cpuinfo(), _n_threads())
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # programs from there are run
        delete_damaged(folder)
    except OSError as error:
        reason = f"{folder} cannot be used ({error.strerror or error})"
        print(f"note: no compilation cache: {reason}", file=sys.stderr)
        return
    _folder = folder
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    # Keep programs that compile fast too: with a limit, chance would decide what is kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # XLA's own cache, of kernel choices on GPUs, would have neither a limit nor checksums.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    _count_problems()
    atexit.register(_after_compiling)  # for what is compiled outside `compiling`


@contextmanager
def compiling(what: str, write: Any = print_at_once) -> Iterator[Compilation]:
    """Print that `what` is being compiled, then how long that took and whether it was read from the cache.

    Around the first call of a jitted function, the time includes that call.

    Args:
        what: the program, for a person.
        write: called like `print`, with and without `end=""`.
    """
    before, begun = _events.copy(), time.monotonic()
    write(f"compile {what} ...", end="")
    outcome, compilation = "", Compilation()  # an exception only ends the line
    try:
        yield compilation
        events = _events - before
        compilation.was_cached = bool(events[HIT] and not events[MISS])
        compilation.seconds = round(time.monotonic() - begun, 3)
        outcome = f" {compilation.seconds:.1f} s{' (read from the cache)' if compilation.was_cached else ''}"
    finally:
        write(outcome)
        _after_compiling()


def compiling_on_stderr(what: str) -> AbstractContextManager[Compilation]:
    """`compiling` for programs whose result goes to stdout."""
    return compiling(what, partial(print, file=sys.stderr, flush=True))


def machine_key(cpuinfo: str, n_threads: int) -> str:
    """The name of a cache folder: what decides, besides JAX's own key, whether a program can be reused.

    Args:
        cpuinfo: the text of /proc/cpuinfo, or another name of the CPU.
        n_threads: threads of JAX's CPU client; programs are divided among them when they are compiled.
    """
    first_core = cpuinfo.split("\n\n")[0].splitlines()
    lines = [line for line in first_core if line.split(":")[0].strip() in CPU_LINES] or first_core
    return hashlib.sha256("\n".join([*lines, str(n_threads)]).encode()).hexdigest()[:16]


def add_checksums(folder: Path) -> None:
    """Give each new program a checksum.

    Raises:
        OSError: it cannot be written, or another process does not unlock the folder.
    """
    with _locked(folder):
        for program in folder.glob("*" + PROGRAM):
            file = program.with_name(program.name + CHECKSUM)
            if not file.exists():
                file.write_text(checksum(program), encoding="utf-8")


def delete_damaged(folder: Path) -> None:
    """Delete each program whose checksum is wrong or missing, as after a kill or on a full disk.

    Raises:
        OSError: it cannot be read or deleted, or another process does not unlock the folder.
    """
    with _locked(folder):
        whole = set()
        for file in folder.glob("*" + CHECKSUM):
            program = file.with_name(file.name.removesuffix(CHECKSUM))
            if program.exists() and file.read_bytes() == checksum(program).encode():
                whole.add(program.name.removesuffix(PROGRAM))
        _delete(folder, keep=whole)


def delete_all(folder: Path) -> None:
    """Empty the cache.

    Raises:
        OSError: something cannot be deleted, or another process does not unlock the folder.
    """
    with _locked(folder):
        _delete(folder, keep=set())


def _after_compiling() -> None:
    """After compiling: add checksums, or empty the cache if JAX had a problem with it.

    That frees a full disk, and the next run starts with an empty cache.
    """
    if _folder is not None:
        with suppress(OSError):  # a program without a checksum is deleted at the next start
            (delete_all if _events.pop(PROBLEM, 0) else add_checksums)(_folder)


def _delete(folder: Path, keep: set[str]) -> None:
    for ending in (PROGRAM, USED, PROGRAM + CHECKSUM):
        for file in folder.glob("*" + ending):
            if file.name.removesuffix(ending) not in keep:
                file.unlink()


def _locked(folder: Path) -> Any:
    """JAX's own lock, which it holds while it reads, writes or evicts."""
    return FileLock(folder / ".lockfile", timeout=10)


def _count_problems() -> None:
    """Count JAX's warnings about the cache instead of showing them: the program is compiled anyway."""
    show = warnings.showwarning

    def show_others(message: Any, *where: Any, **options: Any) -> None:
        if re.match(PROBLEM, str(message)):
            _events[PROBLEM] += 1
        else:
            show(message, *where, **options)

    warnings.filterwarnings("always", PROBLEM)
    warnings.showwarning = show_others


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
