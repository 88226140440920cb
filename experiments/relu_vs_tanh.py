"""Figure 1, ReLU and tanh in training: python -m experiments.relu_vs_tanh --workdir DIR

A four-layer network on CIFAR-10 without regularization, with the learning rate chosen for each activation: once with
the paper's initial kernels and biases, once with initial kernels that saturate no unit of either network. The learning
rate is constant, so the number of epochs changes nothing but the end of the curve.
"""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.errors import UserError
from alexnet_jax.train import DivergedError
from alexnet_jax.variants import VARIANTS
from experiments.claims import Claim, Finding
from experiments.command import save_figure
from experiments.comparison import compare_paired, spread
from experiments.study import Budget, Study, main
from experiments.style import BLUE, GRAY, ORANGE, WIDTH, label_panels, plot_runs, styled

CLAIMS = (
    Claim("paper", "ReLU reaches 25 % training error in fewer epochs than tanh (figure 1)", "6 times faster",
          math.log(6), ratio=True),
    Claim("unit", "The same, with initial kernels at which tanh is not saturated", "not in the paper",
          math.log(1.25), ratio=True),
)  # fmt: skip
BUDGETS = {"full": Budget(45_000, 80), "reduced": Budget(10_000, 80, validation=500, test=1000)}
SEEDS = 5
# Section 5's kernels and biases, on pixels of 0 to 255 (section 2); or those of `study.kernel_std`, on pixels / 70.
STARTS = {
    "paper": {"input_scale": 1.0, "kernel_std": VARIANTS["paper"].kernel_std, "bias": VARIANTS["paper"].bias},
    "unit": {},
}
RATES = {
    ("paper", "relu"): (0.0003, 0.001, 0.003),
    ("paper", "tanh"): (0.003, 0.01, 0.03),
    ("unit", "relu"): (0.001, 0.003, 0.01, 0.03),
    ("unit", "tanh"): (0.003, 0.01, 0.03),
}
CAPTION = "Error in training by epoch: means over the seeds, with bands from the lowest to the highest run."
# At most those of the budget.
EPOCHS = {("paper", "relu"): 20, ("paper", "tanh"): 80, ("unit", "relu"): 30, ("unit", "tanh"): 20}
SEARCH_EPOCHS = 20.0  # for the choice of the learning rate
LEVELS = (0.5, 0.4, 0.3, 0.25)  # of the training error
TARGET = LEVELS[-1]


def config(study: Study, start: str, activation: str, rate: float) -> ml_collections.ConfigDict:
    """Return the config of one network: three convolutions and fc8, in one tower."""
    return study.config(
        activation=activation, learning_rate=rate, towers=1, widths=(32, 32, 64, 0, 0, 0, 0), stem=(5, 1, 2),
        image_size=32, random_crop=False, flip=False, lighting=False, lrn=False, dropout=0.0, weight_decay=0.0,
        warmup_steps=0, drop_at_epochs=(), log_every=max(1, study.budget.images // 64 // 4),
        num_epochs=float(min(EPOCHS[start, activation], study.budget.epochs)), **STARTS[start],
    )  # fmt: skip


def train(study: Study, start: str, activation: str, rate: float, seed: int) -> dict[str, Any]:
    """Return the record of one run, as `Study.train` does."""
    return study.train(f"{start}-{activation}-{rate:g}", config(study, start, activation, rate), seed)


def search(study: Study, start: str, activation: str) -> dict[float, list[tuple[int, float]]]:
    """Return the training error of each epoch at each learning rate that does not diverge, in short runs of seed 0."""
    curves = {}
    for rate in RATES[start, activation]:
        short = config(study, start, activation, rate)
        short.num_epochs = min(short.num_epochs, SEARCH_EPOCHS)
        try:
            curves[rate] = by_epoch(study.train(f"search-{start}-{activation}-{rate:g}", short, 0)["curve"])
        except DivergedError as error:
            print(error, file=sys.stderr)
    return curves


def by_epoch(curve: list[tuple[float, float]]) -> list[tuple[int, float]]:
    """Return the mean error of each epoch as a curve of (epoch, error)."""
    epochs = {}
    for epoch, error in curve:
        epochs.setdefault(math.ceil(epoch - 1e-6), []).append(error)
    return [(epoch, sum(errors) / len(errors)) for epoch, errors in epochs.items()]


def epochs_to(target: float, curve: list[tuple[float, float]]) -> float:
    """Return the epoch at which a curve of (epoch, error) first reaches the target, interpolated; ∞ if never."""
    before = None
    for epoch, error in curve:
        if error <= target:
            if before is None:
                return epoch
            share = (before[1] - target) / (before[1] - error)
            return before[0] + share * (epoch - before[0])
        before = epoch, error
    return math.inf


def run(study: Study) -> dict[str, Any]:
    """Train the fastest learning rate of each start and activation with every seed."""
    records = {start: {"rates": {}, "tried": {}} for start in STARTS}
    for start, activation in RATES:
        tried = search(study, start, activation)
        fastest = sorted(tried, key=lambda rate: (epochs_to(TARGET, tried[rate]), tried[rate][-1][1]))
        records[start]["tried"][activation] = {rate: curve[-1][1] for rate, curve in tried.items()}
        rate, runs = _first_that_converges(study, start, activation, fastest)
        records[start]["rates"][activation] = rate
        records[start][activation] = runs
    return records


def _first_that_converges(
    study: Study, start: str, activation: str, rates: list[float]
) -> tuple[float, list[dict[str, Any]]]:
    """Return the first learning rate at which the run of no seed diverges, and the records of its runs.

    Raises:
      UserError: every learning rate diverges with some seed.
    """
    for rate in rates:
        try:
            return rate, [train(study, start, activation, rate, seed) for seed in study.seeds]
        except DivergedError as error:
            print(error, file=sys.stderr)
    raise UserError(f"every learning rate of {activation} diverged; lower those of RATES")


class Times(NamedTuple):
    """The epochs of each run to a training error; a run that does not reach it counts with all of its epochs."""

    epochs: list[float]
    never: int  # runs that do not reach it

    def __str__(self) -> str:
        if not self.never:
            return f"{spread(self.epochs)} epochs"
        some = f" in {self.never} of {len(self.epochs)} runs" if self.never < len(self.epochs) else ""
        return f"over {max(self.epochs):.0f} epochs{some}"


def times(records: list[dict[str, Any]], level: float) -> Times:
    """Return the epochs that some runs take to a level of the training error."""
    curves = [by_epoch(record["curve"]) for record in records]
    epochs = [epochs_to(level, curve) for curve in curves]
    counted = [min(x, curve[-1][0]) for x, curve in zip(epochs, curves, strict=True)]
    return Times(counted, sum(map(math.isinf, epochs)))


def ratio(relu: Times, tanh: Times) -> str:
    """Return how many times as many epochs tanh takes, the geometric mean over the seeds; or a bound, or a dash."""
    if relu.never and tanh.never:
        return "–"
    bound = "over " if tanh.never else "under " if relu.never else ""
    return f"{bound}{np.exp(np.mean(np.log(tanh.epochs) - np.log(relu.epochs))):.2f}"


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare the logarithms of the epochs to 25 % training error, tanh minus ReLU, for each start."""
    return {start: judge_start(records[start]) for start in STARTS}


def judge_start(records: dict[str, Any]) -> Finding:
    """Return the ratio at each level and the comparison at the last.

    Where some runs of tanh do not reach 25 % the ratio is a lower bound, and where some of ReLU do not it is an upper
    bound. If neither reaches it there is no comparison.
    """
    by_level = {level: [times(records[a], level) for a in ("relu", "tanh")] for level in LEVELS}
    ratios = ", ".join(f"{ratio(*pair)} at {100 * level:.0f} %" for level, pair in by_level.items())
    relu, tanh = by_level[TARGET]
    rates = records["rates"]
    text = (
        f"tanh ÷ ReLU {ratios} (to {100 * TARGET:.0f} %: ReLU {relu}, learning rate {rates['relu']:g}; tanh {tanh}, "
        f"learning rate {rates['tanh']:g})"
    )
    if relu.never and tanh.never:
        return Finding(text, None)
    comparison = compare_paired(np.log(tanh.epochs).tolist(), np.log(relu.epochs).tolist())
    return Finding(text, comparison._replace(bound=1 if tanh.never else -1 if relu.never else 0))


@styled
def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the training error of each epoch, ReLU solid and tanh dashed (figure 1); one panel per start.

    The lines are means over the seeds, the bands reach from the lowest to the highest.
    """
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    titles = {"paper": "the paper's initial values", "unit": "initial values that do not saturate tanh"}
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (start, title) in zip(panels, titles.items(), strict=True):
        for activation, name, style, color in (("relu", "ReLU", "-", BLUE), ("tanh", "tanh", "--", ORANGE)):
            curves = [by_epoch(record["curve"]) for record in records[start][activation]]
            errors = [[100 * error for _, error in curve] for curve in curves]
            label = f"{name}, learning rate {records[start]['rates'][activation]:g}"
            plot_runs(axes, [epoch for epoch, _ in curves[0]], errors, linestyle=style, color=color, label=label)
        axes.axhline(100 * TARGET, color=GRAY, linewidth=0.8, zorder=0)
        axes.annotate(
            f"{100 * TARGET:.0f} %", (1, 100 * TARGET), xytext=(0, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", color=GRAY, fontsize=8,
        )  # fmt: skip
        axes.set(title=title, xlabel="epochs", ylim=(0, None), xlim=(0, None))
        axes.legend()
    panels[0].set_ylabel("training error (%)")
    label_panels(panels)
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
