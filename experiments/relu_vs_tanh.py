"""Figure 1, ReLU and tanh in training: python -m experiments.relu_vs_tanh --workdir DIR

A four-layer network on CIFAR-10 without regularization, with the learning rate chosen for each activation: once with
the paper's initial kernels and biases, once with initial kernels that saturate no unit of either network.
"""

import math
import sys
from pathlib import Path
from typing import Any

import ml_collections
from matplotlib.figure import Figure

from alexnet_jax.errors import UserError
from alexnet_jax.train import DivergedError
from alexnet_jax.variants import VARIANTS
from experiments.command import save_figure
from experiments.comparison import compare, spread
from experiments.study import Budget, Claim, Finding, Study, main

CLAIMS = (
    Claim("paper", "ReLU reaches 25 % training error in fewer epochs than tanh (figure 1)", "6 times faster"),
    Claim("unit", "The same, with initial kernels at which tanh is not saturated", "not in the paper"),
)
BUDGETS = {"full": Budget(45_000, 40), "reduced": Budget(10_000, 15, validation=500, test=1000)}
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
TARGET = 0.25


def config(study: Study, start: str, activation: str, rate: float) -> ml_collections.ConfigDict:
    """Return the config of one network: three convolutions and fc8, in one tower."""
    return study.config(
        activation=activation, learning_rate=rate, towers=1, widths=(32, 32, 64, 0, 0, 0, 0), stem=(5, 1, 2),
        image_size=32, random_crop=False, flip=False, lighting=False, lrn=False, dropout=0.0, weight_decay=0.0,
        warmup_steps=0, drop_at_epochs=(), log_every=max(1, study.budget.images // 64 // 4), **STARTS[start],
    )  # fmt: skip


def train(study: Study, start: str, activation: str, rate: float, seed: int) -> dict[str, Any]:
    """Return the record of one run, as `Study.train` does."""
    return study.train(f"{start}-{activation}-{rate:g}", config(study, start, activation, rate), seed)


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
    """Train every learning rate with one seed, then the fastest one with the other seeds."""
    records = {"budget_epochs": study.budget.epochs} | {start: {"rates": {}, "tried": {}} for start in STARTS}
    for (start, activation), rates in RATES.items():
        tried = {}
        for rate in rates:
            try:
                tried[rate] = train(study, start, activation, rate, 0)
            except DivergedError as error:
                print(error, file=sys.stderr)
        if not tried:
            raise UserError(f"every learning rate of {activation} diverged; lower those of RATES")
        means = {rate: by_epoch(record["curve"]) for rate, record in tried.items()}
        best = min(tried, key=lambda rate: (epochs_to(TARGET, means[rate]), means[rate][-1][1]))
        records[start]["tried"][activation] = {rate: curve[-1][1] for rate, curve in means.items()}
        records[start]["rates"][activation] = best
        others = [train(study, start, activation, best, seed) for seed in study.seeds[1:]]
        records[start][activation] = [tried[best], *others]
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Return a finding for each start."""
    return {start: judge_start(records[start], records["budget_epochs"]) for start in STARTS}


def judge_start(records: dict[str, Any], trained: float) -> Finding:
    """Return the epochs to the target; a run that does not reach it counts with all of its epochs: a bound."""
    means = {a: [by_epoch(r["curve"]) for r in records[a]] for a in ("relu", "tanh")}
    epochs = {a: [epochs_to(TARGET, curve) for curve in curves] for a, curves in means.items()}
    never = {a: sum(map(math.isinf, e)) for a, e in epochs.items()}
    counted = {a: [min(x, trained) for x in e] for a, e in epochs.items()}
    verdict = compare(counted["tanh"], counted["relu"]).verdict(+1)
    if never["relu"] and verdict != "contradicted":  # which more epochs would confirm
        lowest = {a: min(error for curve in means[a] for _, error in curve) for a in epochs}
        text = f"not reached in {trained:g} epochs; lowest: ReLU {lowest['relu']:.0%}, tanh {lowest['tanh']:.0%}"
        return Finding(text, "not decided: too few epochs")
    needed = {}
    for a, count in never.items():
        some = f" in {count} of {len(epochs[a])} runs" if count < len(epochs[a]) else ""
        needed[a] = f"over {trained:g} epochs{some}" if count else f"{spread(epochs[a])} epochs"
    bound = "over " if never["tanh"] else "under " if never["relu"] else ""
    ratio, rates = sum(counted["tanh"]) / sum(counted["relu"]), records["rates"]
    text = (
        f"ReLU {needed['relu']} (learning rate {rates['relu']:g}), tanh {needed['tanh']} ("
        f"learning rate {rates['tanh']:g}): {bound}{ratio:.1f} times"
    )
    return Finding(text, verdict)


def plot(records: dict[str, Any], path: Path) -> None:
    """Plot training error by epoch, a line for each seed: ReLU solid, tanh dashed (figure 1); one panel per start."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    titles = {"paper": "initial values of the paper", "unit": "initial values at which tanh is not saturated"}
    for axes, (start, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for activation, style in (("relu", "-"), ("tanh", "--")):
            for i, record in enumerate(records[start][activation]):
                label = None if i else f"{activation}; learning rate {records[start]['rates'][activation]:g}"
                epochs, errors = zip(*record["curve"], strict=True)
                axes.plot(epochs, errors, style, color="black", linewidth=1, label=label)
        axes.axhline(TARGET, color="0.7", linewidth=0.8, zorder=0)
        axes.set(title=title, xlabel="epochs", ylabel="training error", ylim=(0, None), xlim=(0, None))
        axes.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
