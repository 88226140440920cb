"""Test one trained network or the average of several: python -m alexnet_jax.evaluate --workdir RUN_OR_FILE […]"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alexnet_jax import sharding
from alexnet_jax.checkpoint import silence_orbax
from alexnet_jax.data import Batch
from alexnet_jax.data.dataset import Batches, Dataset
from alexnet_jax.errors import errors_on_one_line
from alexnet_jax.inference import Network, batch_size, evaluate
from alexnet_jax.progress import Progress
from alexnet_jax.run import Run, RunError, open_named_dataset, open_run, output_path
from alexnet_jax.runtime.compilation_cache import use_compilation_cache
from alexnet_jax.runtime.files import user_path, write_json
from alexnet_jax.runtime.jax_settings import run_settings
from alexnet_jax.runtime.output import command_name, escape_output
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


def open_runs(workdirs: Sequence[Path], data_dir: str = "", dataset: str = "") -> tuple[list[Run], Dataset]:
    """Return some networks that can be averaged, and the data set to test them on; raises as `evaluate_workdirs`."""
    paths = [Path(workdir).resolve() for workdir in workdirs]
    for i, workdir in enumerate(workdirs):
        if paths[i] in paths[:i]:
            raise RunError(f"--workdir={workdir} is given twice; networks that are averaged count once each")
    runs = [open_run(workdir, data_dir) for workdir in workdirs]
    named = [run for run in runs if run.weights.dataset]
    if dataset:
        tested = open_named_dataset(dataset, data_dir)
    elif named:
        tested = named[0].dataset
    else:
        raise RunError(f"--workdir={workdirs[0]} names no data set; give one as TFDS names it (--dataset)")
    for run in [] if dataset else named[1:]:
        if run.dataset.full_name != tested.full_name:
            what = f"another data set ({run.dataset.full_name}) than {named[0].path} ({tested.full_name})"
        elif run.dataset.class_names != tested.class_names:
            what = f"other classes than {named[0].path}, though both are of {tested.full_name}"
        else:
            continue
        raise RunError(f"--workdir={run.path} has {what}; networks are averaged over one data set")
    for run in runs:
        _check_fits(run, tested)
    return runs, tested


def _check_fits(run: Run, dataset: Dataset) -> None:
    """Raise RunError if a network cannot be tested on a data set."""
    images, names = dataset.builder.info.features["image"].shape, run.weights.class_names or ()
    if None not in images and images != run.preprocess.mean.shape:
        sizes = ("×".join(map(str, shape)) for shape in (run.preprocess.mean.shape, images))
        what = "takes images of {}, and those of {name} are {}".format(*sizes, name=dataset.full_name)
    elif run.model.num_classes != dataset.num_classes:
        what = f"has {run.model.num_classes} classes, and {dataset.full_name} has {dataset.num_classes}"
    elif sorted(names) == sorted(dataset.class_names) and [*names] != dataset.class_names:
        what = f"has the classes of {dataset.full_name} in another order"
    else:
        return
    raise RunError(f"--workdir={run.path} {what}; expected the data set that it was trained on, or one like it")


@run_settings()
def evaluate_workdirs(
    workdirs: Sequence[str | Path], split: str = "", data_dir: str = "", dataset: str = ""
) -> dict[str, Any]:
    """Return both errors of some networks, averaged, on the center crop and on ten crops; print a table.

    Args:
      workdirs: runs' working directories, or files of weights.
      split: in TFDS's notation; "" is the validation split of the first network that names a data set.
      data_dir: where TFDS keeps the data set; "" is where it was in training.
      dataset: as TFDS names it; "" is that of the networks, which must have the same.

    Returns:
      The contents of the file that is written to the first workdir: `evaluation.json`, or with several networks
      `evaluation_averaged.json`. If the first is a file of weights, FILE.evaluation.json in the current folder.

    Raises:
      run.RunError: a folder without a run, or given twice; networks of different data sets, or of none.
      weights.WeightsError, checkpoint.CheckpointError: a corrupt file of weights or checkpoint.
      data.DataError: a data set or a split that is missing.
    """
    paths = [user_path(workdir, "--workdir") for workdir in workdirs]
    (runs, tested), mesh = open_runs(paths, data_dir, dataset), sharding.make_mesh()
    split = split or next((run.weights.test_split for run in runs if run.weights.dataset), "")
    if not split:
        raise RunError(f"--workdir={paths[0]} names no split of {tested.full_name}; give one (--split)")
    networks = [Network(run.model, run.weights.params, run.preprocess) for run in runs]
    examples = tested.size(split)
    result: dict[str, Any] = {
        "dataset": tested.full_name,
        "split": split,
        "examples": examples,
        "networks": [
            {"file": str(run.path)} if run.step is None else {"workdir": str(run.path), "step": run.step}
            for run in runs
        ],
    }
    rows = []
    several = "ten" if any(run.preprocess.flip for run in runs) else "five"
    for crops, ten_crop in (("center", False), (several, True)):
        batches = tested.batches(split, batch_size(examples, ten_crop, mesh), mesh)
        evaluation = evaluate(networks, _with_progress(batches, crops), ten_crop, mesh)
        result[crops] = {k: v for k, v in evaluation._asdict().items() if k != "confusion"}
        row = [crops, f"{100 * evaluation.top1_error:.2f} %", f"{100 * evaluation.top5_error:.2f} %"]
        if tested.builder.name.startswith("imagenet2012"):
            paper = PAPER.get(len(networks), ()) if ten_crop and split == "validation" else ()
            row += [f"{100 * error:.1f} %" for error in paper] or ["", ""]
            result[crops] |= dict(zip(("paper_top1_error", "paper_top5_error"), paper, strict=False))
        rows.append(row)
    header = ("crops", "top-1 error", "top-5 error", "paper, top-1", "paper, top-5")[: len(rows[0])]
    path = output_path(paths[0], "evaluation.json" if len(paths) == 1 else "evaluation_averaged.json")
    names = ", ".join(str(r.path) if r.step is None else f"{r.path} at step {r.step:,}" for r in runs)
    print(f"\n{result['dataset']}, {split}, {examples:,} images; {names}\n\n{table(rows, header)}", flush=True)
    write_json(path, result)
    print(f"\nWritten to {path}")
    return result


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=command_name("alexnet_jax.evaluate"), description="Test trained networks.")
    parser.add_argument(
        "--workdir", required=True, nargs="+", action="extend", help="a run's workdir, or a file of weights"
    )
    parser.add_argument("--dataset", default="", help="a TFDS name (default: the networks' own)")
    parser.add_argument("--split", default="", help="the split to test on (default: the validation split)")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps the data set (default: as in training)")
    parser.add_argument("--compile_cache", help="folder of compiled programs, as for alexnet_jax.main")
    flags = parser.parse_args()
    escape_output()
    use_compilation_cache(flags.compile_cache)
    silence_orbax()
    exit_at_signals()
    with errors_on_one_line():
        evaluate_workdirs(flags.workdir, flags.split, flags.data_dir, flags.dataset)


if __name__ == "__main__":
    main()
