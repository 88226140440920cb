"""Convergence with and without dropout: python -m experiments.dropout_time --workdir DIR

The compact AlexNet on CIFAR-10 at a constant learning rate, validated every quarter of an epoch. A run has converged
when its validation error is first within one point of its own lowest. Both are of the running mean over one epoch: the
error on 2,000 images is noisy, and the lowest of many noisy values is too low. The images are few and not augmented, so
that both forms converge within the budget of a CPU.
"""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.claims import Claim, Finding
from experiments.command import save_figure
from experiments.comparison import compare_paired, spread
from experiments.study import Budget, Study, main
from experiments.style import BLUE, GRAY, ORANGE, WIDTH, plot_runs, styled

CLAIMS = (
    Claim("dropout_time", "Dropout roughly doubles the number of iterations required to converge (4.2)",
          "about 2 times", math.log(2), ratio=True),
)  # fmt: skip
BUDGETS = {"full": Budget(45_000, 60), "reduced": Budget(5000, 60, shrink=2)}
SEEDS = 10
CAPTION = (
    "Validation error by epoch, running means over an epoch: means over the seeds, with bands from the lowest to "
    "the highest run. Dotted lines: geometric means of the times to converge."
)
FORMS = {"dropout": 0.5, "no dropout": 0.0}
PER_EPOCH = 4  # validations
WITHIN = 0.01  # of the lowest error
LATE = 0.9  # share of the epochs; an error that is lowest after it would perhaps fall further


def run(study: Study) -> dict[str, Any]:
    """Return the runs of both forms, and the epochs of their validations."""
    records = {form: [] for form in FORMS}
    for seed in study.seeds:
        for form, rate in FORMS.items():
            config = study.config(dropout=rate, drop_at_epochs=(), random_crop=False, flip=False, lighting=False)
            steps = study.budget.images // config.batch_size  # of an epoch
            config.eval_every = max(1, steps // PER_EPOCH)
            records[form].append(study.train(form.replace(" ", "-"), config, seed))
    count = len(records["dropout"][0]["validation"])
    epochs = [min(study.budget.epochs, (i + 1) * config.eval_every / steps) for i in range(count)]
    return {"epochs": epochs, **records}


def running_means(values: list[float]) -> np.ndarray:
    """Return the means of each `PER_EPOCH` consecutive values."""
    return np.convolve(values, np.full(PER_EPOCH, 1 / PER_EPOCH), "valid")


def time_to_converge(epochs: list[float], errors: list[float]) -> tuple[float, bool]:
    """Return the epoch at which the running mean of an error is first within one point of its lowest value.

    Also return whether the lowest value is in the last tenth of the epochs: then it might fall further, and the time is
    a lower bound.
    """
    means, middles = running_means(errors), running_means(epochs)
    late = middles[means.argmin()] > LATE * epochs[-1]
    return float(middles[np.argmax(means <= means.min() + WITHIN)]), bool(late)


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare the logarithms of the epochs to convergence, with dropout minus without.

    If some runs of one form still improve at the end the ratio is a bound; if some of both do there is no comparison.
    """
    texts, logs, improving = {}, {}, {}
    for form in FORMS:
        times, late = zip(*(time_to_converge(records["epochs"], r["validation"]) for r in records[form]), strict=True)
        bound = f" (a lower bound in {sum(late)} of {len(late)} runs, which still improve)" if any(late) else ""
        lowest = [100 * running_means(r["validation"]).min() for r in records[form]]
        texts[form] = f"{spread(times)} epochs{bound}, lowest error {spread(lowest)} %"
        logs[form], improving[form] = [math.log(time) for time in times], any(late)
    text = f"with dropout {texts['dropout']}; without {texts['no dropout']}"
    if all(improving.values()):
        return {"dropout_time": Finding(text, None)}
    comparison = compare_paired(logs["dropout"], logs["no dropout"])
    bound = improving["dropout"] - improving["no dropout"]
    return {"dropout_time": Finding(text, comparison._replace(bound=bound))}


@styled
def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the validation error, means over the seeds with bands, and the times to converge with their mean."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    middles = running_means(records["epochs"]).tolist()
    for form, color, style in (("dropout", BLUE, "-"), ("no dropout", ORANGE, "--")):
        errors = [(100 * running_means(record["validation"])).tolist() for record in records[form]]
        plot_runs(axes, middles, errors, color=color, linestyle=style, label=form)
        times = [time_to_converge(records["epochs"], record["validation"])[0] for record in records[form]]
        reached = [y[middles.index(time)] for time, y in zip(times, errors, strict=True)]
        axes.plot(times, reached, "o", color=color, markersize=5)
        mean = float(np.exp(np.mean(np.log(times))))
        axes.axvline(mean, color=color, linestyle=":", linewidth=1)
        axes.annotate(
            f"{mean:.1f} epochs", (mean, 1), xytext=(3, -10), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=color, fontsize=8,
        )  # fmt: skip
    axes.set(xlabel="epochs", ylabel="validation error (%)", xlim=(0, None))
    axes.plot([], [], "o", color=GRAY, markersize=5, label="a run is within 1 point of its lowest error")
    axes.legend(loc="center right", frameon=True, framealpha=1, edgecolor="none")
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
