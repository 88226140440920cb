"""What each part of the network is good for: python -m experiments.ablations --workdir DIR [--only PART,…]

The compact AlexNet on CIFAR-10 with one field of its config changed at a time, on the same images, epochs and seeds.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alexnet_jax.run import Run
from experiments import study
from experiments.study import Budget, Claim, Finding, Study

BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(15_000, 8)}

OVERFITS = "“substantial overfitting” without"
WHOLE = "the whole network"
HALF = (16, 32, 48, 48, 96, 512, 512)  # half the kernels, but not of conv5, as in the paper's footnote
FOUR = dict(towers=1, widths=(32, 32, 64, 0, 0, 0, 0), stem=(5, 1, 2))  # three convolutions and fc8

# What each form of the network changes in the common recipe.
FORMS = {
    WHOLE: {},
    "no normalization": dict(lrn=False),
    "four layers": FOUR,
    "four layers, no normalization": dict(FOUR, lrn=False),
    "z = s = 2": dict(pool_window=2),
    "no dropout": dict(dropout=0.0),
    "no augmentation": dict(random_crop=False, flip=False, lighting=False),
    "crops and flips": dict(lighting=False),
    "one tower, half the kernels": dict(towers=1, widths=HALF),
    "one tower, all kernels": dict(towers=1),
}


class Ablation(NamedTuple):
    """Two forms of the network, of which the paper says that the first has the lower test error."""

    claim: Claim
    better: str
    worse: str


ABLATIONS = {
    "normalization": (
        Ablation(Claim("lrn_four_layers", "Normalization lowers the error of a four-layer network (3.3)",
                       "13 → 11 % on CIFAR-10"), "four layers", "four layers, no normalization"),
        Ablation(Claim("lrn", "Normalization lowers the error (3.3)", "−1.4 points"), WHOLE, "no normalization"),
    ),
    "pooling": (
        Ablation(Claim("pooling", "Overlapping pooling (z = 3, s = 2) against z = s = 2 (3.4)", "−0.4 points"),
                 WHOLE, "z = s = 2"),
    ),
    "dropout": (
        Ablation(Claim("dropout", "Dropout lowers the test error (4.2)", OVERFITS), WHOLE, "no dropout"),
    ),
    "augmentation": (
        Ablation(Claim("augmentation", "Crops and flips lower the test error (4.1)", OVERFITS),
                 "crops and flips", "no augmentation"),
        Ablation(Claim("lighting", "PCA lighting on top of them (4.1)", "over −1 point"), WHOLE, "crops and flips"),
    ),
    "towers": (
        Ablation(Claim("towers", "Two towers against one with half the kernels (3.2)", "−1.7 points"),
                 WHOLE, "one tower, half the kernels"),
        Ablation(Claim("groups", "Two towers against one with all kernels and no groups", "not in the paper"),
                 WHOLE, "one tower, all kernels"),
    ),
    "ten_crop": (),
}  # fmt: skip
PARTS = tuple(ABLATIONS)
OVERFITTING = {
    "dropout": Claim("dropout_overfitting", "Dropout narrows the gap from training to test error (4.2)", OVERFITS),
    "augmentation": Claim("augmentation_overfitting", "Crops and flips narrow that gap (4.1)", OVERFITS),
}
SLOWER = Claim("dropout_slower", "Dropout takes more epochs to the same validation error (4.2)", "about twice")
TEN_CROP = Claim("ten_crop", "Ten patches against the central one (4.1)", "−1.5 points (39.0 → 37.5 %)")
CURVES = ((WHOLE, "no dropout"), ("crops and flips", "no augmentation"))  # that are drawn
CLAIMS = (*(a.claim for part in ABLATIONS.values() for a in part), *OVERFITTING.values(), SLOWER, TEN_CROP)


def run(of: Study, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """The runs of every form that the parts need, each with its error on the images that it was trained on."""
    pairs = [(a.better, a.worse) for part in parts for a in ABLATIONS[part]] or [(WHOLE,)]
    records = {"parts": list(parts)}
    for form in dict.fromkeys(form for pair in pairs for form in pair):
        records[form] = []
        for seed in of.seeds:
            arm = form.replace(" = ", "=").replace(",", "").replace(" ", "-")
            record = of.train(arm, of.config(**FORMS[form]), seed)
            of.measure(record, "train_top1_error", _on_training_images)
            if "ten_crop" in parts and form != "no augmentation":  # which has never seen a corner cut out
                of.measure(record, "ten_crop_top1_error", _on_ten_patches)
            records[form].append(record)
    return records


def _on_training_images(run: Run) -> float:
    return run.error(run.load(run.config.train_split))


def _on_ten_patches(run: Run) -> float:
    return run.error(run.load(run.config.test_split), ten_crop=True)


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """The test errors with the central patch, in per cent; the noise is Welch's interval."""
    findings = {}
    for part in records["parts"]:
        for claim, better, worse in ABLATIONS[part]:
            findings[claim.key] = _difference(study.percent(records[better]), study.percent(records[worse]), "%")
        if part in OVERFITTING:
            gaps = [[_gap(r) for r in records[form]] for form in ABLATIONS[part][0][1:]]
            findings[OVERFITTING[part].key] = _difference(*gaps, "points")
        if part == "dropout":
            both = records["no dropout"], records[WHOLE]
            level = max(min(r["validation"]) for form in both for r in form)  # every run comes down to it
            epochs = ([1.0 + next(i for i, e in enumerate(r["validation"]) if e <= level) for r in f] for f in both)
            findings[SLOWER.key] = _difference(*epochs, f"epochs to {100 * level:.1f} %", "without")
    if "ten_crop" in records["parts"]:
        runs = [r for form in FORMS for r in records.get(form, ()) if "ten_crop_top1_error" in r]
        ten, one = study.percent(runs, "ten_crop_top1_error"), study.percent(runs)
        paired = study.compare_paired(ten, one)
        text = f"{study.spread(one)} → {study.spread(ten)} %: {paired}, of the same {len(runs)} networks of all forms"
        findings[TEN_CROP.key] = Finding(text, paired.verdict(-1))
    return findings


def _difference(better: list[float], worse: list[float], unit: str, which: str = "with") -> Finding:
    other = {"with": "without", "without": "with"}[which]
    found = study.compare(better, worse)
    text = f"{study.spread(better)} {which}, {study.spread(worse)} {other} ({unit}): {found}"
    return Finding(text, found.verdict(-1))


def _gap(record: dict[str, Any]) -> float:
    return 100 * (record["test_top1_error"] - record["train_top1_error"])


def plot(records: dict[str, Any], path: Path) -> None:
    """The test error of every form, a dot a seed; and for dropout and augmentation, with and without, the curves.

    The error in training is of the network with its dropout on what augmentation made; the dots at the end are of the
    same images without either, so that what lies between them and the validation error is overfitting.
    """
    from matplotlib.figure import Figure

    forms = [form for form in FORMS if form in records]
    pairs = [pair for pair in CURVES if set(pair) <= set(forms)]
    figure = Figure(figsize=(5.5 + 4.5 * len(pairs), max(4.0, 0.4 * len(forms))), layout="constrained")
    left, *right = figure.subplots(1, 1 + len(pairs), squeeze=False)[0]
    for place, form in enumerate(forms):
        errors = study.percent(records[form])
        left.plot(errors, [place] * len(errors), "o", color="tab:blue", alpha=0.6)
        left.plot(sum(errors) / len(errors), place, "|", color="black", markersize=14)
    left.set_yticks(range(len(forms)), forms)
    left.set(ylim=(len(forms) - 0.5, -0.5), xlabel="test error (%), central patch")
    left.grid(axis="x", alpha=0.3)
    for axes, pair in zip(right, pairs, strict=True):
        for form, color in zip(pair, ("tab:blue", "tab:orange"), strict=True):
            for i, record in enumerate(records[form]):
                epochs, errors = zip(*record["curve"], strict=True)
                axes.plot(epochs, [100 * e for e in errors], "--", color=color, linewidth=0.6)
                epochs = range(1, len(record["validation"]) + 1)
                axes.plot(epochs, [100 * e for e in record["validation"]], color=color, label=None if i else form)
                axes.plot(epochs[-1], 100 * record["train_top1_error"], "o", color=color, alpha=0.6)
        axes.set(xlabel="epochs", ylabel="error (%)", title="validation; dashed: in training; dots: training images")
        axes.title.set_fontsize(9)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
