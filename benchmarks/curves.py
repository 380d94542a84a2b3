"""Pictures of how a cost grows."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from shapes import SHAPES

Curve = Sequence[tuple[float, float]]  # amounts and costs


def add_curves(parser: argparse.ArgumentParser, shape: str) -> None:
    """The flags that say which curves are measured, around which shape."""
    flag = parser.add_argument
    flag("--shape", default=shape, choices=SHAPES, help="(%(default)s)")
    flag("--by", help="only what grows by this, such as context")
    flag("--plot", type=Path, metavar="FILE", help="draw the curves here")


def draw_curves(panels: Mapping[str, tuple[str, str, Mapping[str, Curve]]], file: Path) -> None:
    """A picture with a panel for each entry, all axes logarithmic.

    Args:
        panels: title to the label of the x axis, that of the y axis, and curves by name.
        file: to write.
    """
    from matplotlib.figure import Figure  # slow to import, and not needed to measure

    n_columns = min(len(panels), 4)
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(3.4 * n_columns, 3.1 * n_rows), layout="constrained")
    all_axes = figure.subplots(n_rows, n_columns, squeeze=False).flat
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    for axes, (title, (x_label, y_label, curves)) in zip(all_axes, panels.items(), strict=False):
        for name, curve in curves.items():
            amounts, costs = zip(*curve, strict=True)
            axes.loglog(amounts, costs, marker="o", markersize=4, label=name)
        amounts, costs = zip(*next(iter(curves.values())), strict=True)
        proportional = [costs[-1] * amount / amounts[-1] for amount in amounts]
        axes.loglog(amounts, proportional, color="tab:gray", linestyle=":", label="proportional")
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set_xticks(amounts, [_short(amount) for amount in amounts])
        axes.minorticks_off()
        ticks = sorted({costs[0], costs[-1]})  # of the first curve
        axes.set_yticks(ticks, [_short(tick) for tick in ticks])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=100)


def _short(number: float) -> str:
    """1.2M, 40k, 1,024, 3.5: a number for an axis."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= 10 * size or number >= 1e6:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
