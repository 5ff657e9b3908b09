"""The palette and the style of every plot. Importing this needs no matplotlib; `figure` does."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

# Okabe-Ito: colour-blind readers can tell these colours apart too.
BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY, INK, FAINT = "#666666", "#333333", "#999999"
COLOURS = {
    "base": GREY,
    "teacher": PURPLE,
    "reference": ORANGE,
    "target": BLUE,
    "purified": BLUE,
    "opsd": VERMILLION,
}
"""Of the four distributions, and of the targets that a run trains towards."""
LINE = {"marker": "o", "markersize": 2.5, "linewidth": 1.3}
TITLE, TEXT = 9, 8
"""Font sizes."""


def figure(
    rows: int, columns: int, *, panel: tuple[float, float] = (3.4, 2.9), size: tuple[float, float] | None = None
) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its rows·columns axes, row by row. panel: inches of each; size: of the whole figure instead.

    It belongs to no window and changes no global state. Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=size or (panel[0] * columns, panel[1] * rows))
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def style(axis: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Title, labels and the common look of an axis: small ticks, no lines at the top and on the right."""
    axis.set_title(title, fontsize=TITLE)
    axis.set_xlabel(x, fontsize=TEXT)
    axis.set_ylabel(y, fontsize=TEXT)
    axis.tick_params(labelsize=TEXT)
    axis.spines[["top", "right"]].set_visible(False)


def legend(axis: Any) -> None:
    """A legend without a frame, in the size of the text."""
    axis.legend(frameon=False, fontsize=TEXT)


def save(drawn: Any, path: Path, dpi: int = 130) -> Path:
    """Write a figure as PNG and return the path. The folder is made where it is missing."""
    drawn.tight_layout()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=dpi, format="png")
    return path


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour, 0 to 255.

    >>> rgb(BLUE)
    (0, 114, 178)
    """
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue


def data_uri(path: Path) -> str:
    """A PNG as an address that holds it, for a page that loads nothing."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()
