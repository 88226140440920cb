"""Prepare a data set on many machines: python -m alexnet_jax.prepare_beam --dataset NAME --data_dir DIR --out OUT

The work of `alexnet_jax.prepare` as an Apache Beam pipeline. All other flags are Beam's: --runner and what it needs.
"""

import argparse
import logging
import sys

from alexnet_jax.data.images import SIDE
from alexnet_jax.errors import errors_on_one_line
from alexnet_jax.runtime.output import escape_output
from alexnet_jax.runtime.signals import exit_at_signals

try:
    from apache_beam.options.pipeline_options import PipelineOptions

    from alexnet_jax.preparation.beam import prepare
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f'Error: {error}; python -m alexnet_jax.prepare_beam needs Apache Beam: pip install -e ".[beam]"')


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.prepare_beam",
        description="Prepare a data set for training (section 2) on many machines.",
        epilog="All other flags are Beam's: --runner and what it needs.",
    )
    parser.add_argument("--dataset", required=True, help="a TFDS data set in --data_dir, or a name for a folder")
    parser.add_argument("--data_dir", required=True, help="where TFDS keeps data sets, or a folder split/class/image")
    parser.add_argument("--out", required=True, help="where to write the data set NAME_256")
    parser.add_argument("--max_undecodable", type=int, default=10, help="files that may be skipped")
    flags, beam_flags = parser.parse_known_args()
    escape_output()
    exit_at_signals()
    log = logging.getLogger("alexnet_jax")
    log.addHandler(logging.StreamHandler(sys.stdout))  # Beam has set up the root logger for itself
    log.setLevel(logging.INFO)
    log.propagate = False
    with errors_on_one_line():
        folder = prepare(**vars(flags), options=PipelineOptions(beam_flags))
    print(f"{folder}: train with --config.dataset={flags.dataset}_{SIDE} --config.data_dir={flags.out}")


if __name__ == "__main__":
    main()
