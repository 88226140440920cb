"""Section 5's remarks on weight decay, biases and the learning rate: python -m experiments.remarks --workdir DIR"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from alexnet_jax.run import Run
from alexnet_jax.variants import VARIANTS
from experiments import ablations
from experiments.ablations import FULL, arm
from experiments.claims import Claim, Finding
from experiments.command import save_figure
from experiments.comparison import compare_paired, percent, spread
from experiments.study import Study, main
from experiments.style import BLUE, ORANGE, WIDTH, label_panels, plot_runs, styled

BUDGETS, SEEDS = ablations.BUDGETS, 10
CLAIMS = (
    Claim("weight_decay", "Weight decay lowers the training error (5)", "no figure", -1.0),
    Claim("biases", "Biases of 1 speed up the early learning: lower training error in the first epochs (5), here from "
          "larger initial kernels", "no figure", -1.0),
    Claim("drops", "Dividing the learning rate by 10 lowers the test error (5)", "no figure", -1.0),
)  # fmt: skip
CAPTION = (
    "Means over the seeds, with bands from the lowest to the highest run. For a and c the table has the errors "
    "after the last epoch on the center crop, of the training images and of the test images."
)
EARLY = 4  # epochs
NETWORKS = {
    FULL: {},
    "no weight decay": dict(weight_decay=0.0),
    "no drops": dict(drop_at_epochs=()),
    "biases of 1": {"bias": VARIANTS["paper"].bias},
    "biases of 0": {"bias": (0.0,) * 8},
}


def run(study: Study) -> dict[str, Any]:
    """Train every network, those of the biases for the first epochs alone."""
    records = {}
    for network, fields in NETWORKS.items():
        if network.startswith("biases"):
            epochs = min(EARLY, study.budget.epochs)
            fields = fields | {"num_epochs": float(epochs), "drop_at_epochs": ()}
            fields["log_every"] = max(1, study.budget.images // 64 // 8)  # eight points an epoch
        records[network] = [study.train(arm(network), study.config(**fields), seed) for seed in study.seeds]
    for record in (*records[FULL], *records["no weight decay"]):
        study.measure(record, "train_top1_error", _on_training_images)
    return records


def _on_training_images(run: Run) -> float:
    return run.error(run.load(run.config.train_split))


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare errors in percent: on the training images, in training over the first epochs, and on the test set."""
    train = [percent(records[network], "train_top1_error") for network in (FULL, "no weight decay")]
    early = [[100 * _mean_error(r) for r in records[network]] for network in ("biases of 1", "biases of 0")]
    test = [percent(records[network]) for network in (FULL, "no drops")]
    texts = ("% with, {} without", f"% of the first {EARLY} epochs with 1, {{}} with 0", "% with, {} without")
    return {
        claim.key: Finding(f"{spread(ours)} {text.format(spread(others))}", compare_paired(ours, others))
        for claim, (ours, others), text in zip(CLAIMS, (train, early, test), texts, strict=True)
    }


def _mean_error(record: dict[str, Any]) -> float:
    return float(np.mean([error for _, error in record["curve"]]))


@styled
def plot(records: dict[str, Any], path: Path) -> None:
    """Plot errors by epoch with and without weight decay, biases of 1 and learning-rate drops.

    The lines are means over the seeds, the bands reach from the lowest to the highest.
    """
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    panels = figure.subplots(1, 3)
    training, validation = "error in training (%)", "validation error (%)"
    for axes, title, label, pair in (
        (panels[0], "weight decay", training, (FULL, "no weight decay")),
        (panels[1], "initial biases", training, ("biases of 1", "biases of 0")),
        (panels[2], "learning rate", validation, (FULL, "no drops")),
    ):
        for network, color, style in zip(pair, (BLUE, ORANGE), ("-", "--"), strict=True):
            if label == training:
                epochs = [epoch for epoch, _ in records[network][0]["curve"]]
                errors = [[100 * error for _, error in record["curve"]] for record in records[network]]
            else:
                errors = [[100 * error for error in record["validation"]] for record in records[network]]
                epochs = list(range(1, len(errors[0]) + 1))
            plot_runs(axes, epochs, errors, color=color, linestyle=style, label=network)
        axes.set(title=title, xlabel="epochs", ylabel=label)
        axes.legend()
    label_panels(panels)
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
