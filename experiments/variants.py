"""The three published variants on the same budget: python -m experiments.variants --workdir DIR

The paper's network, the original code and Caffe's replica, each with its own layers, optimizer and augmentation, on the
same images, batches, epochs, learning rate and initial scale of the activations.
"""

import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alexnet_jax import VARIANTS
from alexnet_jax.configs.imagenet2012 import TRAINING
from experiments import ablations
from experiments.ablations import FULL, arm
from experiments.claims import Claim, Finding
from experiments.command import save_figure
from experiments.comparison import contrast, percent, spread
from experiments.study import Study, main
from experiments.style import BLUE, GREEN, ORANGE, WIDTH, plot_runs, styled

BUDGETS, SEEDS = ablations.BUDGETS, 10
CLAIMS = (
    Claim("source2012", "The original code has the error of the paper's network: within 1 point",
          "not in the paper", 1.0, equal=True),
    Claim("caffe", "Caffe's replica has the error of the paper's network: within 1 point",
          "not in the paper", 1.0, equal=True),
)  # fmt: skip
COLORS = {"paper": BLUE, "source2012": ORANGE, "caffe": GREEN}  # the variants of the network of 2012
LABELS = {"paper": "the paper", "source2012": "the original code", "caffe": "Caffe's replica"}
CAPTION = "Means over the seeds, with bands from the lowest to the highest run."
# The fields of optimizer and augmentation that each variant sets; the schedule is the same for all.
FIELDS = ("bias_rate", "bias_decay", "crop_group", "crop_last_position", "lighting", "lighting_exponent",
          "lighting_divisor")  # fmt: skip


def run(study: Study) -> dict[str, Any]:
    """Train every variant."""
    records = {}
    for name in COLORS:
        scale = study.config().input_scale
        training = {field: value for field, value in TRAINING[name].items() if field in FIELDS}
        alpha = VARIANTS[name].lrn[2] / scale**2
        config = study.config(variant=name, lrn_alpha=alpha, **{"lighting": False} | training)
        records[name] = [study.train(arm(FULL if name == "paper" else name), config, seed) for seed in study.seeds]
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare the test errors on the center crop, in percent, with those of the paper's variant."""
    errors = {name: percent(runs) for name, runs in records.items()}
    return {
        claim.key: Finding(
            f"{spread(errors[claim.key])} %, the paper's variant {spread(errors['paper'])} %",
            contrast(errors, {claim.key: 1.0, "paper": -1.0}),
        )
        for claim in CLAIMS
    }


@styled
def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the validation error by epoch: means over the seeds, with bands from the lowest to the highest."""
    figure = Figure(figsize=(0.7 * WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, color in COLORS.items():
        errors = [[100 * error for error in record["validation"]] for record in records[name]]
        plot_runs(axes, list(range(1, len(errors[0]) + 1)), errors, color=color, label=LABELS[name])
    axes.set(xlabel="epochs", ylabel="validation error (%)")
    axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
