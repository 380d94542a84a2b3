"""The picture of a run: loss.png."""

import os
from pathlib import Path

from gpt_jax.monitor.metrics import best_record, read_metrics


def plot_losses(metrics: Path, picture: Path, title: str) -> None:
    """Draw the training and the validation loss of a `metrics.jsonl` over the steps."""
    from matplotlib.figure import Figure  # slow to import, and not needed to train

    records = read_metrics(metrics)
    validated = [record for record in records if "val_loss" in record]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, color, rows, key in (
        ("training", "tab:blue", records, "train_loss"),
        ("validation", "tab:orange", validated, "val_loss"),
    ):
        marker = "o" if key == "val_loss" else None
        steps, losses = [row["step"] for row in rows], [row[key] for row in rows]
        axes.plot(steps, losses, label=label, color=color, marker=marker, markersize=4)
    if validated:
        best = best_record(validated)
        axes.axhline(best["val_loss"], color="tab:orange", linewidth=0.8, linestyle=":")
        title += f": best validation loss {best['val_loss']:.4f} at step {best['step']:,.0f}"
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.title.set_parse_math(False)  # a folder may be called "$x$"
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = picture.with_name("." + picture.name)
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, picture)
