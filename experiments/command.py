"""Shared by the commands of the experiments: the working directory, and its files."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alexnet_jax.errors import UserError
from alexnet_jax.runtime.files import replaced

EXIT_S = 5  # a process that has not ended so long after SIGTERM is killed


@contextlib.contextmanager
def child_process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Start a process, which ends with the block, and whose temporary folders are removed even if it is killed.

    Args:
      options: of `subprocess.Popen`.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(command, env={**os.environ, "TMPDIR": folder}, **options)
        try:
            yield process
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(EXIT_S)
                process.kill()
                process.wait()


def make_workdir(path: Path) -> None:
    """Create a working directory if it does not exist; raises UserError if it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={path}: {error.strerror}; expected a folder to write to") from None


def write_text(path: Path, text: str) -> None:
    """Write a file, the complete file or nothing."""
    with replaced(path) as temporary:
        temporary.write_text(text)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, the complete file or nothing."""
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
