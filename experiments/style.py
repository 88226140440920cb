"""The look of the experiments' pictures: for the width of a page, in colors that color-blind readers tell apart."""

import matplotlib
from matplotlib.axes import Axes

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, PURPLE, SKY, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#777777"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, GRAY)
WIDTH = 7.0  # of a picture, in inches

# For the functions that draw: `@styled`.
styled = matplotlib.rc_context({
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.prop_cycle": matplotlib.cycler(color=CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "savefig.dpi": 160,
    "text.usetex": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
})  # fmt: skip


def plot_runs(axes: Axes, x: list[float], runs: list[list[float]], **options) -> None:
    """Plot the mean of some runs as a line, and a band from the lowest to the highest run.

    Args:
      x: [points].
      runs: [runs, points].
      options: of `Axes.plot`.
    """
    points = list(zip(*runs, strict=True))
    (line,) = axes.plot(x, [sum(values) / len(values) for values in points], **options)
    axes.fill_between(x, list(map(min, points)), list(map(max, points)), color=line.get_color(), alpha=0.2, linewidth=0)


def label_panels(axes: list[Axes]) -> None:
    """Write a, b, c … above the left corner of the panels of a picture."""
    for letter, axis in zip("abcdefgh", axes, strict=False):
        axis.annotate(
            letter, (0, 1), xytext=(-22, 6), xycoords="axes fraction", textcoords="offset points", weight="bold"
        )
