"""Ablations, the network without each of its parts: python -m experiments.ablations --workdir DIR [--only PART,…]

The compact AlexNet on CIFAR-10 with one part changed at a time, on the same images, epochs and seeds.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alexnet_jax.run import Run
from experiments.claims import Claim, Finding, plot_differences
from experiments.comparison import compare_paired, contrast, percent, spread
from experiments.study import Budget, Study, main

BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(10_000, 15)}
SEEDS = 10

FULL = "the whole network"
ONE_GPU = (16, 32, 48, 48, 96, 1024, 1024)  # conv1 to conv4 halved: footnote 2 of the paper
AVERAGED = 5  # networks

# The fields of the common config that each network changes.
NETWORKS = {
    FULL: {},
    "no LRN": dict(lrn=False),
    "z = s = 2": dict(pool_window=2),
    "no PCA lighting": dict(lighting=False),
    "one GPU": dict(towers=1, widths=ONE_GPU),
    "one tower": dict(towers=1),
}


class Ablation(NamedTuple):
    """A claim about the whole network against another."""

    claim: Claim
    other: str


ABLATIONS = {
    "lrn": (Ablation(Claim("lrn", "LRN lowers the error (3.3)", "−1.4 points", -1.4), "no LRN"),),
    "pooling": (
        Ablation(Claim("pooling", "Overlapping pooling (z = 3, s = 2) lowers the error against z = s = 2 (3.4)",
                       "−0.4 points", -0.4), "z = s = 2"),
    ),
    "lighting": (
        Ablation(Claim("lighting", "PCA lighting lowers the error, in addition to crops and flips (4.1)",
                       "over −1 point", -1.0), "no PCA lighting"),
    ),
    "towers": (
        Ablation(Claim("towers", "Two towers have a lower error than the one-GPU network, with conv1 to conv4 halved "
                       "(3.2, footnote 2)", "−1.7 points", -1.7), "one GPU"),
        Ablation(Claim("groups", "Two towers have the error of one tower of the same width, without groups: within 1 "
                       "point", "not in the paper", 1.0, equal=True), "one tower"),
    ),
    "averages": (),
}  # fmt: skip
CAPTION = (
    "Test error with the part minus without it, negative if the part helps, with intervals of 95 %. Diamonds: the "
    "paper's figures. Gray: differences that count as equal."
)
PARTS = tuple(ABLATIONS)
TEN_CROP = Claim(
    "ten_crop", "Ten-crop lowers the error against the center crop (4.1)", "−1.5 points (39.0 → 37.5 %)", -1.5
)
FIVE = Claim(
    "five_networks", "Averaging five networks lowers the error (6, table 2)", "−2.6 points (40.7 → 38.1 %)", -2.6
)
CLAIMS = (*(a.claim for part in ABLATIONS.values() for a in part), TEN_CROP, FIVE)

LABELS = {
    "lrn": "LRN",
    "pooling": "overlapping pooling",
    "lighting": "PCA lighting",
    "towers": "two towers, against one GPU",
    "groups": "two towers, against one tower",
    "ten_crop": "ten-crop, against the center crop",
    "five_networks": "five networks, against one",
}


def run(study: Study, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Return the runs of every network that the parts need."""
    others = [a.other for part in parts for a in ABLATIONS[part]]
    networks = list(NETWORKS) if "averages" in parts else [FULL, *others]
    records = {"parts": list(parts), "networks": {}, "averaged": {}}
    for network in networks:
        records["networks"][network] = [
            study.train(arm(network), study.config(**NETWORKS[network]), seed) for seed in study.seeds
        ]
    if "averages" in parts:
        for record in records["networks"][FULL]:
            study.measure(record, "ten_crop_top1_error", _on_ten_crops)
        for network, runs in records["networks"].items():
            records["averaged"][network] = _averaged_errors(study, runs)
    return records


def arm(network: str) -> str:
    """Return the name of a network's folder."""
    return network.replace(" = ", "=").replace(" ", "-")


def _on_ten_crops(run: Run) -> float:
    return run.error(run.load(run.config.test_split), ten_crop=True)


def _averaged_errors(study: Study, runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the error of the mean prediction of five networks and of one network: means over disjoint groups."""
    run = study.open(runs[0])
    labels = run.load(run.config.test_split).labels
    groups = [runs[i : i + AVERAGED] for i in range(0, len(runs), AVERAGED)]
    groups = [group for group in groups if len(group) == AVERAGED] or groups
    errors = []
    for group in groups:
        probabilities = np.stack([study.test_probabilities(record) for record in group])
        wrong = [float(np.mean(p.argmax(axis=-1) != labels)) for p in (probabilities.mean(axis=0), *probabilities)]
        errors.append((wrong[0], float(np.mean(wrong[1:]))))
    averaged, one = np.mean(errors, axis=0)
    return {"averaged": float(averaged), "one": float(one)}


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare the test errors on the center crop, in percent; the noise is estimated from all networks."""
    findings, networks = {}, {name: percent(runs) for name, runs in records["networks"].items()}
    for part in records["parts"]:
        for claim, other in ABLATIONS[part]:
            text = f"{spread(networks[FULL])} against {spread(networks[other])} %"
            findings[claim.key] = Finding(text, contrast(networks, {FULL: 1.0, other: -1.0}))
    if "averages" in records["parts"]:
        ten, one = (percent(records["networks"][FULL], key) for key in ("ten_crop_top1_error", "test_top1_error"))
        findings[TEN_CROP.key] = Finding(f"{spread(one)} → {spread(ten)} %", compare_paired(ten, one))
        averaged, one = (percent(list(records["averaged"].values()), key) for key in ("averaged", "one"))
        text = (
            f"{np.mean(one):.1f} → {np.mean(averaged):.1f} %, over {len(one)} networks with {len(networks[FULL])} seeds"
        )
        findings[FIVE.key] = Finding(text, compare_paired(averaged, one))
    return findings


def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the difference of each claim with its interval and the paper's, the largest effect on top."""
    findings = judge(records)
    plot_differences([(claim, findings[claim.key]) for claim in CLAIMS if claim.key in findings], LABELS, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
