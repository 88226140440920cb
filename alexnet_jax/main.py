"""python -m alexnet_jax.main --workdir DIR [--config=FILE] [--config.FIELD=VALUE …]"""

import logging
import os
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

_CONFIGS = Path(__file__).parent / "configs"

flags.DEFINE_string("workdir", None, "The run's folder: created, or gone on with.")
config_flags.DEFINE_config_file(
    "config", str(_CONFIGS / "fashion_mnist.py"), "A recipe; --config.FIELD=VALUE sets one field of it."
)
flags.mark_flag_as_required("workdir")


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv, known_only=False)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        recipes = ", ".join(sorted(p.stem for p in _CONFIGS.glob("*.py") if p.stem not in ("__init__", "default")))
        sys.exit(f"Error: {' '.join(str(error).split())} (recipes in {_CONFIGS}: {recipes}; fields in default.py there)")
    if len(rest) > 1:
        sys.exit(f"Error: unexpected argument {rest[1]!r}; flags begin with --, as in --config.batch_size=64")
    return rest


def main(argv: list[str]) -> None:
    del argv
    logging.getLogger("alexnet_jax").setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("alexnet_jax").addHandler(handler)
    logging.getLogger("alexnet_jax").propagate = False

    from alexnet_jax import checkpoint, data, train  # after the flags: a typo is answered without loading JAX

    try:
        train.train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir)
    except (train.ConfigError, train.DivergedError, data.DataError, checkpoint.CheckpointError) as error:
        sys.exit(f"Error: {error}")
    except train.Interrupted as stop:
        print(stop, flush=True)
        sys.exit(128 + stop.signal)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
