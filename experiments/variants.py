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
from experiments.command import save_figure
from experiments.comparison import compare, percent, spread
from experiments.study import Budget, Claim, Finding, Study, main

CLAIMS = (
    Claim("source2012", "The original code reaches the error of the paper's network", "40.7 % top-1 (both)"),
    Claim("caffe", "Caffe's replica reaches the error of the paper's network", "42.9 % top-1 on one crop"),
)
COLORS = {"paper": "tab:blue", "source2012": "tab:orange", "caffe": "tab:green"}  # the variants of the 2012 network
# The fields of optimizer and augmentation that each variant sets; the schedule is the same for all.
FIELDS = ("bias_rate", "bias_decay", "crop_group", "crop_last_position", "lighting", "lighting_exponent",
          "lighting_divisor")  # fmt: skip
BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(15_000, 8)}


def run(study: Study) -> dict[str, Any]:
    """Train every variant."""
    records = {}
    for name in COLORS:
        scale = study.config().input_scale
        training = {field: value for field, value in TRAINING[name].items() if field in FIELDS}
        alpha = VARIANTS[name].lrn[2] / scale**2
        config = study.config(variant=name, lrn_alpha=alpha, **{"lighting": False} | training)
        arm = "the-whole-network" if name == "paper" else name
        records[name] = [study.train(arm, config, seed) for seed in study.seeds]
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare the test errors on the center crop with those of the paper's variant."""
    paper, findings = percent(records["paper"]), {}
    for claim in CLAIMS:
        ours = percent(records[claim.key])
        comparison = compare(ours, paper)
        verdict = {"holds": "no: worse", "contradicted": "no: better"}.get(comparison.verdict(+1), "within the noise")
        text = f"{spread(ours)} %, the paper's variant {spread(paper)} %: {comparison}"
        findings[claim.key] = Finding(text, verdict)
    return findings


def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the validation error by epoch, a line for each seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, color in COLORS.items():
        for i, record in enumerate(records[name]):
            epochs, errors = range(1, len(record["validation"]) + 1), record["validation"]
            axes.plot(epochs, [100 * e for e in errors], color=color, linewidth=1, label=None if i else name)
    axes.set(xlabel="epochs", ylabel="validation error (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
