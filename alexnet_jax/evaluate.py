"""Test one trained network or the average of several: python -m alexnet_jax.evaluate --workdir RUN [RUN …]"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alexnet_jax import sharding
from alexnet_jax.checkpoint import silence_orbax
from alexnet_jax.data import Batch
from alexnet_jax.data.dataset import Batches
from alexnet_jax.errors import errors_on_one_line
from alexnet_jax.inference import Network, batch_size, evaluate
from alexnet_jax.progress import Progress
from alexnet_jax.run import Run, RunError, open_run
from alexnet_jax.runtime.compilation_cache import use_compilation_cache
from alexnet_jax.runtime.files import user_path, write_json
from alexnet_jax.runtime.jax_settings import run_settings
from alexnet_jax.runtime.output import escape_output
from alexnet_jax.runtime.signals import exit_at_signals
from alexnet_jax.tables import table

# Table 2 of the paper, on the validation set of ILSVRC-2012 and ten crops: networks: (top-1, top-5).
PAPER = {1: (0.407, 0.182), 5: (0.381, 0.164)}


def _with_progress(batches: Batches, crops: str) -> Iterator[Batch]:
    """Yield the batches and show the progress through them."""
    progress, total, started = Progress(len(batches), 0), len(batches), time.monotonic()
    for done, batch in enumerate(batches, 1):
        yield batch
        progress.advance()
        if done * 10 // total > (done - 1) * 10 // total:
            seconds = time.monotonic() - started
            rate = done * batches.batch_size / seconds
            progress.show(done, seconds * (total / done - 1), crops=crops, images_per_s=f"{rate:.0f}")
    progress.close()


def open_runs(workdirs: Sequence[Path], data_dir: str = "") -> list[Run]:
    """Return the runs of some working directories, whose networks can be averaged; raises as `evaluate_workdirs`."""
    folders = [Path(workdir).resolve() for workdir in workdirs]
    for i, workdir in enumerate(workdirs):
        if folders[i] in folders[:i]:
            raise RunError(f"--workdir={workdir} is given twice; networks that are averaged count once each")
    runs = [open_run(workdir, data_dir) for workdir in workdirs]
    for workdir, run in zip(folders, runs, strict=True):
        if run.dataset.full_name != runs[0].dataset.full_name:
            what = f"another data set ({run.dataset.full_name}) than {workdirs[0]} ({runs[0].dataset.full_name})"
        elif run.names != runs[0].names:
            what = f"other classes than {workdirs[0]}, though both are of {runs[0].dataset.full_name}"
        else:
            continue
        raise RunError(f"--workdir={workdir} has {what}; networks are averaged over one data set")
    return runs


@run_settings()
def evaluate_workdirs(workdirs: Sequence[str | Path], split: str = "", data_dir: str = "") -> dict[str, Any]:
    """Return both errors of the networks of some runs, averaged, on the center crop and on ten crops; print a table.

    Args:
      workdirs: the runs' working directories.
      split: in TFDS's notation; "" is the first config's validation split.
      data_dir: where TFDS keeps the data set; "" is where it was in training.

    Returns:
      The contents of the file that is written to the first workdir: `evaluation.json`, or with several networks
      `evaluation_averaged.json`.

    Raises:
      run.RunError: a folder without a run, or given twice, or runs of different data sets.
      checkpoint.CheckpointError, data.DataError: a corrupt checkpoint; a data set or a split that is missing.
    """
    folders = [user_path(workdir, "--workdir") for workdir in workdirs]
    runs, mesh = open_runs(folders, data_dir), sharding.make_mesh()
    first, split = runs[0], split or runs[0].config.validation_split
    networks = [Network(run.model, run.params, run.preprocess) for run in runs]
    examples = first.dataset.size(split)
    result: dict[str, Any] = {
        "dataset": first.dataset.full_name,
        "split": split,
        "examples": examples,
        "networks": [{"workdir": str(w), "step": run.step} for w, run in zip(folders, runs, strict=True)],
    }
    rows = []
    for crops, ten_crop in (("center", False), ("ten", True)):
        batches = first.dataset.batches(split, batch_size(examples, ten_crop, mesh), mesh)
        evaluation = evaluate(networks, _with_progress(batches, crops), ten_crop, mesh)
        result[crops] = {k: v for k, v in evaluation._asdict().items() if k != "confusion"}
        row = [crops, f"{100 * evaluation.top1_error:.2f} %", f"{100 * evaluation.top5_error:.2f} %"]
        if first.config.dataset.startswith("imagenet2012"):
            paper = PAPER.get(len(networks), ()) if ten_crop and split == "validation" else ()
            row += [f"{100 * error:.1f} %" for error in paper] or ["", ""]
            result[crops] |= dict(zip(("paper_top1_error", "paper_top5_error"), paper, strict=False))
        rows.append(row)
    header = ("crops", "top-1 error", "top-5 error", "paper, top-1", "paper, top-5")[: len(rows[0])]
    path = folders[0] / ("evaluation.json" if len(folders) == 1 else "evaluation_averaged.json")
    steps = ", ".join(f"{w} at step {run.step:,}" for w, run in zip(folders, runs, strict=True))
    print(f"\n{result['dataset']}, {split}, {examples:,} images; {steps}\n\n{table(rows, header)}", flush=True)
    write_json(path, result)
    print(f"\nWritten to {path}")
    return result


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m alexnet_jax.evaluate", description="Test trained networks.")
    parser.add_argument("--workdir", required=True, nargs="+", action="extend", help="a run's workdir")
    parser.add_argument("--split", default="", help="the split to test on (default: the validation split)")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps the data set (default: as in training)")
    parser.add_argument("--compile_cache", help="folder of compiled programs, as for alexnet_jax.main")
    flags = parser.parse_args()
    escape_output()
    use_compilation_cache(flags.compile_cache)
    silence_orbax()
    exit_at_signals()
    with errors_on_one_line():
        evaluate_workdirs(flags.workdir, flags.split, flags.data_dir)


if __name__ == "__main__":
    main()
