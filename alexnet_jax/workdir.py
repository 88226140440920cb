"""A run's working directory: its config, its result, and the lock against a second run."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from alexnet_jax.errors import UserError
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.files import lock, write_json

CONFIG = "config.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
UNVALIDATED = "unvalidated"  # while training: the newest checkpoint as it was before its validation

# Fields that may change between the starts of one run.
UNRELATED_TO_RESULT = ("data_dir", "source_dir", "loader_workers", "log_every", "mesh")


class WorkdirError(UserError):
    """A working directory that cannot be used: of another run, in use, corrupt, or not writable."""


def check_config_matches(config: dict[str, Any], workdir: Path) -> None:
    """Raise WorkdirError if the directory holds a run of another config; the message names each field that differs.

    Args:
      config: the values as JSON's types.
    """
    path = workdir / CONFIG
    if not path.exists():
        return
    try:
        existing = json.loads(path.read_text())
    except ValueError:
        existing = None
    if not isinstance(existing, dict):
        raise WorkdirError(f"{path} is corrupt; restore it, or train into another --workdir")
    existing, requested = (
        {k: v for k, v in values.items() if k not in UNRELATED_TO_RESULT} for values in (existing, config)
    )
    if different := distributed.differences(existing, requested, labels=("in the workdir", "given")):
        raise WorkdirError(
            f"--workdir={workdir} holds a run of another config ({different}); give the same config, or another "
            "--workdir"
        )


def read_result(workdir: Path, when: str = "") -> dict[str, Any] | None:
    """Return the result of a finished run, the same in every process; None if the run is not finished.

    Args:
      when: distinguishes several calls in one run.

    Raises:
      WorkdirError: the file is not JSON.
      distributed.DistributedError: only some processes can read the file.
    """
    path = workdir / RESULT
    advice = f"--workdir={workdir} must be a folder that all machines share"
    distributed.require_same(f"the workdir{when}", {"finished": path.exists()}, advice)
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise WorkdirError(f"{path} is not JSON; delete it to test the network again") from None


@contextlib.contextmanager
def claimed(workdir: Path, config: dict[str, Any]) -> Iterator[None]:
    """Create the directory with its `config.json`, and lock it against other runs during the block; process 0 does it.

    Args:
      config: the values as JSON's types.

    Raises:
      WorkdirError: it cannot be written, now or in the block; another run holds the lock, or has written another
        config; or a process cannot read it.
    """
    with contextlib.ExitStack() as stack:
        try:
            if jax.process_index() == 0:
                workdir.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(workdir / ".lock", "w"))
                try:
                    lock(file.fileno(), workdir)
                except BlockingIOError:
                    raise WorkdirError(
                        f"--workdir={workdir}: another process is training in it; wait for it, or stop it"
                    ) from None
            distributed.barrier()
            check_config_matches(config, workdir)  # again: another run may have started and ended since the first time
            if jax.process_index() == 0:
                write_json(workdir / CONFIG, config)
            distributed.barrier()
            missing = not (workdir / CONFIG).exists()
            if process := distributed.maximum(jax.process_index() if missing else 0):
                raise WorkdirError(
                    f"--workdir={workdir}: process {process} cannot read what process 0 writes to it; name a folder "
                    "that all machines share"
                )
            yield
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise WorkdirError(f"{error}; raise the limit of open files (ulimit -n)") from None
            if error.filename and not Path(os.fsdecode(error.filename)).absolute().is_relative_to(workdir.absolute()):
                raise WorkdirError(
                    f"{error}; repair that file or its directory, then run the same command again"
                ) from None
            if isinstance(error, FileExistsError | NotADirectoryError):
                raise WorkdirError(f"--workdir={workdir}: a file has this name; name a directory") from None
            raise WorkdirError(
                f"--workdir={workdir} cannot be written: {error}; free some space or make it writable, then run the "
                "same command again"
            ) from None
