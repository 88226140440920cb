"""Figure 4, similar images by their fc7 activations: python -m experiments.retrieval --workdir DIR

For each test image the six nearest training images by Euclidean distance, of the fc7 activations and, for comparison,
of the pixels (section 6.1).
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from alexnet_jax import plots
from alexnet_jax.run import nearest, precision
from alexnet_jax.runtime.files import replaced
from experiments.comparison import compare_paired, percent, spread
from experiments.study import Budget, Claim, Finding, Study, main

CLAIMS = (
    Claim("retrieval", "Neighbors in fc7 show the same objects, neighbors in pixels do not (figure 4, 6.1)",
          "shown on five images"),
)  # fmt: skip
BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(15_000, 8)}
COUNT, QUERIES, SHOWN = 6, 1000, 5
ARM = "the-whole-network"  # the same runs as in the ablations


def run(study: Study) -> dict[str, Any]:
    """Measure the share of the six nearest that have the query's label, of up to 1,000 test images."""
    picture = study.workdir / "neighbors.png"
    records = {"runs": [], "picture": str(picture)}
    for seed in study.seeds:
        record = study.train(ARM, study.config(), seed)
        trained = study.open(record)
        train = trained.load(trained.config.train_split)
        test = trained.load(f"test[:{min(QUERIES, study.budget.test)}]")
        neighbors = nearest(trained.activations(test.images), trained.activations(train.images), COUNT)
        record["precision_fc7"] = precision(test.labels, train.labels[neighbors])
        if seed == 0:  # the pixels are the same for all
            by_pixels = precision(test.labels, train.labels[nearest(test.images, train.images, COUNT)])
            probabilities = trained.predict(test.images[:SHOWN])
            plots.plot_retrieval(test, probabilities, train, neighbors[:SHOWN], trained.names, picture)
        records["runs"].append({**record, "precision_pixels": by_pixels})
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare with the pixels, whose precision has no spread, by Student's interval of the difference."""
    fc7, pixels = (percent(records["runs"], f"precision_{what}") for what in ("fc7", "pixels"))
    comparison = compare_paired(fc7, pixels)
    text = f"{spread(fc7)} % of the six nearest have the label, {pixels[0]:.1f} % by pixels (chance: 10): {comparison}"
    return {"retrieval": Finding(text, comparison.verdict(+1))}


def plot(records: dict[str, Any], path: Path) -> None:
    """Copy figure 4 of the first seed."""
    with replaced(path) as temporary:
        shutil.copy(records["picture"], temporary)


if __name__ == "__main__":
    main(sys.modules[__name__])
