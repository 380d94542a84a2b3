"""Pictures of how a cost grows."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shapes import SHAPES

from gpt_jax.errors import UserError

Curve = Sequence[tuple[float, float]]  # amounts and costs
Panels = Mapping[str, tuple[str, str, Mapping[str, Curve]]]
STYLES = {"planned": "-", "measured": "--"}  # of curves called "name, planned" and "name, measured"


def add_curves(parser: argparse.ArgumentParser, shape: str) -> None:
    """The flags that say which curves are measured, around which shape."""
    flag = parser.add_argument
    flag("--shape", default=shape, choices=SHAPES, help="(%(default)s)")
    flag("--by", help="only what grows by this, such as context")
    flag("--plot", type=Path, metavar="FILE", help="draw the curves here")
    flag("--redraw", action="store_true", help="draw what is in the file of --json, and measure nothing")


def redraw(flags: argparse.Namespace, panels_of: Callable[[Mapping[str, Any]], Panels]) -> int:
    """Draw the tables of an earlier report."""
    if not (flags.json and flags.json.is_file() and flags.plot):
        raise UserError("--redraw needs --json FILE, a report that exists, and --plot FILE")
    draw_curves(panels_of(json.loads(flags.json.read_text(encoding="utf-8"))["tables"]), flags.plot)
    return 0


def draw_curves(panels: Panels, file: Path) -> None:
    """A picture with a panel for each entry, axes logarithmic, each point of a single curve with its cost.

    Args:
        panels: title to the label of the x axis, that of the y axis, and curves by name.
        file: to write.
    """
    from matplotlib.figure import Figure  # slow to import, and not needed to measure
    from matplotlib.ticker import LogLocator, NullFormatter

    n_columns = min(len(panels), 4)
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(3.6 * n_columns, 3.4 * n_rows), layout="constrained")
    all_axes = figure.subplots(n_rows, n_columns, squeeze=False).flat
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    for axes, (title, (x_label, y_label, curves)) in zip(all_axes, panels.items(), strict=False):
        colors: dict[str, str] = {}
        for name, curve in curves.items():
            amounts, costs = zip(*curve, strict=True)
            what, _, kind = name.partition(", ")
            color = colors.setdefault(what, f"C{len(colors)}")
            axes.loglog(
                amounts, costs, STYLES.get(kind, "-"), marker="o", markersize=4, color=color, label=name
            )
            for amount, cost in curve if len(curves) == 1 else ():
                style = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": color}
                axes.annotate(_short(cost), (amount, cost), (-5, 4), **style)
        amounts, costs = zip(*next(iter(curves.values())), strict=True)
        proportional = [costs[-1] * amount / amounts[-1] for amount in amounts]
        axes.loglog(amounts, proportional, color="tab:gray", linestyle=":", label="proportional")
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set_xticks(amounts, [_short(amount) for amount in amounts])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda cost, _: _short(cost))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.margins(x=0.16, y=0.12)
    handles, labels = next(iter(figure.axes)).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=130)


def _short(number: float) -> str:
    """1.2M, 40k, 1,024, 3.5: a number for an axis."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= 10 * size or number >= 1e6:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
