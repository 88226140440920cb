"""Shared by the experiments: budgets, runs that resume, and the files of the results.

An experiment is a module with `CLAIMS`, `BUDGETS`, `SEEDS`, `run(study)`, which trains and returns records,
`judge(records)`, which returns a `Finding` for each claim, and `plot(records, path)`. Its command is `main(module)`.
`CAPTION` is that of the picture, and `REPEATS` names what `SEEDS` counts, if it is not seeds.
"""

import argparse
import datetime
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from alexnet_jax.configs import cifar10
from alexnet_jax.errors import UserError, errors_on_one_line
from alexnet_jax.model import LAYERS, activations
from alexnet_jax.run import Run, open_run
from alexnet_jax.runtime.compilation_cache import use_compilation_cache
from alexnet_jax.runtime.files import read_json_lines, replaced, write_json
from alexnet_jax.runtime.huge_pages import use_huge_pages
from alexnet_jax.runtime.signals import Stopped, raised_signals
from alexnet_jax.runtime.workers import available_cores
from alexnet_jax.setup import build_mesh, build_model
from alexnet_jax.tables import table
from alexnet_jax.train import Interrupted, train_and_evaluate
from alexnet_jax.workdir import CONFIG, METRICS, RESULT, WorkdirError
from experiments import claims, measure
from experiments.command import make_workdir, write_text

CLASSES, CHANNELS = 10, 3  # of CIFAR-10


class Budget(NamedTuple):
    """How much of CIFAR-10 a run trains on."""

    images: int  # to train
    epochs: float
    validation: int = 2000
    test: int = 10_000
    shrink: int = 1  # divisor of the widths

    def __str__(self) -> str:
        smaller = f", widths ÷ {self.shrink}" if self.shrink > 1 else ""
        return f"{self.images:,} images, {self.epochs:g} epochs{smaller}"


QUICK = Budget(images=256, epochs=2, validation=64, test=64, shrink=4)


def kernel_std(config: ml_collections.ConfigDict) -> tuple[float, ...]:
    """Return the initial standard deviations of the kernels at which each layer's output has a mean square of 1.

    The input is noise. Every variant of the network thus starts at the same scale. The mean square is that of the
    logits too; after tanh it is 0.4, as for an input with a normal distribution.
    """
    model, side = build_model(config, CLASSES), config.resize or config.image_size
    images = jax.random.normal(jax.random.key(0), (32, side, side, CHANNELS))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    random = np.random.default_rng(0)
    kernels = {layer: random.standard_normal(leaves["kernel"].shape, np.float32) for layer, leaves in shapes.items()}
    std = {layer: x.shape[-1] ** 0.5 / x.size**0.5 for layer, x in kernels.items()}

    @jax.jit
    def root_mean_squares(kernels):
        params = {k: {"kernel": x, "bias": jnp.zeros(x.shape[-1])} for k, x in kernels.items()}
        return {k: jnp.sqrt(jnp.mean(x**2)) for k, x in activations(model, params, images).items()}

    for layer in [layer for layer in LAYERS if layer in std]:  # each depends on those before it
        target = 0.4**0.5 if config.activation == "tanh" and layer != "fc8" else 1.0
        for _ in range(5 if config.activation == "tanh" else 1):
            measured = root_mean_squares({k: std[k] * x for k, x in kernels.items()})
            std[layer] *= target / float(measured[layer])
    for before, layer in (("fc6", "fc7"), ("fc7", "fc8")):
        if before in std:  # measured without dropout, which raises the mean square in training
            std[layer] *= math.sqrt(1 - config.dropout)
    return tuple(float(f"{std.get(layer, 1.0):.3g}") for layer in LAYERS)


class Study:
    """One experiment: its budget, its seeds, and its working directory, with a folder for each run."""

    def __init__(self, workdir: Path, budget: Budget, label: str, seeds: int, data_dir: str):
        self.workdir, self.budget, self.label, self.data_dir = workdir, budget, label, data_dir
        self.seeds, self.seconds = range(seeds), 0.0
        self._std = {}
        self.results = workdir / label if label == "quick" else workdir  # a quick study replaces no results

    def config(self, **fields) -> ml_collections.ConfigDict:
        """Return the common config, the compact network on CIFAR-10, with some fields changed.

        Pooling halves maps of 23, 11 and 5 pixels to the same size with z = 3 and with z = 2, as it does the paper's
        maps of 55, 27 and 13 pixels.
        """
        c, b = cifar10.get_config(), self.budget
        c.data_dir = self.data_dir
        c.train_split = f"train[:{b.images}]"
        c.validation_split = f"train[-{b.validation}:]"
        c.test_split = f"test[:{b.test}]"
        c.image_size = 23
        c.ten_crop = False
        c.num_epochs = float(b.epochs)
        c.dropout = 0.5
        c.mesh.cpu_devices = min(2, available_cores())
        c.linear_decay = False
        c.plateau_patience = 0
        c.drop_at_epochs = (0.64 * b.epochs, 0.86 * b.epochs)
        c.warmup_steps = 100
        c.kernel_std = None  # `train` sets it
        c.update(fields)
        c.widths = tuple(w // b.shrink for w in c.widths)
        return c

    def train(self, arm: str, config: ml_collections.ConfigDict, seed: int) -> dict[str, Any]:
        """Train one run, unless it is finished, and return its record: result, curve, and folder.

        The initial kernels have the config's `kernel_std`, or that of the function `kernel_std`.

        Raises as `train_and_evaluate` does.
        """
        folder = self.workdir / self.label / arm / f"seed{seed}"
        config.seed = seed
        if (folder / CONFIG).exists():  # started before, perhaps on another machine
            try:
                self._std[arm] = tuple(json.loads((folder / CONFIG).read_text())["kernel_std"])
            except (ValueError, KeyError, TypeError):
                raise WorkdirError(f"{folder / CONFIG} is corrupt; delete {folder}") from None
        config.kernel_std = self._std[arm] = self._std.get(arm) or config.kernel_std or kernel_std(config)
        if not (folder / RESULT).exists():
            print(f"\n{arm}, seed {seed}: {self.budget._replace(epochs=config.num_epochs)}", flush=True)
        result = train_and_evaluate(config, folder)
        self.seconds += result["seconds"]  # with those before an interruption
        lines = read_json_lines(folder / METRICS)
        means = [x for x in lines if "train_error" in x and x["step"] % config.log_every == 0]  # of `log_every` steps
        curve = [(x["epoch"], x["train_error"]) for x in means]
        validation = [x["validation_top1_error"] for x in lines if "validation_top1_error" in x]
        return {"seed": seed, **result, "curve": curve, "validation": validation, "folder": str(folder)}

    def measure(self, record: dict[str, Any], name: str, call: Callable[[Run], Any]) -> None:
        """Add `call(run)` to the record of a run, under a name; stored with the run."""
        path = Path(record["folder"]) / "measured.json"
        measured = json.loads(path.read_text()) if path.exists() else {}
        if name not in measured:
            measured[name] = call(self.open(record))
            write_json(path, measured)
        record[name] = measured[name]

    def test_probabilities(self, record: dict[str, Any]) -> np.ndarray:
        """Return the class probabilities of the test set on the center crop, [N, K]; stored with the run."""
        path = Path(record["folder"]) / "test_probabilities.npy"
        if not path.exists():
            run = self.open(record)
            probabilities = run.predict(run.load(run.config.test_split).images)
            with replaced(path) as temporary, temporary.open("wb") as file:
                np.save(file, probabilities)
        return np.load(path)

    def open(self, record: dict[str, Any]) -> Run:
        """Return the run of a record."""
        return open_run(record["folder"], self.data_dir)


def setting() -> dict[str, str]:
    """Return what a result depends on besides its budget: device, JAX, and the commit of this checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        commit = "unknown"
    return {"device": measure.device(), "jax": jax.__version__, "commit": commit}


def main(module: Any) -> None:
    """Run the command of an experiment."""
    use_huge_pages()
    name = module.__spec__.name.split(".")[-1]
    doc = module.__doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=doc)
    parser.add_argument("--workdir", type=Path, required=True, help=f"for the runs and {name}.json, .md and .png")
    parser.add_argument(
        "--seeds", type=int, default=module.SEEDS, help=f"runs of each network (default: {module.SEEDS})"
    )
    budgets = {**module.BUDGETS, "quick": module.BUDGETS.get("quick", QUICK)}
    texts = "; ".join(f"{label}: {budget}" for label, budget in budgets.items())
    parser.add_argument("--budget", choices=budgets, help=f"{texts} (default: reduced on a CPU, full elsewhere)")
    parser.add_argument("--quick", action="store_true", help="--budget=quick, to see that it works; no result")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps CIFAR-10 (default: ~/tensorflow_datasets)")
    if hasattr(module, "PARTS"):
        parser.add_argument("--only", help=f"with commas, some of {', '.join(module.PARTS)} (default: all)")
    flags = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it writes
    try:
        with errors_on_one_line(), raised_signals():
            if flags.seeds < 2:
                raise UserError(f"--seeds={flags.seeds}: expected at least 2; one run has no spread")
            parts = flags.only.split(",") if getattr(flags, "only", None) else getattr(module, "PARTS", ())
            if unknown := set(parts) - set(getattr(module, "PARTS", ())):
                raise UserError(f"--only: unknown part {min(unknown)!r}; expected some of {', '.join(module.PARTS)}")
            use_compilation_cache()  # one compilation serves all seeds
            build_mesh(Study(flags.workdir, QUICK, "", 2, "").config())  # a CPU is split before the backend starts
            label = "quick" if flags.quick else flags.budget or default_budget()
            study = Study(flags.workdir, budgets[label], label, flags.seeds, flags.data_dir)
            make_workdir(study.results)
            records = module.run(study, parts) if parts else module.run(study)
            _write(module, name, study, records)
    except (Interrupted, Stopped) as stop:  # in training, or elsewhere
        print(stop if isinstance(stop, Interrupted) else Interrupted(stop.signal), flush=True)
        sys.exit(128 + stop.signal)


def repeats(module: Any) -> str:
    """Return what the seeds of an experiment count."""
    return getattr(module, "REPEATS", "seeds")


def default_budget() -> str:
    """Return the budget that this device can finish within hours."""
    return "reduced" if jax.default_backend() == "cpu" else "full"


def _write(module: Any, name: str, study: Study, records: dict[str, Any]) -> None:
    """Write NAME.json, NAME.md and NAME.png, and print the table."""
    document = {
        "experiment": name,
        "budget": study.label,
        "of_budget": str(study.budget),
        "seeds": len(study.seeds),
        **setting(),
        "date": datetime.date.today().isoformat(),
        "seconds": round(study.seconds),
        "records": records,
    }
    write_json(study.results / f"{name}.json", document)
    findings = module.judge(records)
    rows = claims.rows([(c, findings[c.key]) for c in module.CLAIMS if c.key in findings])
    text = f"{study.label} budget: {study.budget}; {len(study.seeds)} {repeats(module)}; {document['device']}\n\n"
    text += table(rows, claims.HEADER, markdown=True)
    write_text(study.results / f"{name}.md", text + "\n")
    module.plot(records, study.results / f"{name}.png")
    print(f"\n{text}\n\nWritten to {study.results}")
