"""Ablations, the network without each of its parts: python -m experiments.ablations --workdir DIR [--only PART,…]

The compact AlexNet on CIFAR-10 with one part changed at a time, on the same images, epochs and seeds.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from alexnet_jax.run import Run
from experiments.command import save_figure
from experiments.comparison import compare, compare_paired, percent, spread
from experiments.study import Budget, Claim, Finding, Study, main

BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(15_000, 8)}

OVERFITS = "“substantial overfitting” without"
FULL = "the whole network"
HALF = (16, 32, 48, 48, 96, 512, 512)  # half the kernels, but not of conv5, as in the paper's footnote
FOUR = dict(towers=1, widths=(32, 32, 64, 0, 0, 0, 0), stem=(5, 1, 2))  # three convolutions and fc8

# The fields of the common config that each network changes.
NETWORKS = {
    FULL: {},
    "no LRN": dict(lrn=False),
    "four layers": FOUR,
    "four layers, no LRN": dict(FOUR, lrn=False),
    "z = s = 2": dict(pool_window=2),
    "no dropout": dict(dropout=0.0),
    "no augmentation": dict(random_crop=False, flip=False, lighting=False),
    "crops and flips": dict(lighting=False),
    "one tower, half the kernels": dict(towers=1, widths=HALF),
    "one tower, all kernels": dict(towers=1),
}


class Ablation(NamedTuple):
    """Two networks, of which the first has the lower test error according to the paper."""

    claim: Claim
    better: str
    worse: str


ABLATIONS = {
    "lrn": (
        Ablation(Claim("lrn_four_layers", "LRN lowers the error of a four-layer network (3.3)",
                       "13 → 11 % on CIFAR-10"), "four layers", "four layers, no LRN"),
        Ablation(Claim("lrn", "LRN lowers the error (3.3)", "−1.4 points"), FULL, "no LRN"),
    ),
    "pooling": (
        Ablation(Claim("pooling", "Overlapping pooling (z = 3, s = 2) against z = s = 2 (3.4)", "−0.4 points"),
                 FULL, "z = s = 2"),
    ),
    "dropout": (
        Ablation(Claim("dropout", "Dropout lowers the test error (4.2)", OVERFITS), FULL, "no dropout"),
    ),
    "augmentation": (
        Ablation(Claim("augmentation", "Crops and flips lower the test error (4.1)", OVERFITS),
                 "crops and flips", "no augmentation"),
        Ablation(Claim("lighting", "PCA lighting in addition (4.1)", "over −1 point"), FULL, "crops and flips"),
    ),
    "towers": (
        Ablation(Claim("towers", "Two towers against one with half the kernels (3.2)", "−1.7 points"),
                 FULL, "one tower, half the kernels"),
        Ablation(Claim("groups", "Two towers against one with all kernels and no groups", "not in the paper"),
                 FULL, "one tower, all kernels"),
    ),
    "ten_crop": (),
}  # fmt: skip
PARTS = tuple(ABLATIONS)
OVERFITTING = {
    "dropout": Claim("dropout_overfitting", "Dropout reduces the gap between training and test error (4.2)", OVERFITS),
    "augmentation": Claim("augmentation_overfitting", "Crops and flips reduce that gap (4.1)", OVERFITS),
}
SLOWER = Claim("dropout_slower", "Dropout needs more epochs to the same validation error (4.2)", "about twice")
TEN_CROP = Claim("ten_crop", "Ten-crop against the center crop (4.1)", "−1.5 points (39.0 → 37.5 %)")
CURVES = ((FULL, "no dropout"), ("crops and flips", "no augmentation"))  # in the plot
CLAIMS = (*(a.claim for part in ABLATIONS.values() for a in part), *OVERFITTING.values(), SLOWER, TEN_CROP)


def run(study: Study, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Return the runs of every network that the parts need, each with its error on its training images."""
    pairs = [(a.better, a.worse) for part in parts for a in ABLATIONS[part]] or [(FULL,)]
    records = {"parts": list(parts)}
    for network in dict.fromkeys(network for pair in pairs for network in pair):
        records[network] = []
        for seed in study.seeds:
            arm = network.replace(" = ", "=").replace(",", "").replace(" ", "-")
            record = study.train(arm, study.config(**NETWORKS[network]), seed)
            study.measure(record, "train_top1_error", _on_training_images)
            if "ten_crop" in parts and network != "no augmentation":  # which was trained without random crops
                study.measure(record, "ten_crop_top1_error", _on_ten_crops)
            records[network].append(record)
    return records


def _on_training_images(run: Run) -> float:
    return run.error(run.load(run.config.train_split))


def _on_ten_crops(run: Run) -> float:
    return run.error(run.load(run.config.test_split), ten_crop=True)


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare the test errors on the center crop, in percent; the noise is half of Welch's interval."""
    findings = {}
    for part in records["parts"]:
        for claim, better, worse in ABLATIONS[part]:
            findings[claim.key] = _difference(percent(records[better]), percent(records[worse]), "%")
        if part in OVERFITTING:
            gaps = [[_gap(r) for r in records[network]] for network in ABLATIONS[part][0][1:]]
            findings[OVERFITTING[part].key] = _difference(*gaps, "points")
        if part == "dropout":
            both = records["no dropout"], records[FULL]
            level = max(min(r["validation"]) for runs in both for r in runs)  # the lowest that every run reaches
            epochs = ([1.0 + next(i for i, e in enumerate(r["validation"]) if e <= level) for r in f] for f in both)
            findings[SLOWER.key] = _difference(*epochs, f"epochs to {100 * level:.1f} %", "without")
    if "ten_crop" in records["parts"]:
        runs = [r for network in NETWORKS for r in records.get(network, ()) if "ten_crop_top1_error" in r]
        ten, one = percent(runs, "ten_crop_top1_error"), percent(runs)
        paired = compare_paired(ten, one)
        text = f"{spread(one)} → {spread(ten)} %: {paired}, of the same {len(runs)} trained networks"
        findings[TEN_CROP.key] = Finding(text, paired.verdict(-1))
    return findings


def _difference(better: list[float], worse: list[float], unit: str, which: str = "with") -> Finding:
    other = {"with": "without", "without": "with"}[which]
    comparison = compare(better, worse)
    text = f"{spread(better)} {which}, {spread(worse)} {other} ({unit}): {comparison}"
    return Finding(text, comparison.verdict(-1))


def _gap(record: dict[str, Any]) -> float:
    return 100 * (record["test_top1_error"] - record["train_top1_error"])


def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the test error of every network, a dot for each seed, and curves with and without dropout and augmentation.

    The error in training is measured with dropout, on augmented images; the dots at the end are the error on the same
    images without either. The difference between the dots and the validation error is overfitting.
    """
    networks = [network for network in NETWORKS if network in records]
    pairs = [pair for pair in CURVES if set(pair) <= set(networks)]
    figure = Figure(figsize=(5.5 + 4.5 * len(pairs), max(4.0, 0.4 * len(networks))), layout="constrained")
    left, *right = figure.subplots(1, 1 + len(pairs), squeeze=False)[0]
    for row, network in enumerate(networks):
        errors = percent(records[network])
        left.plot(errors, [row] * len(errors), "o", color="tab:blue", alpha=0.6)
        left.plot(sum(errors) / len(errors), row, "|", color="black", markersize=14)
    left.set_yticks(range(len(networks)), networks)
    left.set(ylim=(len(networks) - 0.5, -0.5), xlabel="test error (%), center crop")
    left.grid(axis="x", alpha=0.3)
    for axes, pair in zip(right, pairs, strict=True):
        for network, color in zip(pair, ("tab:blue", "tab:orange"), strict=True):
            for i, record in enumerate(records[network]):
                epochs, errors = zip(*record["curve"], strict=True)
                axes.plot(epochs, [100 * e for e in errors], "--", color=color, linewidth=0.6)
                epochs = range(1, len(record["validation"]) + 1)
                axes.plot(epochs, [100 * e for e in record["validation"]], color=color, label=None if i else network)
                axes.plot(epochs[-1], 100 * record["train_top1_error"], "o", color=color, alpha=0.6)
        axes.set(xlabel="epochs", ylabel="error (%)", title="validation; dashed: in training; dots: training images")
        axes.title.set_fontsize(9)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
