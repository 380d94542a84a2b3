"""How much memory does a training step take, with and without rematerialisation?

    python benchmarks/memory.py --json FILE --plot FILE

The whole batch is computed at once, not in micro-batches. Bytes are those that the compiled program plans:
parameters, optimizer state, data and temporaries; and on a CPU those by which the process really grows.
"""

import sys
from collections.abc import Mapping
from typing import Any

from contest import Contender, Worker, begin_report, make_parser, print_table, write_report
from curves import Panels, add_curves, draw_curves, redraw
from shapes import SHAPES, chosen, series

from gpt_jax.commands.run_main import run_main

REMATS = ("nothing", "elementwise", "block")  # what is computed again in the backward pass
NAMES = {"nothing": "no rematerialisation", "elementwise": "element-wise operations", "block": "whole blocks"}


def main() -> int:
    """Compile, print, and draw."""
    parser = make_parser(__doc__, repeats=1)
    add_curves(parser, "0.8M")
    flags = parser.parse_args()
    if flags.redraw:
        return redraw(flags, panels_of)
    report = begin_report(flags)
    for what, points in chosen(series(SHAPES[flags.shape]), flags.by).items():
        rows: list[tuple[str, ...]] = []
        for remat in REMATS:
            for amount, shape in points:
                task = {"task": "memory", "shape": shape.to_dict(), "remat": remat}
                facts = measure(task, flags.repeats)
                report["tables"].setdefault(what, []).append({"amount": amount, "remat": remat, **facts})
                write_report(flags, report)
                sizes = [facts.get(name) for name in ("arguments", "planned", "measured")]
                megabytes = ["" if size is None else f"{size / 1e6:,.0f}" for size in sizes]
                rows.append((f"{amount:,}", remat, *megabytes))
        header = (what, "computed again", "arguments, MB", "planned, MB", "measured, MB")
        print_table(f"A step by {what}", header, rows)
    if flags.plot:
        draw_curves(panels_of(report["tables"]), flags.plot)
    return 0


def panels_of(tables: Mapping[str, Any]) -> Panels:
    """The planned bytes of a report, and on a CPU the measured ones, in MB."""
    panels = {}
    for what, rows in tables.items():
        curves: dict[str, list[tuple[float, float]]] = {}
        for kind in ("planned", "measured"):
            for row in rows:
                # Less than planned: the process reused memory that it had freed before the step.
                if row.get(kind, 0) >= row["planned"]:
                    curve = curves.setdefault(f"{NAMES[row['remat']]}, {kind}", [])
                    curve.append((row["amount"], row[kind] / 1e6))
        panels[f"a step by {what}"] = (what, "MB", curves)
    return panels


def measure(task: dict[str, Any], repeats: int) -> dict[str, Any]:
    """What workers say of the memory of a step; of several measurements, the median."""
    found = []
    for _ in range(repeats):
        worker = Worker(Contender(f"remat {task['remat']}", "worker_gpt_jax.py", task))
        worker.end()
        found.append(worker.facts)
    return sorted(found, key=lambda facts: facts.get("measured", 0))[repeats // 2]


if __name__ == "__main__":
    sys.exit(run_main(main))
