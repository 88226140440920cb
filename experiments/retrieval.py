"""Figure 4, similar images by their fc7 activations: python -m experiments.retrieval --workdir DIR

For each test image the six nearest training images by Euclidean distance: of the activations of fc7, and of the pixels,
which section 6.1 says would not do.
"""

import sys
from pathlib import Path
from typing import Any

from alexnet_jax import plots
from alexnet_jax.run import nearest, precision
from experiments import study
from experiments.study import Budget, Claim, Finding, Study

CLAIMS = (
    Claim("retrieval", "Images that are near in fc7 show the same things; near in pixels they do not (figure 4, 6.1)",
          "shown on five images"),
)  # fmt: skip
BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(15_000, 8)}
COUNT, QUERIES, SHOWN = 6, 1000, 5
ARM = "the-whole-network"  # the runs of the ablations, where they are in the same folder


def run(of: Study) -> dict[str, Any]:
    """The share of the six nearest that have the query's label, of up to 1,000 test images."""
    records = {"runs": []}
    for seed in of.seeds:
        record = of.train(ARM, of.config(), seed)
        trained = of.open(record)
        train, test = trained.load(trained.config.train_split), trained.load(f"test[:{min(QUERIES, of.budget.test)}]")
        seen = nearest(trained.activations(test.images), trained.activations(train.images), COUNT)
        record["precision_fc7"] = precision(test.labels, train.labels[seen])
        if seed == 0:  # the pixels are the same for all
            by_pixels = precision(test.labels, train.labels[nearest(test.images, train.images, COUNT)])
            probabilities = trained.predict(test.images[:SHOWN])
            plots.plot_retrieval(test, probabilities, train, seen[:SHOWN], trained.names, of.workdir / "neighbours.png")
        records["runs"].append({**record, "precision_pixels": by_pixels})
    records["picture"] = str(of.workdir / "neighbours.png")
    return records


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Against the pixels, whose precision has no spread: Student's interval of the difference."""
    fc7, pixels = (study.percent(records["runs"], f"precision_{what}") for what in ("fc7", "pixels"))
    found = study.compare_paired(fc7, pixels)
    text = f"{study.spread(fc7)} % of the six nearest have the label, {pixels[0]:.1f} % by pixels (chance: 10): {found}"
    return {"retrieval": Finding(text, found.verdict(+1))}


def plot(records: dict[str, Any], path: Path) -> None:
    """Figure 4 of the first seed."""
    path.write_bytes(Path(records["picture"]).read_bytes())


if __name__ == "__main__":
    study.main(sys.modules[__name__])
