"""Figure 3, the first kernels of the two towers: python -m experiments.filters --workdir DIR

The colorfulness of a kernel is the share of its energy off the gray axis: 0 for a kernel with equal weights for red,
green and blue, 2/3 on average for a random one. The towers of a run have specialized if their means differ more than
by chance (a permutation test: the same kernels are assigned to two towers at random).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax import plots
from experiments.command import save_figure
from experiments.study import Budget, Claim, Finding, Study, main

CLAIMS = (
    Claim("specialized", "The towers specialize, one in color and one not (figure 3)", "in every run"),
)  # fmt: skip
BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(15_000, 8, test=1000)}
CHANCE = 0.05


def colorfulness(kernels: np.ndarray) -> np.ndarray:
    """Return the share of the energy off the gray axis, [N] in 0 to 1, of each kernel of [h, w, 3, N]."""
    energy = np.sum(np.square(kernels, dtype=np.float64), axis=(0, 1, 2))
    gray = 3 * np.sum(kernels.mean(axis=2, dtype=np.float64) ** 2, axis=(0, 1))
    return 1 - gray / np.maximum(energy, 1e-30)


def specialization(values: Sequence[float], permutations: int = 10_000) -> tuple[float, float]:
    """Return the mean of tower 1 minus that of tower 0, and the probability p of such a difference by chance.

    Args:
      values: of each kernel, those of tower 0 first.
      permutations: random assignments to compare with.
    """
    values = np.asarray(values)
    half = len(values) // 2
    random = np.random.default_rng(0)
    permuted = random.permuted(np.tile(values, (permutations, 1)), axis=1)
    by_chance = permuted[:, half:].mean(axis=1) - permuted[:, :half].mean(axis=1)
    difference = values[half:].mean() - values[:half].mean()
    return float(difference), float((1 + np.sum(np.abs(by_chance) >= abs(difference) - 1e-12)) / (1 + permutations))


def run(study: Study) -> dict[str, Any]:
    """Train with first kernels of 7×7, which show more than the config's 3×3."""
    records = {"runs": []}
    for seed in study.seeds:
        record = study.train("seven-by-seven", study.config(stem=(7, 1, 3)), seed)
        kernels = np.asarray(study.open(record).params["conv1"]["kernel"])
        plots.plot_filters(kernels, study.results / f"filters-seed{seed}.png")
        values = colorfulness(kernels)
        difference, chance = specialization(values)
        records["runs"].append({
            **record, "colorfulness": values.tolist(), "difference": difference, "chance": chance,
            "kernels": np.round(kernels, 4).tolist() if seed == 0 else None,
        })  # fmt: skip
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Judge every run; the claim holds if all have specialized."""
    runs = records["runs"]
    special = sum(r["chance"] < CHANCE for r in runs)
    towers = []
    for r in runs:
        half = len(r["colorfulness"]) // 2
        towers.append(f"{np.mean(r['colorfulness'][:half]):.2f} and {np.mean(r['colorfulness'][half:]):.2f}")
    chances = ", ".join(f"{r['chance']:.2g}" for r in runs)
    text = f"colorfulness {'; '.join(towers)} (by chance: p = {chances}): {special} of {len(runs)} runs"
    verdict = "holds" if special == len(runs) else "in some runs" if special else "within the noise"
    return {"specialized": Finding(text, verdict)}


def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the first run's kernels, and the colorfulness of every run's kernels, the towers in two colors."""
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
    for column, r in enumerate(runs):
        for tower, (values, color) in enumerate(
            zip(np.split(np.asarray(r["colorfulness"]), 2), ("tab:blue", "tab:orange"), strict=True)
        ):
            x = column + 0.3 * (tower - 0.5)
            label = None if column else f"tower {tower}"
            axes.plot([x] * len(values), values, "o", color=color, alpha=0.4, label=label)
            axes.plot(x, values.mean(), "_", color="black", markersize=16)
    axes.set_xticks(range(len(runs)), [f"seed {r['seed']}" for r in runs])
    axes.set(ylabel="colorfulness", ylim=(0, 1))
    axes.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
