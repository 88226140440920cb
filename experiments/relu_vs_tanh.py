"""Figure 1, ReLU against tanh in training: python -m experiments.relu_vs_tanh --workdir DIR

A four-layer network on CIFAR-10 without any regularization, the learning rate chosen for each activation.
"""

import math
import sys
from pathlib import Path
from typing import Any

from alexnet_jax.train import DivergedError
from experiments import study
from experiments.study import Budget, Claim, Finding, Study

CLAIMS = (Claim("epochs", "ReLU reaches 25 % training error in fewer epochs than tanh (figure 1)", "6 times sooner"),)
BUDGETS = {"full": Budget(45_000, 40), "reduced": Budget(15_000, 10, validation=500, test=1000)}
RATES = (0.003, 0.01, 0.03, 0.1)
TARGET = 0.25


def config(of: Study, activation: str, rate: float):
    """Three convolutions and fc8, all in one tower."""
    return of.config(
        activation=activation, learning_rate=rate, towers=1, widths=(32, 32, 64, 0, 0, 0, 0), stem=(5, 1, 2),
        image_size=32, random_crop=False, flip=False, lighting=False, lrn=False, dropout=0.0, weight_decay=0.0,
        warmup_steps=0, drop_at_epochs=(), log_every=max(1, of.budget.images // 64 // 4),
    )  # fmt: skip


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
    records = {"budget_epochs": of.budget.epochs, "rates": {}}
    for activation in ("relu", "tanh"):
        tried = {}
        for rate in RATES:
            try:
                tried[rate] = of.train(f"{activation}-{rate:g}", config(of, activation, rate), seed=0)
            except DivergedError as error:
                print(error, file=sys.stderr)
        if not tried:
            raise ValueError(f"every learning rate of {activation} diverged")
        best = min(tried, key=lambda rate: (epochs_to(TARGET, tried[rate]["curve"]), tried[rate]["curve"][-1][1]))
        records["rates"][activation] = best
        records[activation] = [tried[best]]
        for seed in of.seeds[1:]:
            records[activation].append(of.train(f"{activation}-{best:g}", config(of, activation, best), seed))
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Epochs to the target; a run that does not reach it counts with the epochs it had, and the ratio as a bound."""
    had = records["budget_epochs"]
    epochs = {a: [epochs_to(TARGET, r["curve"]) for r in records[a]] for a in ("relu", "tanh")}
    never = {a: sum(map(math.isinf, e)) for a, e in epochs.items()}
    counted = {a: [min(x, had) for x in e] for a, e in epochs.items()}
    verdict = study.compare(counted["tanh"], counted["relu"]).verdict(+1)
    if never["relu"] and verdict != "the reverse":  # which more epochs would only make clearer
        lowest = {a: min(error for r in records[a] for _, error in r["curve"]) for a in epochs}
        text = f"not reached in {had:g} epochs; lowest: ReLU {lowest['relu']:.0%}, tanh {lowest['tanh']:.0%}"
        return {"epochs": Finding(text, "not decided: too few epochs")}
    needed = {a: f"over {had:g}" if never[a] else study.spread(counted[a], 2) for a in epochs}
    bound = "over " if never["tanh"] else "under " if never["relu"] else ""
    ratio, rates = sum(counted["tanh"]) / sum(counted["relu"]), records["rates"]
    text = (
        f"ReLU {needed['relu']} epochs (ε = {rates['relu']:g}), tanh {needed['tanh']} (ε = {rates['tanh']:g}): "
        f"{bound}{ratio:.1f} times"
    )
    return {"epochs": Finding(text, verdict)}


def plot(records: dict[str, Any], path: Path) -> None:
    """Training error against epochs, a line a seed: ReLU solid, tanh dashed, as in figure 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for activation, style in (("relu", "-"), ("tanh", "--")):
        for i, record in enumerate(records[activation]):
            label = None if i else f"{activation}, ε = {records['rates'][activation]:g}"
            epochs, errors = zip(*record["curve"], strict=True)
            axes.plot(epochs, errors, style, color="black", linewidth=1, label=label)
    axes.axhline(TARGET, color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="epochs", ylabel="training error", ylim=(0, None), xlim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
