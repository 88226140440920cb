"""Figure 4, similar images by their fc7 activations: python -m experiments.retrieval --workdir DIR

For each test image the six nearest training images by Euclidean distance, of the fc7 activations and, for comparison,
of the pixels (section 6.1); and how near in pixels the neighbors in fc7 are.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_jax import plots
from alexnet_jax.run import nearest, precision
from alexnet_jax.runtime.files import replaced
from experiments import ablations
from experiments.ablations import FULL, arm
from experiments.claims import Claim, Finding
from experiments.comparison import compare_paired, percent, spread
from experiments.study import Study, main

NEAR = 5.0  # percent of the training images; fixed before the measurement
CLAIMS = (
    Claim("retrieval", "Neighbors in fc7 show the same objects more often than neighbors in pixels (figure 4, 6.1)",
          "shown on five images", 10.0),
    Claim("distant_pixels", "Neighbors in fc7 are not close in pixels: not among the nearest twentieth (6.1)",
          "“generally not close in L2”", 5.0),
)  # fmt: skip
BUDGETS = ablations.BUDGETS
SEEDS = 10
CAPTION = (
    "Five test images with the run of seed 0: their five most likely classes (red: the label), and the nearest "
    "training images in fc7 and in pixels (orange: another label)."
)
COUNT, QUERIES = 6, 1000
SHOWN, SHOWN_PIXELS = 5, 3  # in the picture: test images, and neighbors in pixels of each


def percentiles(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return the percentile of each key's distance from a query among those of all keys, [Q, N].

    It is 0 for the nearest key and 100 for the farthest; the mean of random keys is 50.

    Args:
      queries, keys: images [Q, …] and [N, …].
    """
    q, k = (x.reshape(len(x), -1).astype(np.float32) for x in (queries, keys))
    squared = np.sum(k**2, axis=1) - 2 * q @ k.T  # without |q|², which does not change the order
    return squared.argsort(axis=1).argsort(axis=1) * (100 / (len(k) - 1))


def run(study: Study) -> dict[str, Any]:
    """Measure the labels and the pixel distances of the six nearest, of up to 1,000 test images."""
    picture = study.results / "neighbors.png"
    records = {"runs": [], "picture": str(picture)}
    for seed in study.seeds:
        record = study.train(arm(FULL), study.config(), seed)
        trained = study.open(record)
        if seed == 0:  # the data and the pixel distances are the same for all
            train = trained.load(trained.config.train_split)
            test = trained.load(f"test[:{min(QUERIES, study.budget.test)}]")
            by_pixels = nearest(test.images, train.images, COUNT)
            in_pixels = percentiles(test.images, train.images)
        neighbors = nearest(trained.activations(test.images), trained.activations(train.images), COUNT)
        records["runs"].append({
            **record,
            "precision_fc7": precision(test.labels, train.labels[neighbors]),
            "precision_pixels": precision(test.labels, train.labels[by_pixels]),
            "pixel_percentile": float(np.take_along_axis(in_pixels, neighbors, axis=1).mean()),
        })  # fmt: skip
        if seed == 0:
            plots.plot_retrieval(
                test, trained.predict(test.images[:SHOWN]), train, neighbors[:SHOWN], trained.names, picture,
                by_pixels[:SHOWN, :SHOWN_PIXELS],
            )  # fmt: skip
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare with the pixels, and the percentile with that of the nearest twentieth; neither has a spread."""
    runs = records["runs"]
    fc7, pixels = (percent(runs, f"precision_{space}") for space in ("fc7", "pixels"))
    labels = f"{spread(fc7)} % of the six nearest have the label in fc7, {pixels[0]:.1f} % in pixels (chance: 10)"
    percentile = [r["pixel_percentile"] for r in runs]
    distance = f"percentile {spread(percentile)} of the pixel distance (nearest: 0, random: 50), against {NEAR:g}"
    return {
        "retrieval": Finding(labels, compare_paired(fc7, pixels)),
        "distant_pixels": Finding(distance, compare_paired(percentile, [NEAR] * len(runs))),
    }


def plot(records: dict[str, Any], path: Path) -> None:
    """Copy figure 4 of the first seed."""
    with replaced(path) as temporary:
        shutil.copy(records["picture"], temporary)


if __name__ == "__main__":
    main(sys.modules[__name__])
