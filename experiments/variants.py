"""The three published forms on the same budget: python -m experiments.variants --workdir DIR

The paper's network, the authors' code and Caffe's replica, each with its own layers, optimizer and augmentation, on the
same images, batches, epochs, learning rate and initial scale of the activations.
"""

import sys
from pathlib import Path
from typing import Any

from alexnet_jax import VARIANTS
from alexnet_jax.configs.imagenet2012 import TRAINING
from experiments import study
from experiments.study import Budget, Claim, Finding, Study

CLAIMS = (
    Claim("source2012", "The authors' code reaches what the paper describes", "40.7 % top-1 (both)"),
    Claim("caffe", "Caffe's replica reaches what the paper describes", "42.9 % top-1 on one patch"),
)
# The optimizer's and the augmentation's fields, which each variant sets on its own; the schedule is common.
FIELDS = ("bias_rate", "bias_decay", "crop_group", "crop_last_position", "lighting", "lighting_exponent",
          "lighting_divisor")  # fmt: skip
BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(15_000, 8)}


def run(of: Study) -> dict[str, Any]:
    """The runs of every variant."""
    records = {}
    for name, variant in VARIANTS.items():
        scale = of.config().input_scale
        training = {field: value for field, value in TRAINING[name].items() if field in FIELDS}
        config = of.config(variant=name, lrn_alpha=variant.lrn[2] / scale**2, **{"lighting": False} | training)
        arm = "the-whole-network" if name == "paper" else name
        records[name] = [of.train(arm, config, seed) for seed in of.seeds]
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """The test errors on the central patch, against the paper's form."""
    paper, findings = study.percent(records["paper"]), {}
    for claim in CLAIMS:
        ours = study.percent(records[claim.key])
        found = study.compare(ours, paper)
        verdict = {"holds": "no: worse", "the reverse": "no: better"}.get(found.verdict(+1), "within the noise")
        text = f"{study.spread(ours)} %, the paper's form {study.spread(paper)} %: {found}"
        findings[claim.key] = Finding(text, verdict)
    return findings


def plot(records: dict[str, Any], path: Path) -> None:
    """Validation error against epochs, a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, color in zip(VARIANTS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        for i, record in enumerate(records[name]):
            epochs, errors = range(1, len(record["validation"]) + 1), record["validation"]
            axes.plot(epochs, [100 * e for e in errors], color=color, linewidth=1, label=None if i else name)
    axes.set(xlabel="epochs", ylabel="validation error (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
