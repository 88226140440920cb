"""What training left, tested: python -m alexnet_jax.evaluate --workdir DIR [--workdir DIR …]"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging as absl_logging

from alexnet_jax import data, report, sharding
from alexnet_jax.compile_cache import use_compile_cache
from alexnet_jax.data import Batch, DeviceBatches
from alexnet_jax.evaluate import Network, evaluate, in_batches
from alexnet_jax.run import RunError, open_run
from alexnet_jax.stream import StreamedBatches

# Table 2 of the paper, on the validation set of ILSVRC-2012 and ten patches: networks: (top-1, top-5).
PAPER = {1: (0.407, 0.182), 5: (0.381, 0.164)}


def _shown(batches: DeviceBatches | StreamedBatches, patches: str) -> Iterator[Batch]:
    """The batches, with the progress through them."""
    progress, total, started = report.Progress(len(batches), 0), len(batches), time.monotonic()
    for done, batch in enumerate(batches, 1):
        yield batch
        progress.advance()
        if done * 10 // total > (done - 1) * 10 // total:
            seconds = time.monotonic() - started
            rate = done * batches.batch_size / seconds
            progress.show(done, seconds * (total / done - 1), patches=patches, images_per_s=f"{rate:.0f}")
    progress.close()


def evaluate_workdirs(workdirs: Sequence[Path], split: str = "", data_dir: str = "") -> dict[str, Any]:
    """Both errors of the networks in these folders, averaged, on the central patch and on ten.

    Args:
      split: in TFDS's notation; "" is the first config's validation split.
      data_dir: where the data set is, if not where it was.

    Returns:
      What is written in the first folder: to `evaluation.json`, or of several networks to `evaluation_averaged.json`.

    Raises:
      run.RunError: a folder without a run, with a damaged one, or given twice, or runs of different data sets.
      data.DataError.
    """
    folders = [Path(workdir).resolve() for workdir in workdirs]
    for i, workdir in enumerate(workdirs):
        if folders[i] in folders[:i]:
            raise RunError(f"--workdir={workdir} is given twice; networks that are averaged count once each")
    runs, mesh = [open_run(workdir, data_dir) for workdir in workdirs], sharding.make_mesh()
    config, builder, split = runs[0].config, runs[0].builder, split or runs[0].config.validation_split
    for workdir, run in zip(workdirs, runs, strict=True):
        names = [b.info.full_name for b in (run.builder, builder)]
        if names[0] != names[1]:
            what = f"another data set ({names[0]}) than {workdirs[0]} ({names[1]})"
        elif run.names != runs[0].names:
            what = f"other classes than {workdirs[0]}, though both are of {names[0]}"
        else:
            continue
        raise RunError(f"--workdir={workdir} has {what}; networks are averaged over one data set")
    networks = [Network(run.model, run.params, run.preprocess) for run in runs]
    result = {
        "dataset": builder.info.full_name,
        "split": split,
        "examples": data.split_size(builder, split),
        "networks": [{"workdir": str(w), "step": run.step} for w, run in zip(workdirs, runs, strict=True)],
    }
    rows = []
    for patches, ten_crop in (("center", False), ("ten", True)):
        batches = in_batches(config, builder, split, mesh, ten_crop)
        found = evaluate(networks, _shown(batches, patches), ten_crop, mesh)
        result[patches] = {k: v for k, v in found._asdict().items() if k != "confusion"}
        row = [patches, f"{100 * found.top1_error:.2f} %", f"{100 * found.top5_error:.2f} %"]
        if config.dataset.startswith("imagenet2012"):
            paper = PAPER.get(len(networks), ()) if ten_crop and split == "validation" else ()
            row += [f"{100 * error:.1f} %" for error in paper] or ["", ""]
            result[patches] |= dict(zip(("paper_top1_error", "paper_top5_error"), paper, strict=False))
        rows.append(row)
    header = ("patches", "top-1 error", "top-5 error", "paper, top-1", "paper, top-5")[: len(rows[0])]
    file = workdirs[0] / ("evaluation.json" if len(workdirs) == 1 else "evaluation_averaged.json")
    report.write_json(file, result)
    of = ", ".join(f"{w} at step {run.step:,}" for w, run in zip(workdirs, runs, strict=True))
    print(f"\n{result['dataset']}, {split}, {result['examples']:,} images; {of}\n\n{report.table(rows, header)}")
    print(f"\nWritten to {file}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m alexnet_jax.evaluate", description="What training left, tested.")
    parser.add_argument("--workdir", required=True, nargs="+", action="extend", type=Path, help="a training's folder")
    parser.add_argument("--split", default="", help="the split to test on; by default that of the validation")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps the data set, if not where it was")
    parser.add_argument("--compile_cache", help="where compiled programs are kept, as in alexnet_jax.main")
    flags = parser.parse_args()
    use_compile_cache(flags.compile_cache)
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs what it raises
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        evaluate_workdirs(flags.workdir, flags.split, flags.data_dir)
    except (RunError, data.DataError, OSError) as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
