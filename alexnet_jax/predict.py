"""Classify image files with a trained network: python -m alexnet_jax.predict --workdir RUN_OR_FILE IMAGE…

Any format that Pillow reads, any size, in gray or in color. A file that cannot be read is named and skipped.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

from alexnet_jax.checkpoint import silence_orbax
from alexnet_jax.data.images import read_image
from alexnet_jax.errors import errors_on_one_line, one_line
from alexnet_jax.plots import plot_predictions
from alexnet_jax.run import Run, open_run, output_path
from alexnet_jax.runtime.compilation_cache import use_compilation_cache
from alexnet_jax.runtime.files import user_path
from alexnet_jax.runtime.output import command_name, escape_output, escaped
from alexnet_jax.runtime.signals import exit_at_signals
from alexnet_jax.tables import table

LIGHT, DARK = 170, 85  # of 255
SHOWN = 40  # images in the figure: more take long to draw


def edge(image: np.ndarray) -> float:
    """Return the mean of the outermost pixels of an image [H, W, C]."""
    interior = np.zeros(image.shape[:2], bool)
    interior[1:-1, 1:-1] = True
    return float(image[~interior].mean())


def read_images(paths: Sequence[str], run: Run, invert: bool) -> list[tuple[str, np.ndarray]]:
    """Return the paths and images that can be read, uint8 [H, W, C] as the network takes them.

    An error is printed for each of the others, and a hint for images on a light background if the data set's are dark.
    """
    mean = np.asarray(run.preprocess.mean)
    images = []
    for path in paths:
        try:
            images.append((path, read_image(path, mean.shape, invert, run.weights.resizing)))
        except Exception as error:  # any exception of a corrupt file
            print(f"Error: {path}: {one_line(error, 500)}", file=sys.stderr, flush=True)
    light = [path for path, image in images if edge(mean) < DARK and edge(image) > LIGHT]
    if light:
        more = f" and {len(light) - 1} more" if light[1:] else ""
        dataset = run.weights.dataset or "the training data"
        print(f"{light[0]}{more}: on a light background; {dataset} has light objects on black, so try --invert")
    return images


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=command_name("alexnet_jax.predict"), description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--workdir", required=True, help="a run's workdir, or a file of weights")
    parser.add_argument(
        "--out", help="the figure to write (default: predictions.png in the workdir; of a file of weights, "
        "FILE.predictions.png in the current folder)",
    )  # fmt: skip
    parser.add_argument("--invert", action="store_true", help="invert the pixels first: black becomes white")
    parser.add_argument("--data_dir", default="", help="where TFDS keeps the data set (default: as in training)")
    parser.add_argument("--compile_cache", help="folder of compiled programs, as for alexnet_jax.main")
    flags = parser.parse_args()
    silence_orbax()
    exit_at_signals()
    escape_output()
    with errors_on_one_line():
        workdir = user_path(flags.workdir, "--workdir")
        out = output_path(workdir, "predictions.png") if flags.out is None else user_path(flags.out, "--out")
    if flags.out and (out.suffix != ".png" or not out.parent.is_dir() or out.is_dir()):
        sys.exit(f"Error: --out={out}: expected a .png file in an existing folder")

    use_compilation_cache(flags.compile_cache)
    with errors_on_one_line():
        run = open_run(workdir, flags.data_dir)
    images = read_images(flags.images, run, flags.invert)
    if not images:
        sys.exit("Error: no image could be read")
    names, pixels = [escaped(os.path.basename(path)) for path, _ in images], np.stack([image for _, image in images])
    probabilities = run.predict(pixels, run.weights.ten_crop)
    bar = "█" if "█".encode(sys.stdout.encoding, "ignore") else "#"
    for name, p in zip(names, probabilities, strict=True):
        top = np.argsort(-p)[:5]
        rows = [(run.names[i], f"{100 * p[i]:5.1f} %", bar * round(30 * p[i])) for i in top]
        print(f"\n{name}\n{table(rows, ('class', 'probability', ''))}")
    try:
        plot_predictions(pixels[:SHOWN], probabilities[:SHOWN], run.names, out, names[:SHOWN])
    except Exception as error:  # of the disk, or of Matplotlib, its settings and fonts
        sys.exit(f"Error: --out={out} cannot be drawn: {one_line(error)}")
    print(f"\nWritten to {out}" + f" (the first {SHOWN})" * (len(images) > SHOWN))
    sys.exit(len(images) < len(flags.images))


if __name__ == "__main__":
    main()
