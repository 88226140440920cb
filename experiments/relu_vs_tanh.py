"""Figure 1, ReLU against tanh in training: python -m experiments.relu_vs_tanh --workdir DIR

A four-layer network on CIFAR-10 without any regularization, the learning rate chosen for each activation; once from the
paper's start, and once from one where no unit of either network is saturated.
"""

import math
import sys
from pathlib import Path
from typing import Any

from alexnet_jax.train import DivergedError
from alexnet_jax.variants import VARIANTS
from experiments import study
from experiments.study import Budget, Claim, Finding, Study

CLAIMS = (
    Claim("paper", "ReLU reaches 25 % training error in fewer epochs than tanh (figure 1)", "6 times sooner"),
    Claim("unit", "The same, from a start at which tanh is not saturated", "not in the paper"),
)
BUDGETS = {"full": Budget(45_000, 40), "reduced": Budget(10_000, 15, validation=500, test=1000)}
# Section 5's kernels and biases, on pixels of 0 to 255 (section 2); or kernels made for each, on pixels divided by 70.
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
TARGET = 0.25


def config(of: Study, start: str, activation: str, rate: float):
    """Three convolutions and fc8, all in one tower."""
    return of.config(
        activation=activation, learning_rate=rate, towers=1, widths=(32, 32, 64, 0, 0, 0, 0), stem=(5, 1, 2),
        image_size=32, random_crop=False, flip=False, lighting=False, lrn=False, dropout=0.0, weight_decay=0.0,
        warmup_steps=0, drop_at_epochs=(), log_every=max(1, of.budget.images // 64 // 4), **STARTS[start],
    )  # fmt: skip


def train(of: Study, start: str, activation: str, rate: float, seed: int) -> dict[str, Any]:
    """One run, as `Study.train` gives it."""
    return of.train(f"{start}-{activation}-{rate:g}", config(of, start, activation, rate), seed)


def by_epoch(curve: list[tuple[float, float]]) -> list[tuple[int, float]]:
    """The mean error of each epoch, at its end; within an epoch the error of a curve rises and falls."""
    epochs = {}
    for epoch, error in curve:
        epochs.setdefault(math.ceil(epoch - 1e-6), []).append(error)
    return [(epoch, sum(errors) / len(errors)) for epoch, errors in epochs.items()]


def epochs_to(target: float, curve: list[tuple[float, float]]) -> float:
    """The epoch at which a curve of (epoch, error) first comes down to the target, on straight lines; ∞ if never."""
    before = None
    for epoch, error in curve:
        if error <= target:
            if before is None:
                return epoch
            share = (before[1] - target) / (before[1] - error)
            return before[0] + share * (epoch - before[0])
        before = epoch, error
    return math.inf


def run(of: Study) -> dict[str, Any]:
    """Every rate once; then the other seeds at the rate that was fastest."""
    records = {"budget_epochs": of.budget.epochs} | {start: {"rates": {}, "tried": {}} for start in STARTS}
    for (start, activation), rates in RATES.items():
        tried = {}
        for rate in rates:
            try:
                tried[rate] = train(of, start, activation, rate, 0)
            except DivergedError as error:
                print(error, file=sys.stderr)
        if not tried:
            raise ValueError(f"every learning rate of {activation} diverged")
        means = {rate: by_epoch(record["curve"]) for rate, record in tried.items()}
        best = min(tried, key=lambda rate: (epochs_to(TARGET, means[rate]), means[rate][-1][1]))
        records[start]["tried"][activation] = {rate: curve[-1][1] for rate, curve in means.items()}
        records[start]["rates"][activation] = best
        others = [train(of, start, activation, best, seed) for seed in of.seeds[1:]]
        records[start][activation] = [tried[best], *others]
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """A finding for each start."""
    return {start: judge_start(records[start], records["budget_epochs"]) for start in STARTS}


def judge_start(records: dict[str, Any], had: float) -> Finding:
    """Epochs to the target; a run that does not reach it counts with the epochs it had, and the ratio as a bound."""
    means = {a: [by_epoch(r["curve"]) for r in records[a]] for a in ("relu", "tanh")}
    epochs = {a: [epochs_to(TARGET, curve) for curve in curves] for a, curves in means.items()}
    never = {a: sum(map(math.isinf, e)) for a, e in epochs.items()}
    counted = {a: [min(x, had) for x in e] for a, e in epochs.items()}
    verdict = study.compare(counted["tanh"], counted["relu"]).verdict(+1)
    if never["relu"] and verdict != "the reverse":  # which more epochs would only make clearer
        lowest = {a: min(error for curve in means[a] for _, error in curve) for a in epochs}
        text = f"not reached in {had:g} epochs; lowest: ReLU {lowest['relu']:.0%}, tanh {lowest['tanh']:.0%}"
        return Finding(text, "not decided: too few epochs")
    needed = {}
    for a, count in never.items():
        some = f" in {count} of {len(epochs[a])} runs" if count < len(epochs[a]) else ""
        needed[a] = f"over {had:g} epochs{some}" if count else f"{study.spread(epochs[a])} epochs"
    bound = "over " if never["tanh"] else "under " if never["relu"] else ""
    ratio, rates = sum(counted["tanh"]) / sum(counted["relu"]), records["rates"]
    text = (
        f"ReLU {needed['relu']} (ε = {rates['relu']:g}), tanh {needed['tanh']} (ε = {rates['tanh']:g}): "
        f"{bound}{ratio:.1f} times"
    )
    return Finding(text, verdict)


def plot(records: dict[str, Any], path: Path) -> None:
    """Training error against epochs, a line a seed: ReLU solid, tanh dashed, as in figure 1; a panel for each start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    titles = {"paper": "from the paper's start", "unit": "from one where tanh is not saturated"}
    for axes, (start, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for activation, style in (("relu", "-"), ("tanh", "--")):
            for i, record in enumerate(records[start][activation]):
                label = None if i else f"{activation}, ε = {records[start]['rates'][activation]:g}"
                epochs, errors = zip(*record["curve"], strict=True)
                axes.plot(epochs, errors, style, color="black", linewidth=1, label=label)
        axes.axhline(TARGET, color="0.7", linewidth=0.8, zorder=0)
        axes.set(title=title, xlabel="epochs", ylabel="training error", ylim=(0, None), xlim=(0, None))
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
