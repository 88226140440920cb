"""Differences of means with their confidence intervals."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Comparison(NamedTuple):
    """A difference of means, and the noise that it must exceed: half of its 95 % confidence interval."""

    difference: float
    noise: float

    def verdict(self, claimed: float) -> str:
        """Return whether the difference has the sign of `claimed`, if it exceeds the noise."""
        if not abs(self.difference) > self.noise:
            return "within the noise"
        return "holds" if self.difference * claimed > 0 else "contradicted"

    def __str__(self) -> str:
        return f"{self.difference:+.2f} ± {self.noise:.2f}".replace("-", "−")


def compare(ours: Sequence[float], others: Sequence[float]) -> Comparison:
    """Return the mean of `ours` minus the mean of `others`, of independent runs, with Welch's interval.

    Raises:
      ValueError: fewer than two runs of either, which have no spread.
    """
    if min(len(ours), len(others)) < 2:
        raise ValueError(f"{len(ours)} and {len(others)} runs: a spread needs at least two runs of each")
    a, b = (np.var(x, ddof=1) / len(x) for x in (ours, others))
    difference = float(np.mean(ours) - np.mean(others))
    if not a + b:
        return Comparison(difference, 0.0)
    degrees = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(others) - 1))
    return Comparison(difference, float(stats.t.ppf(0.975, degrees) * math.sqrt(a + b)))


def compare_paired(ours: Sequence[float], others: Sequence[float]) -> Comparison:
    """Return the mean difference of two measurements of the same runs, with Student's interval.

    Raises:
      ValueError: fewer than two pairs.
    """
    if len(ours) != len(others) or len(ours) < 2:
        raise ValueError(f"{len(ours)} and {len(others)} runs: a spread needs at least two pairs")
    d = np.subtract(ours, others)
    return Comparison(float(d.mean()), float(stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return mean ± standard deviation as text."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def percent(records: Sequence[dict[str, Any]], key: str = "test_top1_error") -> list[float]:
    """Return one value of every record, in percent."""
    return [100 * record[key] for record in records]
