"""How do the times of a training step and of sampling grow with the model, its context, the batch, the text?

    python benchmarks/growth.py --json FILE --plot FILE

One thing changes at a time, and the rest stays as in the shape "3M" (--shape). The points of a curve are
measured in turn.
"""

import sys
from collections.abc import Mapping
from typing import Any

from contest import Contender, begin_report, compete, make_parser, print_table, write_report
from curves import Panels, add_curves, draw_curves, redraw
from shapes import SHAPES, Shape, chosen, series

from gpt_jax.commands.run_main import run_main

TITLES = {"step": "a training step", "token": "a token of each text", "text": "a text"}
UNITS = {"weights": "weights", "context": "context", "batch": "texts in a batch", "length": "characters"}


def step_of(shape: Shape, name: str) -> Contender:
    """A training step of a shape."""
    return Contender(name, "worker_gpt_jax.py", {"task": "train", "shape": shape.to_dict(), "steps": 1})


def text_of(shape: Shape, name: str, rows: int, length: int) -> Contender:
    """`length` characters in each of `rows` texts."""
    task = {"task": "sample", "shape": shape.to_dict(), "rows": rows, "prompt": 1, "length": length}
    return Contender(name, "worker_gpt_jax.py", task, units=length)


def curves(base: Shape) -> dict[str, dict[str, list[tuple[int, Contender]]]]:
    """What is measured: by what changes and the kind of work, amounts and contenders."""
    found: dict[str, dict[str, list[tuple[int, Contender]]]] = {}
    for what, points in series(base).items():
        tokens = [(1, text_of(base, "1", 1, base.context - 1))] if what == "batch" else []
        for amount, shape in points:
            rows = shape.batch_size if what == "batch" else 1
            tokens.append((amount, text_of(shape, f"{amount}", rows, shape.context - 1)))
        found[what] = {
            "step": [(amount, step_of(shape, f"{amount}")) for amount, shape in points],
            "token": tokens,
        }
    lengths = [base.context * n for n in (1, 2, 4, 16)]
    found["length"] = {"text": [(length, text_of(base, f"{length}", 1, length)) for length in lengths]}
    return found


def main() -> int:
    """Measure the curves, print them, and draw them."""
    parser = make_parser(__doc__, repeats=3)
    add_curves(parser, "3M")
    flags = parser.parse_args()
    if flags.redraw:
        return redraw(flags, panels_of)
    report = begin_report(flags)
    measured = chosen(curves(SHAPES[flags.shape]), flags.by)
    for what, kind, points in [(w, k, p) for w, kinds in measured.items() for k, p in kinds.items()]:
        results = compete([contender for _, contender in points], flags.repeats)
        report["tables"][f"{kind}, {what}"] = [result.to_dict() for result in results.values()]
        write_report(flags, report)
        ((title, (_, _, curves_of)),) = panels_of(
            {f"{kind}, {what}": report["tables"][f"{kind}, {what}"]}
        ).items()
        amounts, costs = zip(*curves_of["measured"], strict=True)
        ratios = [(max(r.seconds) - r.fastest) / r.median for r in results.values()]
        rows = [
            (f"{amount:,}", f"{cost:,.2f}", f"{ratio:.0%}")
            for amount, cost, ratio in zip(amounts, costs, ratios, strict=True)
        ]
        print_table(title, (UNITS[what], "ms, median", "spread"), rows)
    if flags.plot:
        draw_curves(panels_of(report["tables"]), flags.plot)
    return 0


def panels_of(tables: Mapping[str, Any]) -> Panels:
    """The medians of a report, in milliseconds."""
    panels = {}
    for table, results in tables.items():
        kind, _, what = table.partition(", ")
        curve = [
            (int(result["name"]), 1000 * result["median"] / (result["units"] if kind == "token" else 1))
            for result in results
        ]
        panels[f"{TITLES[kind]} by {what}"] = (UNITS[what], "ms", {"measured": curve})
    return panels


if __name__ == "__main__":
    sys.exit(run_main(main))
