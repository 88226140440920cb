"""Depth, the network without one of its convolutional layers: python -m experiments.depth --workdir DIR

Section 7: without any of the middle layers the network loses about 2 points. A layer is omitted with its activation and
its LRN; the pooling after it remains, so that the other layers keep their sizes. conv1 is not omitted: the network
without it would be the one without conv2, with another first kernel.
"""

import sys
from pathlib import Path
from typing import Any

from experiments import ablations
from experiments.ablations import FULL, arm
from experiments.claims import Claim, Finding, plot_differences
from experiments.comparison import contrast, percent, spread
from experiments.study import Study, main

BUDGETS, SEEDS = ablations.BUDGETS, 5
CAPTION = (
    "Test error with the layer minus without it, negative if the layer helps, with intervals of 95 %. Diamonds: the "
    "paper's figure."
)
OMITTED = {"no conv2": 1, "no conv3": 2, "no conv4": 3, "no conv5": 4}  # positions in the config's widths
CLAIMS = tuple(
    Claim(name.replace(" ", "_"), f"{name.removeprefix('no ')} lowers the error (7)", "about −2 points", -2.0)
    for name in OMITTED
)


def run(study: Study) -> dict[str, Any]:
    """Return the runs of the whole network, which the ablations share, and of those without a layer."""
    widths = study.config().widths
    fields = {FULL: {}}
    for name, position in OMITTED.items():
        fields[name] = {"widths": (*widths[:position], 0, *widths[position + 1 :])}
    return {
        name: [study.train(arm(name), study.config(**changed), seed) for seed in study.seeds]
        for name, changed in fields.items()
    }


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare the test errors on the center crop, in percent; the noise is estimated from all networks."""
    errors, findings = {name: percent(runs) for name, runs in records.items()}, {}
    for claim, name in zip(CLAIMS, OMITTED, strict=True):
        text = f"{spread(errors[FULL])} against {spread(errors[name])} %"
        findings[claim.key] = Finding(text, contrast(errors, {FULL: 1.0, name: -1.0}))
    return findings


def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the difference that each layer makes, with its interval and the paper's."""
    findings = judge(records)
    labels = {claim.key: claim.text.split()[0] for claim in CLAIMS}
    plot_differences([(claim, findings[claim.key]) for claim in CLAIMS], labels, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
