"""Common parts of all figures: colours, the layout of panels, and writing them."""

from __future__ import annotations

import math
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_care.process.os_errors import naming

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Okabe and Ito's colours, which can be distinguished with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
OTHER = "#B0B0B0"
# A panel's axes and the margins around them, in inches; the legend is in the lower margin. The
# layout is fixed because the automatic one lets labels overlap if a legend is wider than its axes.
AXES = (3.3, 2.1)
LEFT, RIGHT, _TOP, _BOTTOM = 0.8, 0.2, 0.35, 0.75
_DPI = 130


@dataclass(frozen=True)
class Curve:
    """A drawn figure: its file and a description."""

    file: Path
    title: str
    width: float
    """Relative to a figure of three panels side by side."""

    def data_url(self) -> str:
        """Return the picture itself, for a page that needs no other file."""
        return "data:image/png;base64," + b64encode(self.file.read_bytes()).decode("ascii")


def finish(
    axes: Axes,
    title: str,
    unit: str,
    *,
    share: bool,
    from_zero: bool,
    keys: int,
    x: str = "step",
) -> None:
    """Add title, labels, grid and legend to a panel; `keys` is the number of legend lines."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    # A factor such as 1e-5 above the axis would overlap the title.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.tick_params(labelsize=8)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if share:
        axes.set_ylim(-0.02, 1.02)
    elif from_zero and axes.dataLim.ymin >= 0:
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-12))
    if keys > 1:
        # Below the axes: inside, it would hide curves at 0 or 1.
        axes.legend(
            fontsize=8,
            frameon=False,
            ncols=keys,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            handlelength=1.2,
            handletextpad=0.5,
            columnspacing=1.0,
        )


def stack(axes: Axes, layers: DataFrame, *, width: float | None) -> None:
    """Draw the columns one above the other, as bars of that width or as filled areas."""
    tops = layers.cumsum(axis="columns")
    bases = tops.shift(axis="columns", fill_value=0.0)
    for place, name in enumerate(layers):
        look = {"color": OTHER if name == "other" else COLOURS[place], "label": name}
        if width is None:
            axes.fill_between(
                layers.index, bases[name], tops[name], linewidth=0, step="mid", **look
            )
        else:
            axes.bar(layers.index, layers[name], bottom=bases[name], width=width, **look)


def new_sheet(count: int, axes_width: float = AXES[0]) -> tuple[Figure, list[Axes]]:
    """Create a figure with `count` panels."""
    from matplotlib.figure import Figure

    across = 2 if count == 4 else min(count, 3)
    down = math.ceil(count / across)
    panel = (LEFT + axes_width + RIGHT, _TOP + AXES[1] + _BOTTOM)
    width, height = panel[0] * across, panel[1] * down
    # Figure without pyplot: draws with Agg and does not change the process's backend.
    figure = Figure(figsize=(width, height), dpi=_DPI)
    places = []
    for place in range(count):
        row, column = divmod(place, across)
        left = column * panel[0] + LEFT
        bottom = (down - 1 - row) * panel[1] + _BOTTOM
        box = (left / width, bottom / height, axes_width / width, AXES[1] / height)
        places.append(figure.add_axes(box))
    return figure, places


def save(figure: Figure, folder: Path, name: str, title: str) -> Curve:
    """Write a figure as a PNG file."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    file = folder / f"{name}.png"
    # A `$` in the name of a level, a reward or a variant is not a formula. Applied to all existing
    # texts, and to those of ticks, which are created while drawing.
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with rc_context({"text.parse_math": False}), naming(file):
        # Without matplotlib's version, equal runs give equal files.
        figure.savefig(file, facecolor="white", metadata={"Software": None})
    widest = 3 * (LEFT + AXES[0] + RIGHT)
    return Curve(file, title, figure.get_figwidth() / widest)
