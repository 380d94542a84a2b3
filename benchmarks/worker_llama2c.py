"""llama2.c as a contender, see contest.py: it is compiled here, and runs a random model.

The model has the width, layers, heads and vocabulary of a GPT, and a hidden layer of 2/3 its width, so that
its three matrices have as many weights as the two of a GPT. With "quantized", runq and int8 weights.
"""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

GROUP = 64  # weights that share a scale, llama2.c's default


def write_model(file: Path, shape: dict[str, Any], quantized: bool) -> None:
    """A random model in the format of run.c or runq.c."""
    D, L, V = shape["d_model"], shape["n_layer"], shape["vocab_size"]
    group = min(GROUP, D)
    F = 8 * D // 3 // group * group
    rng = np.random.default_rng(0)

    def random(*size: int) -> np.ndarray:
        return 0.02 * rng.standard_normal(size, np.float32)

    embedding, head = 50 * random(V, D), random(V, D)
    head[1] = 0  # token 1 ends a text; greedily, it is never drawn
    attention = [random(L, D, D) for _ in "qkvo"]
    mlp = [random(L, F, D), random(L, D, F), random(L, F, D)]
    norms = np.ones((L, D), np.float32)
    numbers = struct.pack("<5i", D, F, L, shape["n_head"], shape["n_head"])
    with file.open("wb") as out:
        if quantized:
            header = struct.pack("<Ii", 0x616B3432, 2) + numbers + struct.pack("<2i", V, shape["context"])
            out.write((header + struct.pack("<Bi", 0, group)).ljust(256, b"\0"))
            out.write(np.ones((2 * L + 1) * D, np.float32).tobytes())
            for matrix in (embedding, *(layer for of in (*attention, *mlp) for layer in of), head):
                out.write(quantize(matrix, group))
        else:
            out.write(numbers + struct.pack("<2i", -V, shape["context"]))  # negative: the head is its own
            angles = np.zeros(shape["context"] * D // shape["n_head"], np.float32)  # not read any more
            for array in (embedding, norms, *attention, norms, *mlp, norms[0], angles, head):
                out.write(array.tobytes())


def quantize(matrix: np.ndarray, group: int) -> bytes:
    """int8, with a float32 scale for each group of weights."""
    groups = matrix.reshape(-1, group)
    scales = np.maximum(np.abs(groups).max(axis=1, keepdims=True) / 127, 1e-12)
    return np.round(groups / scales).astype(np.int8).tobytes() + scales.astype(np.float32).tobytes()


def write_tokenizer(file: Path, vocab_size: int) -> None:
    """A character for each token."""
    with file.open("wb") as out:
        out.write(struct.pack("<i", 4))
        for i in range(vocab_size):
            out.write(struct.pack("<fi", 0.0, 1) + bytes([33 + i % 90]))


def main() -> None:
    """Compile, and work when told to."""
    task = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        source = "runq" if task["quantized"] else "run"
        compiler = [os.environ.get("CC", "cc"), "-Ofast", "-march=native", "-fopenmp"]
        program = str(folder / source)
        code = f"{task['checkout']}/{source}.c"
        made = subprocess.run([*compiler, code, "-lm", "-o", program], stdout=subprocess.DEVNULL)
        if made.returncode:
            sys.exit(f"{compiler[0]} cannot compile {source}.c")
        write_model(folder / "model.bin", task["shape"], task["quantized"])
        write_tokenizer(folder / "tokenizer.bin", task["shape"]["vocab_size"])
        length = task["length"]
        command = [
            program, str(folder / "model.bin"), "-z", str(folder / "tokenizer.bin"), "-t", "0",
            "-n", str(length),
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(task["threads"])}
        print(json.dumps({"compiler": " ".join(compiler), "threads": task["threads"]}), flush=True)
        for _ in sys.stdin:
            begun = time.monotonic()
            done = subprocess.run(command, env=environment, capture_output=True, check=True)
            took = time.monotonic() - begun
            # Its own clock starts after the first token, so loading does not count; it counts milliseconds.
            found = re.search(r"achieved tok/s: ([\d.]+)", done.stderr.decode())
            print(length / float(found[1]) if found else took, flush=True)


main()
