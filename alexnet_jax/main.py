"""python -m alexnet_jax.main --workdir DIR [--config=FILE] [--config.FIELD=VALUE …]

One process, or several: found by JAX on a cluster, or given by --coordinator_address, --num_processes, --process_id.
"""

import difflib
import functools
import inspect
import logging
import os
import re
import signal
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from alexnet_jax.configs import default
from alexnet_jax.huge_pages import use_huge_pages

_CONFIGS = Path(__file__).parent / "configs"
FLAG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError)
_TYPES = {int: "a whole number", float: "a number", bool: "True or False", str: "text", tuple: "values with commas"}


def _parse(argv: list[str]) -> list[str]:
    """Defines the flags and parses them; `config_flags` reads the command line already when a flag is defined."""
    try:
        flags.DEFINE_string("workdir", None, "The run's folder: created, or gone on with.", required=True)
        flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, where several processes meet.")
        flags.DEFINE_integer("num_processes", None, "How many processes train together.", lower_bound=1)
        flags.DEFINE_integer("process_id", None, "The number of this one, from 0.", lower_bound=0)
        flags.DEFINE_integer("initialization_timeout", 300, "For how many seconds they wait to meet.", lower_bound=1)
        flags.DEFINE_string(
            "compile_cache", None, "Where compiled programs are kept for the next start; empty: nowhere. The default: "
            "$JAX_COMPILATION_CACHE_DIR, or alexnet_jax in the user's cache folder.",
        )  # fmt: skip
        config_flags.DEFINE_config_file(
            "config", str(_CONFIGS / "fashion_mnist.py"), "A recipe; --config.FIELD=VALUE sets one field of it."
        )
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.to_dict()  # a file that could not be read shows only now
    except FLAG_ERRORS as error:
        sys.exit(f"Error: {flag_error(error, argv)}")
    if len(rest) > 1:
        sys.exit(f"Error: unexpected argument {rest[1]!r}; flags begin with --, as in --config.batch_size=64")
    return rest


def flag_error(error: Exception, argv: list[str]) -> str:
    """What absl and ml_collections say of the flags, in one line, with what they take."""
    if isinstance(error, AttributeError | KeyError):
        config = default.get_config()
        known = sorted({*config, *(f"mesh.{name}" for name in config.mesh)} - {"mesh"})
        given = re.findall(r"--config\.([\w.]+)", " ".join(argv))
        name = next((name for name in given if name not in known), re.search(r"\w+", str(error)).group())
        near = difflib.get_close_matches(name, known, n=1)
        meant = f" Did you mean config.{near[0]}?" if near else ""
        return f"config.{name}: no such field.{meant} The fields are {', '.join(known)}"
    message = " ".join(str(error).split())
    if message.startswith("flag --workdir=None"):
        return "--workdir is missing: the run's folder, as in --workdir runs/"
    if found := re.match(r"flag --config\.([\w.]+)=(.*?): ", message):
        name, given = found.groups()
        *parents, field = name.split(".")
        config = functools.reduce(getattr, parents, default.get_config())
        if (field_type := config.get_type(field)) not in _TYPES:
            fields = ", ".join(f"config.{name}.{k}" for k in config[field])
            return f"config.{name}={given!r}: expected its fields, {fields}"
        return f"config.{name}={given!r}: expected {_TYPES[field_type]}"
    if message.startswith(("flag --config=", "Configuration is not available")):
        reason = re.split(r"Error: |path\]: ", message)[-1]  # the last line of a traceback
        recipes = ", ".join(sorted(p.stem for p in _CONFIGS.glob("*.py") if p.stem not in ("__init__", "default")))
        return f"--config: {reason} (the recipes in {_CONFIGS} are {recipes})"
    return message


def _unraisable(unraisable) -> None:
    """Drops the echoes of a save or a read that failed: what Orbax did beside it is cut off."""
    if str(unraisable.exc_value) != "Event loop is closed" and not inspect.iscoroutine(unraisable.object):
        sys.__unraisablehook__(unraisable)


def main(argv: list[str]) -> None:
    del argv
    sys.unraisablehook = _unraisable
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax logs what it writes, and what it raises too
    logger = logging.getLogger("alexnet_jax")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

    import jax

    # after the flags: a typo is answered at once
    from alexnet_jax import checkpoint, compile_cache, data, distributed, recipe, train

    given = flags.FLAGS
    compile_cache.use_compile_cache(given.compile_cache)
    try:
        distributed.start(
            given.coordinator_address, given.num_processes, given.process_id, given.initialization_timeout
        )
        if distributed.process_id() > 0:
            logger.setLevel(logging.ERROR)  # process 0 speaks for all
        train.train_and_evaluate(given.config, given.workdir)
    except (
        recipe.ConfigError, train.DivergedError, data.DataError, checkpoint.CheckpointError,
        distributed.DistributedError,
    ) as error:  # fmt: skip
        sys.stdout.flush()
        print(f"Error: {error}", file=sys.stderr, flush=True)
        distributed.leave(1)
    except train.Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is leaving
        if distributed.process_id() == 0:
            print(stop, flush=True)
        sys.exit(128 + stop.signal)
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized() or "RESOURCE_EXHAUSTED" in str(error):  # its own memory is full
            raise
        reason = str(error).splitlines()[0][:200]
        print(
            f"Error: process {distributed.process_id()} lost another process of this run ({reason}); start all "
            "processes again with the same command to go on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)  # there is nobody left to meet at a barrier


if __name__ == "__main__":
    use_huge_pages()
    try:
        app.run(main, flags_parser=_parse)
    except KeyboardInterrupt:  # before the training, or the second one; what is on the disk is whole
        print("Interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
