"""How fast is text generated, beside nanoGPT and llama2.c?

    python benchmarks/sampling.py --llama2c ../llama2.c --nanogpt ../nanoGPT --nanogpt_python PYTHON

Random models of one shape fill a window: each text begins with one token and grows to the context. Beside
them run the bare matrix products of as many tokens, which a loop of XLA cannot do without. README.md says how
to read the table.
"""

import os
import sys
from pathlib import Path
from typing import Any

from contest import (
    Contender,
    Result,
    add_nanogpt,
    begin_report,
    ceilings,
    compete,
    make_parser,
    print_table,
    write_report,
)
from shapes import SHAPES, Shape

from gpt_jax.commands.run_main import run_main
from gpt_jax.errors import UserError


def contenders(shape: Shape, batches: list[int], flags: Any) -> list[Contender]:
    """Everyone who generates, and the bare products."""
    length, found = shape.context - 1, []
    for rows in batches:
        task = {"shape": shape.to_dict(), "rows": rows, "prompt": 1, "length": length}
        flops = 2.0 * rows * length * shape.n_weights
        for kind, label in (("sample", "gpt_jax"), ("products", "bare products")):
            found.append(
                Contender(
                    f"{label}, batch {rows}", "worker_gpt_jax.py", {**task, "task": kind}, flops=flops,
                    units=rows * length,
                )
            )  # fmt: skip
    task = {"task": "sample", "shape": shape.to_dict(), "prompt": 1, "length": length}
    if flags.length:
        whole = {**task, "rows": 1, "length": flags.length}
        flops = 2.0 * flags.length * shape.n_weights
        label = f"gpt_jax, a text of {flags.length:,}"
        found.append(Contender(label, "worker_gpt_jax.py", whole, flops=flops, units=flags.length))
    flops = 2.0 * length * shape.n_weights
    if flags.nanogpt:
        # It keeps no cache, so what a character costs depends on the length of the window.
        for label, prompt, new in (("nanoGPT", 1, length), ("nanoGPT, full window", shape.context, 32)):
            theirs = {**task, "steps": 1, "checkout": str(flags.nanogpt.resolve())}
            theirs |= {"prompt": prompt, "length": new}
            found.append(
                Contender(
                    label, "worker_nanogpt.py", theirs, flags.nanogpt_python,
                    flops=2.0 * new * shape.n_weights, units=new,
                )
            )  # fmt: skip
    if flags.llama2c:
        cores, checkout = len(os.sched_getaffinity(0)), str(flags.llama2c.resolve())
        for quantized, threads in dict.fromkeys(((False, cores), (False, 1), (True, cores))):
            theirs = {**task, "checkout": checkout, "quantized": quantized, "threads": threads}
            label = f"llama2.c {'runq, int8' if quantized else 'run'}, {threads} thread{'s' * (threads > 1)}"
            found.append(Contender(label, "worker_llama2c.py", theirs, flops=flops, units=length))
    return found


def row(result: Result, first: Result, ceiling: float) -> tuple[str, ...]:
    """A line of the table."""
    of = result.contender
    speeds = [of.units / seconds for seconds in (result.median, max(result.seconds), result.fastest)]
    return (
        of.name,
        f"{speeds[0]:,.1f}",
        f"{speeds[1]:,.1f} to {speeds[2]:,.1f}",
        f"{speeds[0] / (first.contender.units / first.median):.2f}",
        f"{of.flops / result.median / ceiling:.0%}",
    )


def main() -> int:
    """Let them compete."""
    parser = make_parser(__doc__)
    add_nanogpt(parser)
    flag = parser.add_argument
    flag("--llama2c", type=Path, metavar="DIR", help="a checkout of llama2.c, to run in turn")
    flag("--shape", default="10.7M", choices=SHAPES, help="(%(default)s)")
    flag("--batches", default="1,8,64", help="how many texts at a time (%(default)s)")
    flag("--length", type=int, default=10_000, help="characters of a whole text; 0: none (%(default)s)")
    flags = parser.parse_args()
    try:
        batches = [int(rows) for rows in flags.batches.split(",")]
    except ValueError:
        raise UserError(f"batches = {flags.batches} must be numbers, such as 1,8,64") from None
    if min(batches) < 1 or len(set(batches)) < len(batches):
        raise UserError(f"batches = {flags.batches} must be different numbers of 1 or above")
    if flags.length < 0:
        raise UserError(f"length = {flags.length} must be 0 or above")
    report = begin_report(flags)
    shape = SHAPES[flags.shape]
    everyone = [*contenders(shape, batches, flags), *ceilings(flags.shape == "smoke")]
    results = compete(everyone, flags.repeats)
    report["tables"][flags.shape] = [result.to_dict() for result in results.values()]
    write_report(flags, report)
    product, copy = results.pop("matrix product"), results.pop("copy")
    ceiling = product.contender.flops / product.fastest
    bandwidth = copy.contender.units / copy.fastest
    first = next(iter(results.values()))
    title = (
        f"{flags.shape}: {shape}\nA matrix product reaches {ceiling / 1e9:.1f} GFLOP/s, a copy "
        f"{bandwidth / 1e9:.1f} GB/s: {bandwidth / (4 * shape.n_weights):,.0f} times a second the weights."
    )
    header = ("", "characters/s", "spread", "speed, ratio to the first", "of the product's FLOP/s")
    print_table(title, header, [row(result, first, ceiling) for result in results.values()])
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
