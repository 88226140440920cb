"""Compiled programs, kept from one start to the next in JAX's persistent cache."""

import logging
import os
import tempfile
from pathlib import Path

import jax

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """`alexnet_jax` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alexnet_jax"


def use_compile_cache(folder: str | None = None) -> None:
    """Keeps what JAX compiles from now on in a folder, and takes from there what an earlier start compiled.

    A program is found again only with the same shapes, devices and JAX, so what it computes does not change. A folder
    that cannot be written is one line of warning, and the programs are compiled as ever.

    Args:
      folder: where; None is `$JAX_COMPILATION_CACHE_DIR` or else `default_folder()`, "" is nowhere.
    """
    if folder is None:
        folder = jax.config.jax_compilation_cache_dir or default_folder()
    if folder == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if "://" not in str(folder):  # a bucket is JAX's own affair
        folder = Path(folder).expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            log.warning("--compile_cache=%s: %s; programs are compiled anew", folder, error.strerror)
            jax.config.update("jax_enable_compilation_cache", False)
            return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # JAX's own keeps none below a second
