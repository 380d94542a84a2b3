"""How long is a training step, beside nanoGPT's?

    python benchmarks/train_step.py --nanogpt ../nanoGPT --nanogpt_python PYTHON --json FILE

The same GPT in nanoGPT as it is, in nanoGPT compiled, and in this package: shape, number type, dropout,
AdamW, clipping, and a batch of random tokens for each step. README.md says how to read the tables.
"""

import sys
from typing import Any

from contest import (
    Contender,
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

STEPS = {"smoke": 2, "0.8M": 10}  # in a piece of work; 1 in one of other shapes


def contenders(name: str, shape: Shape, flags: Any) -> list[Contender]:
    """Who does the steps of a shape."""
    steps = STEPS.get(name, 1)
    task = {"task": "train", "shape": shape.to_dict(), "steps": steps}
    flops = float(steps * shape.batch_size * shape.context * shape.flops_per_token)
    found = [Contender("gpt_jax", "worker_gpt_jax.py", task, flops=flops, units=steps)]
    if flags.nanogpt:
        for compiled in (False, True):
            theirs = {**task, "checkout": str(flags.nanogpt.resolve()), "compiled": compiled}
            label = f"nanoGPT {'compiled' if compiled else 'eager'}"
            found.append(
                Contender(label, "worker_nanogpt.py", theirs, flags.nanogpt_python, flops=flops, units=steps)
            )
    return found


def main() -> int:
    """Let them compete at each shape."""
    parser = make_parser(__doc__)
    add_nanogpt(parser)
    parser.add_argument("--shapes", default="0.8M,10.7M", help=f"of {', '.join(SHAPES)} (%(default)s)")
    flags = parser.parse_args()
    report = begin_report(flags)
    names = flags.shapes.split(",")
    if unknown := set(names) - set(SHAPES):
        raise UserError(f"shapes = {flags.shapes}: {unknown.pop()!r} is none of {', '.join(SHAPES)}")
    for name in names:
        everyone = [*contenders(name, SHAPES[name], flags), *ceilings(name == "smoke")]
        results = compete(everyone, flags.repeats)
        report["tables"][name] = [result.to_dict() for result in results.values()]
        write_report(flags, report)
        ours, product, copy = results["gpt_jax"], results["matrix product"], results["copy"]
        ceiling = product.contender.flops / product.fastest
        rows = []
        for result in results.values():
            if result.contender.task["task"] != "train":
                continue
            speed = result.contender.flops / result.median
            milliseconds = [1000 * s / result.contender.units for s in (result.median, result.fastest)]
            rows.append(
                (
                    result.contender.name,
                    f"{milliseconds[0]:,.1f}",
                    f"{milliseconds[1]:,.1f} to {1000 * max(result.seconds) / result.contender.units:,.1f}",
                    f"{result.median / ours.median:.2f}",
                    f"{speed / 1e9:.1f}",
                    f"{speed / ceiling:.0%}",
                )
            )
        shape = SHAPES[name]
        title = (
            f"{name}: {shape}, batch {shape.batch_size}, dropout {shape.dropout}\n"
            f"A matrix product reaches {ceiling / 1e9:.1f} GFLOP/s, a copy "
            f"{copy.contender.units / copy.fastest / 1e9:.1f} GB/s."
        )
        header = ("", "ms, median", "ms, spread", "time, ratio to gpt_jax", "GFLOP/s", "of the ceiling")
        print_table(title, header, rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
