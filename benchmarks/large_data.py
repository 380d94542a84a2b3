"""Start-up and memory of training by the size of the data: prepared folders, and texts.

    python benchmarks/large_data.py --folder /tmp/large --sizes 10e6 10e9 --text 5e9

Makes data of these sizes by repeating tiny Shakespeare, and trains configs/smoke.py on each, two times in
turn: the first one compiles, and prepares the texts. Prints the seconds to the first step and to the end, and
the peak memory of the process.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gpt_jax.data.documents import find_documents
from gpt_jax.data.prepare import prepare
from gpt_jax.data.token_files import HEADER, TRAIN, checksum
from gpt_jax.paths import ARTIFACTS, ROOT

PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def repeat(source: Path, target: Path, size: int) -> None:
    """Write a file of `size` bytes that repeats another one."""
    data = source.read_bytes()
    data *= 2**26 // len(data)
    with target.open("wb") as file:
        while (left := size - file.tell()) > 0:
            file.write(data[:left])


def prepared(folder: Path, size: int) -> Path:
    """A prepared folder whose training split has so many bytes."""
    out = folder / f"prepared {size:.0e}"
    if not (out / HEADER).exists():
        shutil.rmtree(out, ignore_errors=True)
        prepare(find_documents(ARTIFACTS / "input.txt"), "char", out, 0.9)
        header = json.loads((out / HEADER).read_text())
        (out / TRAIN).rename(out / "once")
        repeat(out / "once", out / TRAIN, size)
        (out / "once").unlink()
        header["files"][TRAIN] |= {"tokens": size, "characters": size, "sha256": checksum(out / TRAIN),
                                   "changed": (out / TRAIN).stat().st_mtime_ns}  # fmt: skip
        (out / HEADER).write_text(json.dumps(header))
    return out


def train(path: Path, workdir: Path) -> dict[str, float]:
    """Train a few steps: the seconds to the first one and to the end, and the peak memory in MB."""
    shutil.rmtree(workdir, ignore_errors=True)
    settings = {"train.steps": 20, "train.log_every": 1, "train.eval_every": 20, "train.eval_tokens": 10_000}
    command: list[str | Path] = [sys.executable, ROOT / "train.py", "--config", ROOT / "configs" / "smoke.py"]
    command += ["--workdir", workdir, f"--config.data.path={path}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True, check=True)
    seconds = time.monotonic() - begun
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])["seconds"]
    return {"first step, s": first, "end, s": seconds, "peak, MB": int(done.stdout.split()[-1]) / 1024}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the data; it is kept")
    parser.add_argument(
        "--sizes", type=float, nargs="*", default=[10e6, 10e9], help="of prepared folders, in bytes"
    )
    parser.add_argument("--text", type=float, nargs="*", default=[], help="of text files, in bytes")
    flags = parser.parse_args()
    flags.folder.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(flags.folder / "cache")
    paths = [prepared(flags.folder, int(size)) for size in flags.sizes]
    for size in map(int, flags.text):
        paths.append(flags.folder / f"text {size:.0e}.txt")
        if not paths[-1].exists():
            repeat(ARTIFACTS / "input.txt", paths[-1], size)
    for turn in range(2):
        for path in paths:
            numbers = train(path, flags.folder / "run")
            print(
                f"{turn} {path.name:20} " + "  ".join(f"{name} {n:.1f}" for name, n in numbers.items()),
                flush=True,
            )


if __name__ == "__main__":
    main()
