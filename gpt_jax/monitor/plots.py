"""The picture of a run: loss.png."""

import math
import os
from pathlib import Path

from gpt_jax.monitor.metrics import best_record, read_metrics, validated
from gpt_jax.records import selection_loss


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw the losses of a `metrics.jsonl` over the steps; the title is the name of the picture's folder."""
    from matplotlib.figure import Figure  # slow to import, and not needed to train

    records = read_metrics(metrics)
    # Not in the locale's encoding.
    title = os.fsencode(picture.parent.name).decode("utf-8", "backslashreplace")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, color, marker, key in (
        ("training", "tab:blue", None, "train_loss"),
        ("validation, first tokens only", "tab:green", "o", "val_loss_part"),
        ("validation", "tab:orange", "o", "val_loss"),
    ):
        rows = [record for record in records if key in record]
        if rows:
            steps, losses = [row["step"] for row in rows], [row[key] for row in rows]
            axes.plot(steps, losses, label=label, color=color, marker=marker, markersize=4)
    if validated(records):
        best = best_record(records)
        part = " on a part of the split" if "val_loss_part" in best else ""
        loss = selection_loss(best) or math.nan
        axes.axhline(loss, color="tab:gray", linewidth=0.8, linestyle=":")
        title += f": best validation loss{part} {loss:.4f} at step {best['step']:,.0f}"
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.title.set_parse_math(False)  # a folder may be called "$x$"
    axes.grid(alpha=0.3)
    if records:
        axes.legend()
    temporary = picture.with_name("." + picture.name)
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, picture)
