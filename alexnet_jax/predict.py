"""What a trained network sees in image files: python -m alexnet_jax.predict --workdir DIR IMAGE…

Any format that Pillow reads, any size, grey or in colour. A file that cannot be read is named, and the rest goes on.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import numpy as np

from alexnet_jax.images import read_image

LIGHT, DARK = 170, 85  # of 255
SHOWN = 40  # images in the picture, which takes half a minute for 300


def edge(image: np.ndarray) -> float:
    """The mean of an image's outermost pixels [H, W, C]."""
    inside = np.zeros(image.shape[:2], bool)
    inside[1:-1, 1:-1] = True
    return float(image[~inside].mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m alexnet_jax.predict", description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--workdir", type=Path, required=True, help="the folder of a training")
    parser.add_argument("--out", type=Path, help="the picture to write (default: predictions.png in the folder)")
    parser.add_argument("--invert", action="store_true", help="exchange black and white first")
    parser.add_argument("--data_dir", default="", help="where the data set is, if it has moved since the training")
    parser.add_argument("--compile_cache", help="where compiled programs are kept, as in alexnet_jax.main")
    flags = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.CRITICAL)

    out = flags.out or flags.workdir / "predictions.png"
    if flags.out and (out.suffix != ".png" or not out.parent.is_dir() or out.is_dir()):
        sys.exit(f"Error: --out={out}: expected a file .png in a folder that is there")

    from alexnet_jax import data, report
    from alexnet_jax.compile_cache import use_compile_cache
    from alexnet_jax.run import RunError, open_run  # after the flags: a typo is answered at once

    use_compile_cache(flags.compile_cache)
    try:
        run = open_run(flags.workdir, flags.data_dir)
    except (RunError, data.DataError) as error:
        sys.exit(f"Error: {error}")
    mean = run.preprocess.mean
    images, names, light = [], [], []
    for path in flags.images:
        try:
            images.append(read_image(path, mean.shape, flags.invert))
            names.append(os.path.basename(path))
        except Exception as error:  # whatever Pillow makes of it
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"Error: {path}: {reason}", file=sys.stderr, flush=True)
            continue
        if edge(mean) < DARK and edge(images[-1]) > LIGHT:
            light.append(path)
    if light:
        more = f" and {len(light) - 1} more" if light[1:] else ""
        print(f"{light[0]}{more}: on a light ground; {run.config.dataset} has light things on black, so try --invert")
    if not images:
        sys.exit("Error: no image could be read")
    probabilities = run.predict(np.stack(images), run.config.ten_crop)
    for name, p in zip(names, probabilities, strict=True):
        top = np.argsort(-p)[:5]
        rows = [(run.names[i], f"{100 * p[i]:5.1f} %", "█" * round(30 * p[i])) for i in top]
        print(f"\n{name}\n{report.table(rows, ('class', 'probability', ''))}")
    try:
        report.plot_predictions(np.stack(images[:SHOWN]), probabilities[:SHOWN], run.names, out, names[:SHOWN])
    except OSError as error:
        sys.exit(f"Error: --out={out}: {error}")
    print(f"\nWritten to {out}" + f" (the first {SHOWN})" * (len(images) > SHOWN))
    sys.exit(len(images) < len(flags.images))


if __name__ == "__main__":
    main()
