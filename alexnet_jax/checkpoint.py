"""Orbax checkpoints that are whole, verified, and enough to go on exactly where a run stopped."""

import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax

from alexnet_jax import distributed

log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint that could not be written or read; one line that says what to do."""


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
    """A uint32 that any single bit of the tree changes, and other damage but for one case in 2³².

    It is a sum over all elements, modulo 2³², so each device adds up what it holds and the mesh does not matter. Each
    element's bits count times an odd number that depends on its place and on the names, shape and type of its leaf.
    """

    def leaf_sum(path, x):
        bits = lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        for factor in (0x7FEB352D, 0x846CA68B):  # so that the numbers of neighbours have nothing to do with each other
            place = (place ^ (place >> 16)) * jnp.uint32(factor)
        name = f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}"
        return jnp.sum(bits.astype(jnp.uint32) * (place | 1)) * jnp.uint32(zlib.crc32(name.encode()) | 1)

    return sum(leaf_sum(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree))


class Checkpoints:
    """The checkpoints of one run: a tree of arrays and a dict of plain values a step, the newest `keep` of them.

    Orbax writes into a temporary folder and renames it, so a save that was killed leaves the ones before. With several
    processes every method is called by all of them, and each writes and reads its own part of the arrays.
    """

    def __init__(self, folder: Path, keep: int = 3):
        self.folder = Path(folder).absolute()
        self._writing = 0  # the step of the last save
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written: {error}") from None

    def save(self, step: int, tree: Any, extra: dict[str, Any]) -> None:
        """Starts to write, unless this step is written already; the tree is copied first, so it may be donated next.

        Raises:
          CheckpointError: this save or the one before failed (a full disk, say); older checkpoints stay.
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
        """Returns when the last save is on the disk; raises as `save` does."""
        self._guard(self._manager.wait_until_finished)

    def _guard(self, call) -> None:
        try:
            call()
            self._manager.check_for_errors()
        except jax.errors.JaxRuntimeError:  # of the devices or of another process, not of the disk
            raise
        except Exception as error:  # Orbax and TensorStore wrap a full disk in several types
            good = self.newest()
            kept = "there is no earlier checkpoint" if good is None else f"the last good checkpoint is step {good}"
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"the checkpoint of step {self._writing} could not be written to {self.folder}: {reason}; {kept}. Free "
                "some space or make the folder writable, then run the same command again"
            ) from None

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is written whole, or None."""
        return max((int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), default=None)

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, as (step, tree, extra); None where there is none at all.

        A damaged one is named in a warning and moved aside, to `NAME.damaged`.

        Args:
          like: a tree of arrays with the structure that was saved; the arrays that are read lie where these do.

        Raises:
          CheckpointError: there are checkpoints, and every one of them is damaged.
        """
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        damaged = False
        while (step := distributed.from_first(-1 if (newest := self.newest()) is None else newest)) >= 0:
            reason, found = "", None
            try:
                found = self._read(step, like)
            except Exception as error:  # whatever the damage makes Orbax raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            if not distributed.highest(found is None):
                tree, extra = found
                if extra.pop("fingerprint", None) == int(fingerprint(tree)):  # as of all processes, so all agree
                    return step, tree, extra
                reason = "its contents do not match their fingerprint"
            damaged = True
            if jax.process_index() == 0:
                self._move_aside(step, reason or "another process cannot read its part")
            distributed.highest(0)
            self._manager.reload()
        if damaged or any(self.folder.glob("*.damaged*")):
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged; remove the folder to start again")
        return None

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """What this process holds of a checkpoint, and its dict; waits for no other, which may have failed."""
        here = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            tree = reader.restore(self.folder / str(step) / "state", args=ocp.args.StandardRestore(like))
        extra = json.loads((self.folder / str(step) / "extra" / "metadata").read_text())  # as JsonSave writes it
        return tree, extra

    def _move_aside(self, step: int, reason: str) -> None:
        aside, suffix = self.folder / f"{step}.damaged", 1
        while aside.exists():
            suffix += 1
            aside = self.folder / f"{step}.damaged.{suffix}"
        os.rename(self.folder / str(step), aside)
        log.warning(
            "Warning: checkpoint %s is damaged (%s); moved to %s, trying the one before",
            self.folder / str(step), reason, aside.name,
        )  # fmt: skip

    def close(self) -> None:
        self._manager.close()
