"""The speed of `python -m gpt_jax prepare`, beside `tiktoken.encode_ordinary_batch` on the same text.

    python benchmarks/prepare.py --text big.txt --tokenizer gpt2-folder --repeats 3

Both have all cores and take turns. tiktoken gets the text in pieces of 256 Ki characters, from memory;
`prepare` reads it, counts, checks, encodes, writes and flushes. Prints megabytes a second, and the ratio.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from gpt_jax.data.bpe import BPETokenizer
from gpt_jax.data.documents import find_documents
from gpt_jax.data.prepare import PIECE, prepare
from gpt_jax.data.tokenizers import make_tokenizer


def tiktoken_alone(text: Path, tokenizer: BPETokenizer) -> float:
    """Seconds that tiktoken takes to encode a text."""
    characters = text.read_text(encoding="utf-8")
    pieces = [characters[i : i + PIECE] for i in range(0, len(characters), PIECE)]
    begun = time.monotonic()
    tokenizer._tiktoken.encode_ordinary_batch(pieces, num_threads=os.cpu_count() or 1)
    return time.monotonic() - begun


def ours(text: Path, spec: str) -> float:
    """Seconds that `prepare` takes, from the path to a folder on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        prepare(find_documents(text), spec, Path(folder, "out"), 0.9)
        return time.monotonic() - begun


def main() -> None:
    """Measure both in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="gpt2, or a folder with its files")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    tokenizer = make_tokenizer(flags.tokenizer, lambda: iter(()))
    assert isinstance(tokenizer, BPETokenizer)
    times: dict[str, list[float]] = {"tiktoken": [], "prepare": []}
    n = flags.text.stat().st_size
    tokenizer.encode("warm")
    for _ in range(flags.repeats):
        times["tiktoken"].append(tiktoken_alone(flags.text, tokenizer))
        times["prepare"].append(ours(flags.text, flags.tokenizer))
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:9} {n / middle / 1e6:6.1f} MB/s  ({', '.join(f'{s:.1f}' for s in seconds)} s)")
    ratio = statistics.median(times["tiktoken"]) / statistics.median(times["prepare"])
    print(f"prepare has {ratio:.2f} of the speed of tiktoken alone")


if __name__ == "__main__":
    main()
