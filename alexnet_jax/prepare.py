"""Prepare a data set for training: python -m alexnet_jax.prepare --dataset NAME --data_dir DIR --out OUT

Every image becomes 256×256 RGB (section 2), stored as the TFDS data set NAME_256 in ArrayRecord, with the mean image
and the RGB covariance of its split `train`. Run the same command again to resume an interrupted preparation.
"""

import argparse
import logging
import signal
import sys
from types import FrameType

from alexnet_jax.errors import errors_on_one_line
from alexnet_jax.preparation.local import prepare
from alexnet_jax.runtime.output import command_name, escape_output
from alexnet_jax.runtime.signals import STOP_SIGNALS


def _stop(number: int, frame: FrameType | None) -> None:
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_DFL)  # a second one ends this process at once
    raise KeyboardInterrupt(number)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=command_name("alexnet_jax.prepare"), description="Prepare a data set for training (section 2)."
    )
    parser.add_argument("--dataset", required=True, help="a TFDS data set in --data_dir, or a name for a folder")
    parser.add_argument("--data_dir", required=True, help="where TFDS keeps data sets, or a folder split/class/image")
    parser.add_argument("--out", required=True, help="where to write the data set NAME_256")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--max_undecodable", type=int, default=10, help="files that may be skipped")
    flags = parser.parse_args()
    escape_output()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("alexnet_jax").setLevel(logging.INFO)
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        with errors_on_one_line():
            folder = prepare(**vars(flags))
    except KeyboardInterrupt as stop:
        print("stopped; run the same command again to resume")
        sys.exit(128 + stop.args[0])
    print(f"{folder}: train with --config.dataset={folder.parent.name} --config.data_dir={folder.parent.parent}")


if __name__ == "__main__":
    main()
