"""Overfitting, dropout × augmentation × overlapping pooling: python -m experiments.overfitting --workdir DIR

The compact AlexNet on 5,000 images of CIFAR-10, with and without each of the three, in all eight combinations. An
effect is the mean difference over the four combinations of the other two. Next to it is the one within the combination
of all three, the paper's: they differ if the factors interact.
"""

import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.run import Run
from experiments.claims import Claim, Finding
from experiments.command import save_figure
from experiments.comparison import Comparison, contrast, percent, spread
from experiments.study import Budget, Study, main
from experiments.style import BLUE, GRAY, ORANGE, WIDTH, label_panels, plot_runs, styled

OVERFITS = "“substantial overfitting” without"
CLAIMS = (
    Claim("dropout_gap", "Dropout reduces the gap between training and test error (4.2)", OVERFITS, -1.0),
    Claim("dropout_error", "Dropout lowers the test error (4.2)", OVERFITS, -1.0),
    Claim("augmentation_gap", "Crops, flips and PCA lighting reduce that gap (4.1)", OVERFITS, -1.0),
    Claim("augmentation_error", "Crops, flips and PCA lighting lower the test error (4.1)", OVERFITS, -1.0),
    Claim("pooling_gap", "Overlapping pooling (z = 3, s = 2) reduces that gap against z = s = 2 (3.4)",
          "“slightly more difficult to overfit”", -1.0),
)  # fmt: skip
# Half of the widths on a CPU: the forty runs at the full ones would take hours on two cores.
BUDGETS = {"full": Budget(5000, 100), "reduced": Budget(5000, 100, shrink=2)}
SEEDS = 5
CAPTION = (
    "a: errors of the eight networks by epoch, means over the seeds; the bands of the validation error reach from "
    "the lowest to the highest run. b, c: main effects with intervals of 95 %."
)
EVAL_EPOCHS = 5  # between two validations


class Form(NamedTuple):
    """A combination of the three factors."""

    dropout: bool
    augmentation: bool
    pooling: bool

    def __str__(self) -> str:
        return f"{_named('dropout', self.dropout)}, {_named('augmentation', self.augmentation)}, z = {self.window}"

    @property
    def window(self) -> int:
        """The side of the pooling window."""
        return 3 if self.pooling else 2

    @property
    def arm(self) -> str:
        """The name of its folder."""
        return str(self).replace(" = ", "=").replace(",", "").replace(" ", "-")


FORMS = tuple(itertools.starmap(Form, itertools.product((True, False), repeat=3)))


def _named(factor: str, present: bool) -> str:
    return factor if present else f"no {factor}"


def config_of(study: Study, form: Form, **fields) -> ml_collections.ConfigDict:
    """Return the config of a form, with other fields changed."""
    augmented = dict.fromkeys(("random_crop", "flip", "lighting"), form.augmentation)
    return study.config(dropout=0.5 * form.dropout, pool_window=form.window, **augmented, **fields)


def run(study: Study) -> dict[str, Any]:
    """Return the runs of every form, each with its error on its training images."""
    forms = {str(form): [] for form in FORMS}
    for seed in study.seeds:
        for form in FORMS:
            config = config_of(study, form)
            config.log_every = study.budget.images // config.batch_size  # an epoch
            config.eval_every = EVAL_EPOCHS * config.log_every
            record = study.train(form.arm, config, seed)
            study.measure(record, "train_top1_error", _on_training_images)
            forms[str(form)].append(record)
    return {"epochs": study.budget.epochs, "forms": forms}


def _on_training_images(run: Run) -> float:
    return run.error(run.load(run.config.train_split))


def errors(records: dict[str, Any]) -> dict[str, list[float]]:
    """Return the test error of each form on the center crop, in percent, by seed."""
    return {form: percent(runs) for form, runs in records["forms"].items()}


def gaps(records: dict[str, Any]) -> dict[str, list[float]]:
    """Return test minus training error of each form, both on the center crop without dropout, in points, by seed."""
    return {
        form: np.subtract(percent(runs), percent(runs, "train_top1_error")).tolist()
        for form, runs in records["forms"].items()
    }


def main_effect(values: dict[str, list[float]], factor: str) -> Comparison:
    """Return the mean of the four forms with a factor minus that of the four without."""
    return contrast(values, {str(form): 0.25 if getattr(form, factor) else -0.25 for form in FORMS})


def effect_in_the_whole(values: dict[str, list[float]], factor: str) -> Comparison:
    """Return the form with all three factors minus the one without one of them."""
    whole = Form(True, True, True)
    return contrast(values, {str(whole): 1.0, str(whole._replace(**{factor: False})): -1.0})


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Return the effect of each factor on the gap and on the test error."""
    findings = {}
    for claim in CLAIMS:
        factor, measure = claim.key.split("_")
        values = gaps(records) if measure == "gap" else errors(records)
        of_seeds = {
            present: np.mean([values[str(form)] for form in FORMS if getattr(form, factor) == present], axis=0)
            for present in (True, False)
        }
        unit = "points" if measure == "gap" else "%"
        text = (
            f"{spread(of_seeds[True])} with, {spread(of_seeds[False])} {unit} without, means over four networks "
            f"(in the network with the other two: {effect_in_the_whole(values, factor)})"
        )
        findings[claim.key] = Finding(text, main_effect(values, factor))
    return findings


@styled
def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the training and validation error of every form, means over the seeds, and below them the main effects.

    The dots are the error on the training images at the end, on the center crop without dropout; test minus this error
    is the gap. The intervals are those of 95 %.
    """
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    curves, effects = figure.subfigures(2, 1, height_ratios=(2.7, 1.7))
    panels = [*curves.subplots(1, 4, sharey=True), *effects.subplots(1, 2, sharey=True)]
    for axes, (dropout, augmentation) in zip(panels[:4], itertools.product((True, False), repeat=2), strict=True):
        for pooling, color in ((True, BLUE), (False, ORANGE)):
            form = Form(dropout, augmentation, pooling)
            runs, epochs = records["forms"][str(form)], records["epochs"]
            x, y = [epoch for epoch, _ in runs[0]["curve"]], [[100 * e for _, e in r["curve"]] for r in runs]
            axes.plot(x, np.mean(y, axis=0), "--", color=color, linewidth=1, label=f"training, z = {form.window}")
            y = [[100 * e for e in r["validation"]] for r in runs]
            x = [min(epochs, EVAL_EPOCHS * (i + 1)) for i in range(len(y[0]))]
            plot_runs(axes, x, y, color=color, label=f"validation, z = {form.window}")
            axes.plot(
                [epochs], np.mean(percent(runs, "train_top1_error")), "o", color=color, markersize=4, clip_on=False,
                label=f"training images at the end, z = {form.window}",
            )  # fmt: skip
        axes.set(title=f"{_named('dropout', dropout)},\n{_named('augmentation', augmentation)}", xlabel="epochs")
        axes.set(ylim=(0, None), xlim=(0, epochs), xticks=(0, epochs / 2, epochs))
    panels[0].set_ylabel("error (%)")
    curves.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    measures = {"test − training error": gaps(records), "test error": errors(records)}
    factors = {"dropout": "dropout", "augmentation": "augmentation", "pooling": "overlapping pooling"}
    for axes, (measure, values) in zip(panels[4:], measures.items(), strict=True):
        axes.axvline(0, color=GRAY, linewidth=0.8)
        for row, factor in enumerate(factors):
            effect = main_effect(values, factor)
            axes.errorbar(effect.difference, row, xerr=effect.noise, fmt="o", color=BLUE, markersize=5, capsize=3)
        axes.set(xlabel=f"effect on {measure} (points)", ylim=(2.5, -0.5))
        axes.grid(axis="y", visible=False)
    panels[4].set_yticks(range(3), factors.values())
    label_panels([panels[0], *panels[4:]])
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
