"""The look of the experiments' pictures: for the width of a page, in colors that color-blind readers tell apart."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import Claim, Finding
from experiments.command import save_figure

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, PURPLE, SKY, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#777777"
WIDTH = 7.0  # of a picture, in inches

# For the functions that draw: `@styled`.
styled = matplotlib.rc_context({
    "axes.grid": True,
    "axes.labelsize": 9,
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


@styled
def plot_differences(findings: Sequence[tuple[Claim, Finding]], labels: dict[str, str], path: Path) -> None:
    """Plot differences in percentage points with their intervals, sorted, and the paper's effect of each.

    Args:
      labels: of the claims' keys.
    """
    findings = sorted(findings, key=lambda pair: pair[1].comparison.difference)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(findings)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=GRAY, linewidth=0.8)
    for row, comparison in enumerate(finding.comparison for _, finding in findings):
        label = None if row else "here, with 95 % interval"
        axes.errorbar(
            comparison.difference, row, xerr=comparison.noise, fmt="o", color=BLUE, markersize=5, capsize=3, label=label
        )
    stated = [(claim.effect, row) for row, (claim, _) in enumerate(findings) if claim.paper != "not in the paper"]
    axes.plot(*zip(*stated, strict=True), "D", color=ORANGE, markersize=5, markerfacecolor="none", label="the paper")
    axes.set_yticks(range(len(findings)), [labels[claim.key] for claim, _ in findings])
    axes.set(ylim=(len(findings) - 0.5, -0.5), xlabel="difference of the test error (percentage points)")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")
    save_figure(figure, path)
