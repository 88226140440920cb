"""Differences of means over seeds, their confidence intervals, Holm's correction, and power.

The forms of an experiment share their seeds, and with a seed the initial values of equal layers, the order of the
images and their crops. An error is modeled as form + seed + noise (a randomized block design), so a seed that is
difficult for every form does not count as noise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval


class Comparison(NamedTuple):
    """An estimated difference with its standard error: the basis of an interval, of a p-value and of a power."""

    difference: float
    error: float  # standard error of the difference
    degrees: float  # degrees of freedom of the error
    n: int  # seeds, or other independent units
    bound: int = 0  # 1: the true difference may be larger, −1: it may be smaller

    @property
    def noise(self) -> float:
        """Half of the confidence interval."""
        return float(stats.t.ppf((1 + LEVEL) / 2, self.degrees) * self.error)

    @property
    def p(self) -> float:
        """The probability of such a difference, or a larger one of either sign, if there is none.

        It is 1 for a bound that does not exclude that there is none: a lower bound below 0, or an upper one above it.
        """
        if self.bound * self.difference < 0:
            return 1.0
        if not self.error:
            return 0.0 if self.difference else 1.0
        return float(2 * stats.t.sf(abs(self.difference) / self.error, self.degrees))

    def power(self, effect: float, alpha: float = 1 - LEVEL) -> float:
        """Return the probability to find an effect of that size with p < alpha and its sign, given this error."""
        if not self.error:
            return 1.0
        threshold = stats.t.ppf(1 - alpha / 2, self.degrees)
        return float(stats.nct.sf(threshold, self.degrees, abs(effect) / self.error))

    def power_of_equality(self, effect: float, alpha: float = 1 - LEVEL) -> float:
        """Return the probability that the interval of 1 − alpha is within ± effect if there is no difference."""
        threshold = stats.t.ppf(1 - alpha / 2, self.degrees)
        chances = (np.arange(1000) + 0.5) / 1000  # of the estimated errors, in units of the true one
        errors = np.sqrt(stats.chi2.ppf(chances, self.degrees) / self.degrees)
        margins = (abs(effect) / self.error - threshold * errors) if self.error else np.inf
        return float(np.mean(np.maximum(0, 2 * stats.norm.cdf(margins) - 1)))

    def excludes(self, effect: float) -> bool:
        """Return whether the interval does not contain a difference of that size."""
        return abs(self.difference - effect) > self.noise

    def __str__(self) -> str:
        return f"{self.difference:+.2f} ± {self.noise:.2f}".replace("-", "−")


def contrast(forms: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> Comparison:
    """Return a weighted sum of the means of some forms; the noise is estimated from all of them.

    Args:
      forms: the measurements of each form, with the same seeds in the same order; with two forms the interval is that
        of the paired t-test.
      weights: of the forms in the sum, which add up to 0.

    Raises:
      ValueError: fewer than two forms or two seeds, or forms of different lengths.
    """
    values = [list(x) for x in forms.values()]
    if len({len(x) for x in values}) != 1 or len(values) < 2 or len(values[0]) < 2:
        raise ValueError(f"forms of {', '.join(str(len(x)) for x in values)} seeds: expected two equally long or more")
    x = np.asarray(values, np.float64)
    count, n = x.shape
    noise = x - x.mean(axis=0) - x.mean(axis=1, keepdims=True) + x.mean()
    degrees = (count - 1) * (n - 1)
    variance = float(np.sum(noise**2)) / degrees
    means = dict(zip(forms, x.mean(axis=1), strict=True))
    difference = sum(weight * means[form] for form, weight in weights.items())
    error = math.sqrt(variance * sum(weight**2 for weight in weights.values()) / n)
    return Comparison(float(difference), error, degrees, n)


def compare_paired(ours: Sequence[float], others: Sequence[float]) -> Comparison:
    """Return the mean of `ours` minus the mean of `others`, measured with the same seeds; raises as `contrast`."""
    return contrast({"ours": ours, "others": others}, {"ours": 1.0, "others": -1.0})


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values that are adjusted for their number (Holm 1979), in the same order."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return mean ± standard deviation as text."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def percent(records: Sequence[dict[str, Any]], key: str = "test_top1_error") -> list[float]:
    """Return one value of every record, in percent."""
    return [100 * record[key] for record in records]
