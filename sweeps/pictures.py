"""A picture's file: a figure to draw on, and what is written of it.

Needs matplotlib, which is loaded only when a picture is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from utils import InputError, NotWritten

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(path: Path, size: tuple[float, float]) -> Figure:
    """Return an empty figure for a file of the kind that its ending names; ``size`` in inches.

    Raises:
        InputError: matplotlib is not installed, or knows no such kind of file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"--plot {path}: a picture needs matplotlib: install it, or leave --plot out"
        ) from error
    # A figure of its own, not pyplot's: that would choose a window system for the whole process.
    figure = Figure(figsize=size, layout="constrained")
    if path.suffix.removeprefix(".").lower() not in figure.canvas.get_supported_filetypes():
        raise InputError(f"--plot {path}: give a name that ends in .png, .pdf or .svg")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, and the folders on the way to its file.

    Raises:
        NotWritten: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise NotWritten.of(path, error) from error
