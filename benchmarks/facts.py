"""What a figure was measured with and on: the facts that stand beside every number, and its file."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from gpt_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent

OURS = ("jax", "jaxlib", "flax", "numpy")

_VERSIONS = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


def machine() -> dict[str, Any]:
    """The processor, the cores that this process may use, and how busy the machine is already."""
    return {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}


def versions(python: str, *packages: str) -> dict[str, str | None]:
    """The version of a Python, and of the packages that it has."""
    done = subprocess.run([python, "-c", _VERSIONS, *packages], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def commit() -> str | None:
    """The commit of this checkout, with "+changes" where files differ from it; None where git knows none.

    Changes in `benchmarks/results` do not count.
    """
    try:
        changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
        return _git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def check_writable(flag: str, path: Path) -> None:
    """Find out before hours are spent whether results can go to `path`; made where it is not there.

    Raises:
        UserError: they cannot.
    """
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise UserError(f"{flag} = {path} cannot be written: {error.strerror}") from None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu() -> str | None:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None
