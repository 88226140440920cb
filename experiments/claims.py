"""Claims of the paper, what was measured, and the verdicts."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments.command import save_figure
from experiments.comparison import LEVEL, Comparison, holm
from experiments.style import BLUE, GRAY, ORANGE, WIDTH, styled

ALPHA = 1 - LEVEL
HEADER = ("claim", "the paper", "measured", "n", "power", "verdict")


class Claim(NamedTuple):
    """A claim, and the difference that its experiment looks for."""

    key: str
    text: str
    paper: str  # the paper's figure
    effect: float  # the difference of the paper, with its sign; where it gives none, the one of `unit` to look for
    equal: bool = False  # whether the claim is that the difference, of either sign, is smaller than `effect`
    ratio: bool = False  # whether `effect` and the difference are logarithms of ratios

    @property
    def stated(self) -> bool:
        """Whether the effect is a figure of the paper."""
        return re.search(r"\b\d", self.paper) is not None


class PValue(NamedTuple):
    """A test without an estimate; what it finds has the claimed sign."""

    p: float
    n: int  # independent units


class Finding(NamedTuple):
    """What was measured for a claim."""

    text: str  # the means of both forms, with their unit
    comparison: Comparison | PValue | None  # None: neither an estimate nor a test, for the reason in `text`


def difference(claim: Claim, comparison: Comparison) -> str:
    """Return an estimate with its interval as text: a difference, or the ratio."""
    if not claim.ratio:
        return str(comparison)
    low, middle, high = (
        math.exp(comparison.difference + x) for x in (-comparison.noise, 0.0, comparison.noise)
    )  # fmt: skip
    bound = {1: "over ", 0: "", -1: "under "}[comparison.bound]
    return f"{bound}{middle:.2f} times ({low:.2f} to {high:.2f})"


def effect(claim: Claim) -> str:
    """Return the effect of a claim as text."""
    if claim.ratio:
        return f"{math.exp(claim.effect):.3g} times"
    return f"{'±' if claim.equal else ''}{claim.effect:{'' if claim.equal else '+'}g}".replace("-", "−")


def p_value(claim: Claim, comparison: Comparison | PValue | None) -> float:
    """Return the p-value of a claim: of no difference, or, if the claim is equality, of a difference of its effect."""
    if comparison is None:
        return 1.0
    return _beyond(claim, comparison).p if claim.equal else comparison.p


def _beyond(claim: Claim, comparison: Comparison) -> Comparison:
    """Return by how much a difference, of either sign, is larger than the one that still counts as equality."""
    return comparison._replace(difference=abs(comparison.difference) - abs(claim.effect))


def verdict(claim: Claim, comparison: Comparison | PValue | None, p: float) -> str:
    """Return the verdict on a claim.

    "holds" and "contradicted" need p < ALPHA. Otherwise the difference is "smaller than stated", if its interval does
    not contain the claim's effect, or "not decided". A claim that holds with a difference whose interval does not
    contain the paper's figure has that in its verdict.

    Args:
      p: the p-value of the claim, adjusted for the number of rows.
    """
    if comparison is None:
        return "not measured"
    if isinstance(comparison, PValue):
        return "holds" if p < ALPHA else "not decided"
    if claim.equal:
        if p >= ALPHA:
            return "not decided"
        return "holds" if _beyond(claim, comparison).difference < 0 else "contradicted"
    size = ""
    if comparison.excludes(claim.effect) and not comparison.bound:
        smaller = (claim.effect - comparison.difference) * claim.effect > 0
        size = f"{'smaller' if smaller else 'larger'} than stated"
    if p < ALPHA:
        if comparison.difference * claim.effect < 0:
            return "contradicted"
        return f"holds, {size}" if size and claim.stated else "holds"
    return size if size == "smaller than stated" else "not decided"


def rows(findings: Sequence[tuple[Claim, Finding | None]]) -> list[tuple[str, ...]]:
    """Return a row of `HEADER` for each claim; None is an experiment that was not run.

    The p-values are adjusted by Holm's method for the number of claims. The power is that of the smallest of Holm's
    thresholds, ALPHA ÷ the number of claims, so it is a lower bound.
    """
    p_values = [p_value(claim, finding and finding.comparison) for claim, finding in findings]
    table = []
    for (claim, finding), p in zip(findings, holm(p_values), strict=True):
        if finding is None:
            table.append((claim.text, claim.paper, "not run yet", "", "", ""))
        elif (comparison := finding.comparison) is None:
            table.append((claim.text, claim.paper, finding.text, "", "", "not measured"))
        elif isinstance(comparison, PValue):
            table.append((claim.text, claim.paper, finding.text, str(comparison.n), "", verdict(claim, comparison, p)))
        else:
            measured = f"{finding.text}: {difference(claim, comparison)}"
            power_of = comparison.power_of_equality if claim.equal else comparison.power
            power = f"{power_of(claim.effect, ALPHA / len(findings)):.2f} for {effect(claim)}"
            table.append((claim.text, claim.paper, measured, str(comparison.n), power, verdict(claim, comparison, p)))
    return table


@styled
def plot_differences(findings: Sequence[tuple[Claim, Finding]], labels: dict[str, str], path: Path) -> None:
    """Plot differences in percentage points with their intervals, sorted, and what each is compared with.

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
    stated = [(claim.effect, row) for row, (claim, _) in enumerate(findings) if claim.stated]
    axes.plot(*zip(*stated, strict=True), "D", color=ORANGE, markersize=5, markerfacecolor="none", label="the paper")
    for row, claim in enumerate(claim for claim, _ in findings):
        if claim.equal:
            ends, label = (-claim.effect, claim.effect), "counts as equal"
            axes.plot(
                ends, (row, row), color=GRAY, linewidth=8, alpha=0.3, solid_capstyle="butt", zorder=0, label=label
            )
    axes.set_yticks(range(len(findings)), [labels[claim.key] for claim, _ in findings])
    axes.set(ylim=(len(findings) - 0.5, -0.5), xlabel="test error with the part minus without it (points)")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    save_figure(figure, path)
