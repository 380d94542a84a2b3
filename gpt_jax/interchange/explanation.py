"""What a trained model makes of a text: the numbers, as a picture, and as a page of HTML."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

N_GUESSES = 5
BLUE, GREEN, ORANGE = (0, 114, 178), (0, 158, 115), (213, 94, 0)
MAX_NATS = 5.0  # of the darkest blue
TITLE = (
    "Blue: surprise, up to 5 nats.  Green: probability of a guess.  Orange: the most probable token after "
    "each layer;\nthe darker, the more probable was the token of the text (logit lens)."
)
CELL, ROW, WIDTH = 0.34, 0.25, 12.0  # inches
STYLE = """
.gpt-text { font: 17px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.gpt-text span { position: relative; padding: 3px 0; border-radius: 2px; }
.gpt-text span:focus { outline: 2px solid #d55e00; }
.gpt-text table { display: none; position: absolute; z-index: 1; left: 0; top: 1.7em; padding: 6px 10px;
  background: Canvas; color: CanvasText; border: 1px solid GrayText; border-radius: 6px;
  font: 13px/1.5 ui-monospace, monospace; white-space: pre; }
.gpt-text span:hover table, .gpt-text span:focus table { display: block; }
.gpt-text td + td { padding-left: 12px; text-align: right; }
.gpt-picture { max-width: 100%; background: white; }
"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>What the model makes of a text</title>
<style>:root {{ color-scheme: light dark; }} body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1200px;
margin: 2em auto; padding: 0 1em; }}</style>
<h1>What the model makes of a text</h1>
{body}
"""
BODY = """<style>{style}</style>
<p>The darker a character, the less probable the model found it: {mean:.2f} nats on average. Point at one, or
move to it with the tab key, to see the five best guesses before it.</p>
<div class="gpt-text">{text}</div>
<p>Below the text: the best guesses, and for each layer what the model would guess if it ended there (logit
lens). Then, for each layer and head, which tokens (columns) each token (row) reads.</p>
<img class="gpt-picture" alt="Guesses, logit lens, attention weights" src="data:image/png;base64,{picture}">
"""


@dataclass(frozen=True)
class Explanation:
    """What a model makes of the T tokens of a text. Predictions of token t are made from those before it."""

    tokens: list[str]  # T
    surprise_T: np.ndarray  # nats, -log of the probability of each token; NaN for the first
    guesses: list[list[tuple[str, float]]]  # T + 1, the most probable tokens, best first; none at first
    attention_LxHxTxT: np.ndarray  # [l, h, t, s]: the weight with which head h of layer l reads s for t
    lens: list[list[str]]  # L x T, the most probable token if the model ended after this layer; "" at first
    lens_LxT: np.ndarray  # the probability of the token itself after each layer; NaN for the first

    def save(self, picture: Path) -> None:
        """Draw it to a file whose name ends in .png or .svg."""
        draw(self).savefig(picture, dpi=150)

    def to_html(self) -> str:
        """A page of its own: the text in colours, with guesses for each token, above the picture."""
        return page(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return body(self)


def shown(token: str) -> str:
    """A token with its blanks and line feeds visible, and no control characters."""
    token = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return "".join(character if character.isprintable() else "�" for character in token)


def draw(explanation: Explanation) -> Any:
    """A Matplotlib figure: the text with guesses and logit lens, and below it the attention of each head."""
    from matplotlib.figure import Figure

    widest = max(len(shown(token)) for token in explanation.tokens)
    n_columns = int((WIDTH - 1) / (CELL if widest == 1 else 0.09 * min(widest, 8) + 0.15))
    n_columns = min(n_columns, len(explanation.tokens) + 1)
    starts = range(0, len(explanation.tokens) + 1, n_columns)
    n_layer, n_head = explanation.attention_LxHxTxT.shape[:2]
    text_height = len(starts) * (ROW * (6 + n_layer) + 0.35)
    map_size = min(2.4, (WIDTH - 0.5) / n_head)
    figure: Any = Figure(
        figsize=(WIDTH, text_height + n_layer * (map_size + 0.15) + 0.8), layout="constrained"
    )
    figure.suptitle(TITLE, fontsize=10)
    heights = text_height, n_layer * (map_size + 0.15)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    for axes, start in zip(above.subplots(len(starts), squeeze=False).flat, starts, strict=True):
        _draw_line(axes, explanation, start, n_columns)
    _draw_attention(below, explanation)
    return figure


def _draw_line(axes: Any, explanation: Explanation, start: int, n_columns: int) -> None:
    """Some tokens side by side, the guesses and the logit lens of each below it."""
    n_layer = len(explanation.lens)
    names = ["text", *(f"guess {i + 1}" for i in range(5)), *(f"layer {i + 1}" for i in range(n_layer))]
    image = np.ones((len(names), n_columns, 3))
    for column in range(n_columns):
        t = start + column
        is_token = t < len(explanation.tokens)
        cells: list[tuple[str, float, tuple[int, int, int]]] = []
        if is_token:
            cells.append((explanation.tokens[t], explanation.surprise_T[t] / MAX_NATS, BLUE))
        elif t == len(explanation.tokens):
            cells.append(("…", 0, BLUE))  # what comes next
        guesses = explanation.guesses[t] if t < len(explanation.guesses) else []
        cells += [(token, probability, GREEN) for token, probability in guesses]
        if is_token and t:
            lens = zip(explanation.lens, explanation.lens_LxT[:, t], strict=True)
            cells += [("", 0, GREEN)] * (6 - len(cells)) + [(row[t], float(p), ORANGE) for row, p in lens]
        for row, (token, strength, color) in enumerate(cells):
            shade = min(np.nan_to_num(strength), 1)
            image[row, column] = 1 + shade * (np.array(color) / 255 - 1)
            text = shown(token) if len(token) <= 8 else shown(token[:7]) + "…"
            style = {"fontsize": 9, "family": "monospace", "parse_math": False}
            axes.text(column, row, text, ha="center", va="center", color="k" if shade < 0.6 else "w", **style)
    axes.imshow(image, aspect="auto")
    axes.set_xticks([])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.hlines([0.5, 5.5], -0.5, n_columns - 0.5, color="black", linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_attention(figure: Any, explanation: Explanation) -> None:
    n_layer, n_head, n, _ = explanation.attention_LxHxTxT.shape
    all_axes = figure.subplots(n_layer, n_head, sharex=True, sharey=True, squeeze=False)
    for (layer, head), axes in np.ndenumerate(all_axes):
        weights_TxT = explanation.attention_LxHxTxT[layer, head]
        image = axes.imshow(np.where(np.tri(n), weights_TxT, np.nan), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=7, pad=2)
        names = [shown(token)[:4] for token in explanation.tokens] if n <= 64 else []
        style = {"fontsize": 7 if n <= 24 else 4, "family": "monospace", "parse_math": False}
        axes.set_xticks(range(len(names)), names, **style)
        axes.set_yticks(range(len(names)), names, **style)
        axes.tick_params(length=0, pad=1)
    figure.colorbar(image, ax=all_axes, label="attention weight", shrink=0.5)


def body(explanation: Explanation) -> str:
    """HTML to put into a page or a notebook."""
    picture = io.BytesIO()
    draw(explanation).savefig(picture, dpi=110)
    places = zip(explanation.tokens, explanation.surprise_T, explanation.guesses, strict=False)
    text = "".join(_span(token, nats, guesses) for token, nats, guesses in places)
    mean = float(np.nanmean(explanation.surprise_T)) if len(explanation.tokens) > 1 else float("nan")
    encoded = base64.b64encode(picture.getvalue()).decode()
    return BODY.format(style=STYLE, mean=mean, text=text, picture=encoded)


def page(explanation: Explanation) -> str:
    """A page of HTML that needs no other file."""
    return PAGE.format(body=body(explanation))


def _span(token: str, nats: float, guesses: list[tuple[str, float]]) -> str:
    """A token in its colour, with a table of guesses that shows when one points at it."""
    shade = min(float(np.nan_to_num(nats)) / MAX_NATS, 1)
    rgb, ink = [round(255 + shade * (end - 255)) for end in BLUE], "white" if shade > 0.5 else "black"
    rows = "".join(f"<tr><td>{html.escape(shown(guess))}</td><td>{p:.1%}</td></tr>" for guess, p in guesses)
    caption = f"<caption>{html.escape(shown(token))}: {nats:.2f} nats</caption>" if guesses else ""
    text = html.escape("".join(shown(c) if c not in " \n" else c for c in token)).replace("\n", "↵\n")
    tag = f'<span tabindex="0" style="background:rgb({rgb[0]},{rgb[1]},{rgb[2]});color:{ink}">'
    return f"{tag}{text}<table>{caption}{rows}</table></span>" if guesses else f"{tag}{text}</span>"
