"""Orbax checkpoints: complete, verified, and sufficient to resume exactly where a run stopped."""

import inspect
import json
import logging
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from jax import lax

from alexnet_jax.errors import UserError, one_line
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.imports import import_quietly, unchanged_logging
from alexnet_jax.runtime.signals import Stopped, deferred_signals

ocp = import_quietly("orbax.checkpoint")

log = logging.getLogger(__name__)


def silence_orbax() -> None:
    """Silence Orbax's log, whose errors are also raised, and what Python ignores after a failed save or read.

    A command calls this first.
    """
    absl_logging.set_verbosity(absl_logging.FATAL)
    sys.unraisablehook = _ignore_echoes


def _ignore_echoes(unraisable: "sys.UnraisableHookArgs") -> None:
    failed_io = str(unraisable.exc_value) == "Event loop is closed" or inspect.iscoroutine(unraisable.object)
    if not failed_io and not isinstance(unraisable.exc_value, Stopped):  # the signal is handled after the current step
        sys.__unraisablehook__(unraisable)


class CheckpointError(UserError):
    """A checkpoint that could not be written, or that is corrupt."""


class MismatchError(CheckpointError):
    """A checkpoint that is not corrupt but holds other arrays than the run that reads it."""


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """Return a uint32 checksum: a single flipped bit always changes it, other corruption with probability 1 − 2⁻³².

    It is a sum over all elements, modulo 2³², so each device sums its own elements and the mesh does not matter. Each
    element's bits are multiplied by an odd number that depends on its position and on its leaf's path, shape and type.
    """

    def leaf_sum(path, x):
        bits = lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        position = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            position = position * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        for factor in (0x7FEB352D, 0x846CA68B):  # a hash: neighboring positions get unrelated factors
            position = (position ^ (position >> 16)) * jnp.uint32(factor)
        name = f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}"
        return jnp.sum(bits.astype(jnp.uint32) * (position | 1)) * jnp.uint32(zlib.crc32(name.encode()) | 1)

    return sum(leaf_sum(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree))


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest complete checkpoint in a folder, or None."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=None)


@unchanged_logging()
def read_checkpoint(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Return a checkpoint's tree and its dict of plain values.

    Args:
      path: the folder of one step.
      like: a tree of arrays with the structure that was saved; the arrays are placed as these are.

    Raises:
      MismatchError: it holds other arrays.
      CheckpointError: it is corrupt.
    """
    try:
        tree, extra = _read(path, _abstract(like))
        reason = _mismatch(tree, extra)
    except MismatchError:
        raise
    except Exception as error:  # any exception of a corrupt file
        reason = one_line(error)
    if reason:
        raise CheckpointError(
            f"checkpoint {path} is corrupt ({reason}); remove it to read the one before it, or train again"
        )
    return tree, extra


def _abstract(like: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)


def _read(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Return this process's part of a checkpoint, and its dict; does not wait for other processes: they may fail.

    A signal is handled at the end: Orbax would raise it as an error of the file.
    """
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with deferred_signals():
        _check_arrays(path, handler.metadata(path.absolute() / "state").tree, like)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            tree = reader.restore(path.absolute() / "state", args=ocp.args.StandardRestore(like))
    return tree, json.loads((path / "extra" / "metadata").read_text())  # as JsonSave writes it


def _check_arrays(path: Path, saved: Any, like: Any) -> None:
    """Raise MismatchError if a checkpoint's arrays have other names, shapes or types than those of `like`."""

    def arrays(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(place, simple=True, separator="."): f"{np.dtype(x.dtype)}{[*x.shape]}"
            for place, x in leaves
        }

    if different := distributed.differences(arrays(saved), arrays(like), labels=("in the checkpoint", "in this run")):
        raise MismatchError(
            f"checkpoint {path} is of another run ({different[:300]}); nothing was changed: give the config that it "
            "was trained with (64 bits: by JAX_ENABLE_X64, a key of 4 words: by JAX_DEFAULT_PRNG_IMPL; train again)"
        )


def _mismatch(tree: Any, extra: dict[str, Any]) -> str:
    """Remove the fingerprint from `extra` and return what is wrong with the tree, or ""; equal in all processes."""
    return "" if extra.pop("fingerprint", None) == int(fingerprint(tree)) else "its fingerprint does not match"


class Checkpoints:
    """The newest `keep` checkpoints of one run, each a tree of arrays and a dict of plain values.

    Orbax writes into a temporary folder and renames it, so an interrupted save leaves the earlier checkpoints intact.
    With several processes all of them call every method, and each writes and reads its own part of the arrays.
    """

    def __init__(self, folder: Path, keep: int = 3, others: tuple[Path, ...] = ()):
        """Create the folder if necessary; raises CheckpointError if it cannot be written.

        Args:
          others: further folders with checkpoints of the run, for the message of a save that fails.
        """
        self.folder = Path(folder).absolute()
        self._folders = (self.folder, *others)
        self._writing = 0  # the step of the last save
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written: {error}") from None

    def save(self, step: int, tree: Any, extra: dict[str, Any]) -> None:
        """Start to write a step, unless it exists already; the tree is copied first, so the caller may donate it.

        Raises:
          CheckpointError: this save or the previous one failed, for example on a full disk; older checkpoints stay.
        """
        if step == self._manager.latest_step():
            return
        self.wait()
        self._writing = step
        tree = jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
        extra = {**extra, "fingerprint": int(fingerprint(tree))}
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave(extra))
        self._guard(lambda: self._manager.save(step, args=args, force=True))

    def wait(self) -> None:
        """Wait until the last save is on the disk; raises as `save` does."""
        self._guard(self._manager.wait_until_finished)

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
            self._manager.check_for_errors()
        except jax.errors.JaxRuntimeError:  # an error of the devices or of another process, not of the disk
            raise
        except Exception as error:  # Orbax and TensorStore wrap a full disk in several types
            newest = max((step for folder in self._folders if (step := newest_step(folder)) is not None), default=None)
            kept = "there is no earlier checkpoint" if newest is None else f"the last good checkpoint is step {newest}"
            raise CheckpointError(
                f"the checkpoint of step {self._writing} could not be written to {self.folder}: "
                f"{one_line(error, 300)}; {kept}. Free some space or make the folder writable, then run the same "
                "command again"
            ) from None

    def newest(self) -> int:
        """Return the step of the newest checkpoint, the same in every process; −1 if there is none."""
        step = newest_step(self.folder)
        return distributed.from_first(-1 if step is None else step)

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Return the newest checkpoint that is not corrupt, as (step, tree, extra); None if there is none at all.

        A corrupt one is named in a warning and renamed to `STEP.corrupt`.

        Args:
          like: as in `read_checkpoint`.

        Raises:
          MismatchError: the newest holds other arrays; nothing is renamed.
          CheckpointError: there are checkpoints, and all of them are corrupt.
        """
        like, corrupt = _abstract(like), False
        while (step := self.newest()) >= 0:
            reason, checkpoint = "another process cannot read its part", None
            try:
                checkpoint = _read(self.folder / str(step), like)
            except MismatchError:
                raise
            except Exception as error:  # any exception of a corrupt file
                reason = one_line(error)
            if not distributed.maximum(checkpoint is None):
                tree, extra = checkpoint
                reason = _mismatch(tree, extra)
                if not reason:
                    return step, tree, extra
            corrupt = True
            if jax.process_index() == 0:
                self._rename(step, reason)
            distributed.barrier()
            self._manager.reload()
        if corrupt or any(self.folder.glob("*.corrupt*")):
            raise CheckpointError(f"every checkpoint in {self.folder} is corrupt; remove the folder to start again")
        return None

    def _rename(self, step: int, reason: str) -> None:
        name, suffix = f"{step}.corrupt", 1
        while (self.folder / name).exists():
            suffix += 1
            name = f"{step}.corrupt.{suffix}"
        os.rename(self.folder / str(step), self.folder / name)
        log.warning(
            "Warning: checkpoint %s is corrupt (%s); renamed to %s, trying the one before it",
            self.folder / str(step), reason, name,
        )  # fmt: skip

    def close(self) -> None:
        """Wait for the last save and free Orbax's threads."""
        self._manager.close()
