"""Pictures of runs: loss.png, which a run draws itself, and those of the command `plots`."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.monitor.metrics import best_record, validated
from gpt_jax.records import Record, RunHistory, selection_loss

AXES = {"step": "step", "tokens": "million training tokens", "minutes": "minutes of training"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B", "#999999")
TRAINING, VALIDATION, GRAY = "#0072B2", "#D55E00", "#666666"


def plot_losses(run: RunHistory, picture: Path) -> None:
    """Draw the losses of a run over its steps."""
    from matplotlib.figure import Figure  # slow to import, and not needed to train

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    _draw_losses(figure.subplots(), [run], "step")
    _save(figure, picture)


def plot_runs(runs: Sequence[RunHistory], pictures: Sequence[Path], axis: str = "step") -> None:
    """Draw runs as `draw_runs` does, to files whose names end in .png or .svg."""
    figure = draw_runs(runs, axis)
    for picture in pictures:
        _save(figure, picture)


def draw_runs(runs: Sequence[RunHistory], axis: str = "step") -> Any:
    """A Matplotlib figure of losses, gap, learning rate, gradient norm and speed; `axis` is one of `AXES`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplot_mosaic([["loss"] * 4, ["gap", "rate", "norm", "speed"]], height_ratios=(3, 2))
    _draw_losses(axes["loss"], runs, axis)
    panels: dict[str, tuple[str, Callable[[Record], float | None]]] = {
        "gap": (f"validation − training loss\n({_unit(runs)})", _gap),
        "rate": ("learning rate", lambda record: record.get("learning_rate")),
        "norm": ("gradient norm, before clipping", lambda record: record.get("grad_norm")),
        "speed": ("training tokens per second", lambda record: record.get("tokens_per_second")),
    }
    for name, (title, value_of) in panels.items():
        for run, color in zip(runs, _colors(len(runs)), strict=True):
            _line(axes[name], run, axis, value_of, color=color if len(runs) > 1 else TRAINING)
        axes[name].set_title(title, fontsize=10)
        axes[name].set_xlabel(AXES[axis])
        axes[name].grid(alpha=0.3)
        axes[name].yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
        if name != "gap":
            axes[name].set_ylim(bottom=0)
    axes["gap"].axhline(0, color=GRAY, linewidth=0.8)
    return figure


def _gap(record: Record) -> float | None:
    loss = selection_loss(record)
    return None if loss is None else loss - record["train_loss"]


def _unit(runs: Sequence[RunHistory]) -> str:
    units = {run.unit for run in runs}
    return units.pop() if len(units) == 1 else "nats per token of each run"


def _colors(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]


def _x(run: RunHistory, axis: str) -> np.ndarray:
    """Where the records lie on an axis of `AXES`."""
    steps = np.array([record["step"] for record in run.records], float)
    if axis == "tokens":
        return steps * run.tokens_per_step / 1e6
    return np.array(run.minutes()) if axis == "minutes" else steps


def _line(
    axes: Any, run: RunHistory, axis: str, value_of: Callable[[Record], float | None], **style: Any
) -> None:
    """A line through the records that have a value; a marker where it is a single one."""
    points = [
        (x, value)
        for x, record in zip(_x(run, axis), run.records, strict=True)
        if (value := value_of(record)) is not None
    ]
    if points:
        axes.plot(*zip(*points, strict=True), **({"marker": "o"} if len(points) == 1 else {}) | style)


def _draw_losses(axes: Any, runs: Sequence[RunHistory], axis: str) -> None:
    """Training and validation loss, the best point, and what models without training have."""
    is_single = len(runs) == 1
    for run, color in zip(runs, _colors(len(runs)), strict=True):
        training = "training, with dropout" if run.has_dropout else "training"
        name, best = _name(run), ""
        part = ", first tokens only" if any("val_loss_part" in record for record in run.records) else ""
        if validated(run.records):
            point = best_record(run.records)
            loss, step = selection_loss(point) or math.nan, point["step"]
            best = f"best {loss:.4f} at step {step:,.0f}"
            x = _x(run, axis)[[record["step"] for record in run.records].index(step)]
            axes.plot(x, loss, "o", ms=11, mfc="none", mec=VALIDATION if is_single else color, zorder=3)
        style = {"color": TRAINING, "label": training} if is_single else {"color": color, "alpha": 0.35}
        _line(axes, run, axis, lambda record: record["train_loss"], **style)
        style = {"color": VALIDATION, "label": f"validation{part}: {best}"} if is_single else {"color": color}
        if not is_single:
            style["label"] = f"{name}: {best or 'not validated'}"
        _line(axes, run, axis, selection_loss, marker="o", ms=4, **style)
    _set_range(axes, runs)
    what = "" if is_single else "\nlines with points: validation; pale: training"
    dropout = ", some with dropout" if not is_single and any(run.has_dropout for run in runs) else ""
    title = _name(runs[0]) if is_single else f"{len(runs)} runs{what}{dropout}"
    axes.set(xlabel=AXES[axis], ylabel=f"loss ({_unit(runs)})")
    axes.set_title(title, parse_math=False)  # a folder may be called "$x$"
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")
    if axes.get_legend_handles_labels()[0]:
        is_long = len(runs) > 5
        style = {"loc": "outside lower center", "ncols": 3} if is_long else {"loc": "upper right"}
        for text in (axes.figure if is_long else axes).legend(fontsize=9, **style).get_texts():
            text.set_parse_math(False)


def _name(run: RunHistory) -> str:
    return os.fsencode(run.name).decode("utf-8", "backslashreplace")  # not in the locale's encoding


def _set_range(axes: Any, runs: Sequence[RunHistory]) -> None:
    """Leave out the steep beginning: up to the bigram model, or as high as the validation losses lie."""
    validation = [loss for run in runs for loss in map(selection_loss, validated(run.records)) if loss]
    training = [record["train_loss"] for run in runs for record in run.records]
    finite = [loss for loss in (*validation, *training) if math.isfinite(loss)]
    baselines = runs[0].baselines if all(run.baselines == runs[0].baselines for run in runs) else {}
    if not finite:
        return
    bigram = [baselines["bigram"]] if "bigram" in baselines else []
    top = max(*filter(math.isfinite, validation), float(np.median(finite)), *bigram)
    bottom = min(*finite, *baselines.values(), top)
    margin = 0.05 * (top - bottom) or 0.1
    axes.set_ylim(bottom - margin, top := top + 2.5 * margin)
    for name, loss in baselines.items():
        style = {"fontsize": 9, "color": GRAY}
        if loss < top:
            axes.axhline(loss, color=GRAY, linestyle=":", linewidth=1)
            where = axes.get_yaxis_transform()
            axes.text(0.2, loss, f"{name} {loss:.2f}", transform=where, va="bottom", **style)
        else:
            axes.text(0.2, 0.985, f"↑ {name} {loss:.2f}", transform=axes.transAxes, va="top", **style)


def _save(figure: Any, picture: Path) -> None:
    temporary = picture.with_name("." + picture.name)
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, picture)
