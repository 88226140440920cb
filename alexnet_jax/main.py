"""Train and test: python -m alexnet_jax.main --workdir RUN [--config=NAME] [--config.FIELD=VALUE …]

In one process or in several: those that JAX detects on a cluster, or those of --coordinator_address, --num_processes
and --process_id.
"""

import logging
import multiprocessing
import os
import signal
import sys

from absl import app, flags
from ml_collections import config_flags

from alexnet_jax.errors import UserError
from alexnet_jax.flags import FLAG_ERRORS, config_file, config_names, flag_error, with_config_file, without_none
from alexnet_jax.runtime.huge_pages import use_huge_pages
from alexnet_jax.runtime.output import escape_output


def _parse_flags(argv: list[str]) -> list[str]:
    """Define the flags and parse them; defining --config reads the command line already."""
    given, none_fields = without_none(argv)
    argv = with_config_file(given)
    try:
        flags.DEFINE_string("workdir", None, "The run's working directory: created, or resumed from.", required=True)
        flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; all processes connect to it.")
        flags.DEFINE_integer("num_processes", None, "Number of processes that train together.", lower_bound=1)
        flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
        flags.DEFINE_integer(
            "initialization_timeout", 300, "Seconds for which each process waits for the others.", lower_bound=1
        )
        flags.DEFINE_string(
            "compile_cache", None, "Folder of compiled programs, kept for the next start; empty: none. Default: "
            "$JAX_COMPILATION_CACHE_DIR, or else alexnet_jax in the user's cache folder.",
        )  # fmt: skip
        config_flags.DEFINE_config_file(
            "config", config_file("fashion_mnist"), f"One of {', '.join(config_names())}, or a file of your own; "
            "--config.FIELD=VALUE sets one field of it.", sys_argv=argv,
        )  # fmt: skip
        for flag in flags.FLAGS.get_key_flags_for_module(__name__):  # --help shows those of the script, `alexnet-train`
            flags.FLAGS.register_key_flag_for_module(argv[0], flag)
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.to_dict()  # raises here if the file could not be read
        flags.FLAGS.config.update(dict.fromkeys(none_fields))
    except FLAG_ERRORS as error:
        sys.exit(f"Error: {flag_error(error, given)}")
    if len(rest) > 1:
        sys.exit(f"Error: unexpected argument {rest[1]!r}; flags begin with --, as in --config.batch_size=64")
    return rest


def _set_up_logging() -> logging.Logger:
    """Send this package's messages to stdout."""
    logger = logging.getLogger("alexnet_jax")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger


def _run(argv: list[str]) -> None:
    del argv
    logger = _set_up_logging()

    # Imported after the flags are parsed: importing JAX takes seconds, and a typo is reported without it.
    import jax

    from alexnet_jax.checkpoint import silence_orbax
    from alexnet_jax.runtime import distributed
    from alexnet_jax.runtime.compilation_cache import use_compilation_cache
    from alexnet_jax.runtime.signals import EXIT_S, exit_while_blocked
    from alexnet_jax.runtime.workers import kill
    from alexnet_jax.train import Interrupted, train_and_evaluate

    def exit_now(number: int) -> None:
        if distributed.process_id() == 0:
            os.write(1, f"{Interrupted(number)}\n".encode())
        kill(multiprocessing.active_children())
        os._exit(128 + number)

    silence_orbax()
    exit_while_blocked(EXIT_S, exit_now)
    values = flags.FLAGS
    use_compilation_cache(values.compile_cache)
    try:
        distributed.start(
            values.coordinator_address, values.num_processes, values.process_id, values.initialization_timeout
        )
        if distributed.process_id() > 0:
            logger.setLevel(logging.ERROR)  # only process 0 logs
        train_and_evaluate(values.config, values.workdir)
    except UserError as error:
        sys.stdout.flush()
        print(f"Error: {error}", file=sys.stderr, flush=True)
        distributed.exit_process(1)
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # exiting already
        if distributed.process_id() == 0:
            print(stop, flush=True)
        os._exit(128 + stop.signal)  # a usual exit would wait for worker processes and for what is being written
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized() or "RESOURCE_EXHAUSTED" in str(error):  # its own memory is full
            raise
        reason = str(error).splitlines()[0][:200]
        print(
            f"Error: process {distributed.process_id()} lost another process of this run ({reason}); start all "
            "processes again with the same command to resume from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)  # a usual exit would wait for the lost process


def main() -> None:
    """Run the command."""
    use_huge_pages()
    escape_output()
    try:
        app.run(_run, flags_parser=_parse_flags)
    except KeyboardInterrupt:  # before the training, or a second Ctrl-C; the checkpoints on the disk are complete
        print("Interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
