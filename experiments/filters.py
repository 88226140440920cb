"""Figure 3, what the two towers' first kernels look like: python -m experiments.filters --workdir DIR

A kernel's colourfulness is the share of its energy that is off the grey axis: 0 for a kernel that weighs red, green and
blue alike, 2/3 on average for one that is drawn at random. The towers of a run have specialized if their means differ
by more than chance makes them, which is found by dealing the same kernels out to two towers at random.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import plots
from experiments import study
from experiments.study import Budget, Claim, Finding, Study

CLAIMS = (
    Claim("specialized", "The towers specialize, one in colour and one not (figure 3)", "in every run"),
)  # fmt: skip
BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(15_000, 8, test=1000)}
CHANCE = 0.05


def colourfulness(kernels: np.ndarray) -> np.ndarray:
    """Of each kernel of [h, w, 3, N], the share of its energy off the grey axis: [N], 0 to 1."""
    energy = np.sum(np.square(kernels, dtype=np.float64), axis=(0, 1, 2))
    grey = 3 * np.sum(kernels.mean(axis=2, dtype=np.float64) ** 2, axis=(0, 1))
    return 1 - grey / np.maximum(energy, 1e-30)


def specialization(values: Sequence[float], deals: int = 10_000) -> tuple[float, float]:
    """The difference of the towers' means, tower 1 less tower 0, and how often chance makes one as large.

    Args:
      values: of each kernel, those of tower 0 first.
      deals: random deals to compare with.
    """
    values = np.asarray(values)
    half = len(values) // 2
    random = np.random.default_rng(0)
    dealt = random.permuted(np.tile(values, (deals, 1)), axis=1)
    by_chance = dealt[:, half:].mean(axis=1) - dealt[:, :half].mean(axis=1)
    difference = values[half:].mean() - values[:half].mean()
    return float(difference), float((1 + np.sum(np.abs(by_chance) >= abs(difference) - 1e-12)) / (1 + deals))


def run(of: Study) -> dict[str, Any]:
    """Runs with 7×7 first kernels, in which there is more to see than in the recipe's 3×3."""
    records = {"runs": []}
    for seed in of.seeds:
        record = of.train("seven-by-seven", of.config(stem=(7, 1, 3)), seed)
        kernels = np.asarray(of.open(record).params["conv1"]["kernel"])
        plots.plot_filters(kernels, of.results / f"filters-seed{seed}.png")
        values = colourfulness(kernels)
        difference, chance = specialization(values)
        records["runs"].append({
            **record, "colourfulness": values.tolist(), "difference": difference, "chance": chance,
            "kernels": np.round(kernels, 4).tolist() if seed == 0 else None,
        })  # fmt: skip
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """The claim is about every run, and so is the verdict."""
    runs = records["runs"]
    special = sum(r["chance"] < CHANCE for r in runs)
    towers = []
    for r in runs:
        half = len(r["colourfulness"]) // 2
        towers.append(f"{np.mean(r['colourfulness'][:half]):.2f} and {np.mean(r['colourfulness'][half:]):.2f}")
    chances = ", ".join(f"{r['chance']:.2g}" for r in runs)
    text = f"colourfulness {'; '.join(towers)} (by chance: p = {chances}): {special} of {len(runs)} runs"
    verdict = "holds" if special == len(runs) else "in some runs" if special else "within the noise"
    return {"specialized": Finding(text, verdict)}


def plot(records: dict[str, Any], path: Path) -> None:
    """The first run's kernels above the colourfulness of every run's kernels, the towers in two colours."""
    from matplotlib.figure import Figure

    runs = records["runs"]
    kernels = np.asarray(runs[0]["kernels"])
    towers = np.split(kernels, 2, axis=-1)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.3, 1])
    for tower, axis in enumerate(left.subplots(2, 1)):
        axis.imshow(plots.tile(towers[tower], min(8, towers[tower].shape[-1])), interpolation="nearest")
        axis.set_title(f"conv1, tower {tower}, seed 0", fontsize=10)
        axis.axis("off")
    axes = right.subplots()
    for place, r in enumerate(runs):
        for tower, (values, color) in enumerate(
            zip(np.split(np.asarray(r["colourfulness"]), 2), ("tab:blue", "tab:orange"), strict=True)
        ):
            spot = place + 0.3 * (tower - 0.5)
            label = None if place else f"tower {tower}"
            axes.plot([spot] * len(values), values, "o", color=color, alpha=0.4, label=label)
            axes.plot(spot, values.mean(), "_", color="black", markersize=16)
    axes.set_xticks(range(len(runs)), [f"seed {r['seed']}" for r in runs])
    axes.set(ylabel="colourfulness", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
