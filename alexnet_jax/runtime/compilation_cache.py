"""JAX's persistent compilation cache: compiled programs are kept from one start to the next."""

import errno
import logging
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax

from alexnet_jax.errors import one_line

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """Return `alexnet_jax` in the user's cache folder, which begins with `~` for a user without a home directory."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "alexnet_jax"


def use_compilation_cache(folder: str | None = None) -> None:
    """Read compiled programs from a folder, and write what JAX compiles from now on there.

    A program is reused only with the same shapes, devices and JAX, so what it computes does not change. If the folder
    cannot be written, a warning is logged and programs are compiled as without a cache. An entry that cannot be read or
    written is deleted with a warning: JAX never replaces one.

    Args:
      folder: None is `$JAX_COMPILATION_CACHE_DIR`, or else `default_folder()`; "" disables the cache.
    """
    if folder is None:
        folder = jax.config.jax_compilation_cache_dir or str(default_folder())  # type: ignore[attr-defined]
    if folder == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if "://" not in folder:  # JAX opens a bucket itself
        path = Path(os.path.expanduser(folder)).absolute()
        try:
            if "~" in path.parts:
                raise OSError(errno.ENOENT, "no home directory")
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            log.warning("--compile_cache=%s: %s; programs are not cached", folder, error.strerror)
            jax.config.update("jax_enable_compilation_cache", False)
            return
        folder = str(path)
        _delete_torn_entries(path)
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # JAX's default of 1 skips all programs that compile in less than a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _delete_torn_entries(folder: Path) -> None:
    """Delete the entries of a program that JAX warns about, instead of the warning; it writes a new one next.

    JAX names the program and not the file, so that sound entries of a program of the same name go too.
    """
    show = warnings.showwarning

    def delete(message: Warning | str, *arguments: Any, **options: Any) -> None:
        pattern = r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)"
        if not (match := re.match(pattern, str(message), re.DOTALL)):
            show(message, *arguments, **options)
            return
        verb, program, reason = match.groups()
        for entry in folder.iterdir():
            if entry.name.startswith(f"{program}-"):
                entry.unlink(missing_ok=True)
        log.warning(
            "Warning: a compiled program in %s cannot be %s (%s); %s is compiled again",
            folder, {"reading": "read", "writing": "written"}[verb], one_line(RuntimeError(reason), 100), program,
        )  # fmt: skip

    warnings.showwarning = delete
