"""Figure 3, the first kernels of the two towers: python -m experiments.filters --workdir DIR

The colorfulness of a kernel is the share of its energy off the gray axis: 0 for a kernel with equal weights for red,
green and blue, 2/3 on average for a random one. The towers of a run have specialized if their means differ more than
by chance (a permutation test: the same kernels are assigned to two towers at random). That they do in every run is
decided by the largest p of the runs (an intersection-union test).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax import plots
from experiments import style
from experiments.claims import Claim, Finding, PValue
from experiments.command import save_figure
from experiments.study import Budget, Study, kernel_std, main

CLAIMS = (
    Claim("specialized", "The towers specialize in every run, one in color and one not (figure 3, 6.1)",
          "in every run", 1.0),
)  # fmt: skip
BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(45_000, 12, test=1000)}
SEEDS = 3
# Kernels of 11×11 as in the paper, on crops enlarged to 45×45. Stronger weight decay removes the initial noise.
FIELDS = dict(
    stem=(11, 2, 5), image_size=28, resize=45, widths=(48, 64, 96, 96, 96, 512, 512), weight_decay=0.003
)  # fmt: skip
CONV1_STD = 0.01  # a small random start, so that what is seen later was learned
RANDOM = 2 / 3  # the mean colorfulness of random kernels
CAPTION = (
    "Left: the kernels of one run. Right: the colorfulness of each kernel of every run; gray kernels have 0. p is "
    "the probability of such a difference of the two means if the kernels are assigned to towers at random."
)
COLORS = style.BLUE, style.ORANGE  # of the towers


def colorfulness(kernels: np.ndarray) -> np.ndarray:
    """Return the share of the energy off the gray axis, [N] in 0 to 1, of each kernel of [h, w, 3, N]."""
    energy = np.sum(np.square(kernels, dtype=np.float64), axis=(0, 1, 2))
    gray = 3 * np.sum(kernels.mean(axis=2, dtype=np.float64) ** 2, axis=(0, 1))
    return 1 - gray / np.maximum(energy, 1e-30)


def differences(values: np.ndarray) -> np.ndarray:
    """Return the mean of tower 1 minus that of tower 0, whose values are the first half of the last axis."""
    first, second = np.split(values, 2, axis=-1)
    return second.mean(axis=-1) - first.mean(axis=-1)


def by_chance(values: Sequence[float], permutations: int = 10_000) -> np.ndarray:
    """Return the differences of random assignments of the kernels to the towers, [permutations]."""
    return differences(np.random.default_rng(0).permuted(np.tile(values, (permutations, 1)), axis=1))


def specialization(values: Sequence[float]) -> tuple[float, float]:
    """Return the difference of the towers' means, and the probability p of such a difference by chance.

    Args:
      values: of each kernel, those of tower 0 first.
    """
    difference, random = differences(np.asarray(values)), by_chance(values)
    return float(difference), float((1 + np.sum(np.abs(random) >= abs(difference) - 1e-12)) / (1 + len(random)))


def detectable(values: Sequence[float]) -> float:
    """Return the smallest difference whose p is below 0.05."""
    return float(np.quantile(np.abs(by_chance(values)), 0.95))


def run(study: Study) -> dict[str, Any]:
    """Train, and measure the first kernels of every run."""
    config = study.config(**FIELDS)
    config.kernel_std = (CONV1_STD, *kernel_std(config)[1:])
    records = {"runs": []}
    for seed in study.seeds:
        record = study.train("eleven-by-eleven", config.copy_and_resolve_references(), seed)
        kernels = np.asarray(study.open(record).params["conv1"]["kernel"])
        plots.plot_filters(kernels, study.results / f"filters-seed{seed}.png")
        values = colorfulness(kernels)
        difference, chance = specialization(values)
        records["runs"].append({
            **record, "colorfulness": values.tolist(), "difference": difference, "chance": chance,
            "kernels": np.round(kernels, 5).tolist() if seed == 0 else None,
        })  # fmt: skip
    return records


def towers(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the colorfulness of the kernels of each tower."""
    first, second = np.split(np.asarray(record["colorfulness"]), 2)
    return first, second


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Judge by the largest p of the runs."""
    runs = records["runs"]
    means = "; ".join("{:.2f} and {:.2f}".format(*(x.mean() for x in towers(r))) for r in runs)
    chances = ", ".join(f"{r['chance']:.2g}" for r in runs)
    smallest = max(detectable(r["colorfulness"]) for r in runs)
    text = (
        f"colorfulness of the two towers {means} (random: {RANDOM:.2f}); by chance: p = {chances}; p is below 0.05 for "
        f"differences above {smallest:.2f}"
    )
    return {"specialized": Finding(text, PValue(max(r["chance"] for r in runs), len(runs)))}


@style.styled
def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the first run's kernels, and the colorfulness of every run's kernels, the towers in two colors."""
    runs = records["runs"]
    kernels = np.split(np.asarray(runs[0]["kernels"]), 2, axis=-1)
    count = kernels[0].shape[-1]
    columns = next((n for n in (8, 7, 6, 5) if count % n == 0), min(8, count))  # full rows, if there are such
    figure = Figure(figsize=(style.WIDTH, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.45, 1])
    pictures = left.subplots(2, 1)
    for tower, axes in enumerate(pictures):
        axes.imshow(plots.tile(kernels[tower], columns), interpolation="nearest")
        axes.set_title(f"conv1, tower {tower} (seed {runs[0]['seed']})", color=COLORS[tower])
        axes.axis("off")
    axes = right.subplots()
    axes.axhline(RANDOM, color=style.GRAY, linestyle="--", linewidth=1, label="random kernels")
    random = np.random.default_rng(0)
    for column, record in enumerate(runs):
        for tower, values in enumerate(towers(record)):
            x = column + 0.36 * (tower - 0.5)
            spread = x + random.uniform(-0.09, 0.09, len(values))
            label = None if column else f"tower {tower}"
            axes.plot(
                spread, values, "o", color=COLORS[tower], alpha=0.5, markersize=3.5, markeredgewidth=0, label=label
            )
            axes.plot(
                x, values.mean(), "_", color="black", markersize=14, label=None if column or not tower else "mean"
            )
    axes.set_xticks(range(len(runs)), [f"seed {r['seed']}\np = {r['chance']:.2g}" for r in runs])
    axes.set(ylabel="colorfulness of a kernel", ylim=(0, 1), xlim=(-0.5, len(runs) - 0.5))
    axes.grid(axis="x", visible=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=4)
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
