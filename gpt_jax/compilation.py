"""Compiled programs: kept on disk from run to run, and announced while a person waits for them.

JAX's persistent compilation cache does the work. Added here: a folder for each kind of CPU and number of
threads, since a program compiled for another machine may compute other bits or not run at all; a checksum for
each file, since JAX does not notice every damage; and silence about a folder that cannot be used.
"""

import hashlib
import os
import platform
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
from platformdirs import user_cache_path

from gpt_jax.integrity import checksum

MOST_BYTES = 2**29  # of programs in one folder; JAX deletes those that were not used for the longest time
LEAST_SECONDS = 0.1  # what compiles faster than this is not worth a file
CHECKSUM = ".sha256"
PROBLEM = "Error (reading|writing) persistent compilation cache"  # how JAX's warnings begin
HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"

# Lines of /proc/cpuinfo that say which programs a CPU can run; the others change from boot to boot.
CPU_LINES = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features",
)  # fmt: skip

print_at_once = partial(print, flush=True)

_events: Counter[str] = Counter()  # what JAX has reported so far
jax.monitoring.register_event_listener(lambda event, **_: _events.update([event]))
_folder: Path | None = None  # the cache in use, where it is ours


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, and read them from there.

    JAX's own environment variables come first: JAX_ENABLE_COMPILATION_CACHE=false turns the cache off, and
    JAX_COMPILATION_CACHE_DIR names a folder, which is used as JAX uses it, without the checksums.
    """
    global _folder
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir is not None:
        return
    folder = user_cache_path("gpt_jax") / machine_key(_read_cpuinfo(), _n_threads())
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # programs from there are run
        (folder / "probe").touch()
        (folder / "probe").unlink(missing_ok=True)
        delete_damaged(folder)
    except OSError as error:
        print(
            f"note: compiled programs are not kept: {folder} cannot be used ({error.strerror})",
            file=sys.stderr,
        )
        return
    _folder = folder
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    _count_problems()


@contextmanager
def compiling(what: str, write: Any = print_at_once) -> Iterator[None]:
    """Say that `what` is being compiled, then how long it took and whether it was read from the cache.

    Around the first call of a jitted function, the time includes that call.

    Args:
        what: the program, for a person.
        write: called like `print`, with and without `end=""`.
    """
    before, begun = _events.copy(), time.monotonic()
    write(f"compile {what} ...", end="")
    yield
    events = _events - before
    read = events[HIT] and not events[MISS]
    write(f" {time.monotonic() - begun:.1f} s{' (read from the cache)' if read else ''}")
    if _folder is not None:
        if _events.pop(PROBLEM, 0):
            delete_all(_folder)  # a full disk gets its room back, and the next run starts with an empty cache
        else:
            add_checksums(_folder)


def machine_key(cpuinfo: str, n_threads: int) -> str:
    """The name of a cache folder: what decides, beside JAX's own key, whether a program can be used again.

    Args:
        cpuinfo: the text of /proc/cpuinfo, or whatever else names the CPU.
        n_threads: threads of JAX's CPU client; programs are divided among them when they are compiled.
    """
    first_core = cpuinfo.split("\n\n")[0].splitlines()
    lines = [line for line in first_core if line.split(":")[0].strip() in CPU_LINES] or first_core
    return hashlib.sha256("\n".join([*lines, str(n_threads)]).encode()).hexdigest()[:16]


def add_checksums(folder: Path) -> None:
    """Give each new program a checksum."""
    for program in folder.glob("*-cache"):
        file = _checksum_file(program)
        with suppress(OSError):  # without a checksum the program is deleted at the next start
            if not file.exists():
                file.write_text(checksum(program), encoding="utf-8")


def delete_damaged(folder: Path) -> None:
    """Delete each program whose checksum is wrong or missing, as after a kill or on a full disk.

    Raises:
        OSError: it cannot be read or deleted.
    """
    for program in folder.glob("*-cache"):
        with suppress(FileNotFoundError):  # another process may delete it first
            file = _checksum_file(program)
            if not file.exists() or file.read_bytes() != checksum(program).encode():
                program.unlink()
                file.unlink()
    for file in folder.glob("*" + CHECKSUM):
        if not file.with_name(file.name.removesuffix(CHECKSUM)).exists():
            file.unlink(missing_ok=True)


def delete_all(folder: Path) -> None:
    """Empty the cache, as far as that is possible."""
    for file in folder.glob("*"):
        with suppress(OSError):
            file.unlink()


def _checksum_file(program: Path) -> Path:
    return program.with_name(program.name + CHECKSUM)


def _count_problems() -> None:
    """Count JAX's warnings about the cache instead of showing them: the program is compiled all the same."""
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
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _n_threads() -> int:
    """As JAX's CPU client counts them."""
    if threads := os.environ.get("PJRT_NPROC"):
        return int(threads)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
