"""Orbax checkpoints that are whole, verified, and enough to go on exactly where a run stopped."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint that could not be written or read; one line that says what to do."""


def _digest(tree: Any) -> str:
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        sha.update(np.ascontiguousarray(leaf))
    return sha.hexdigest()


class Checkpoints:
    """The checkpoints of one run: a tree of arrays and a dict of plain values a step, the newest `keep` of them.

    Orbax writes into a temporary folder and renames it, so a save that was killed leaves the ones before.
    """

    def __init__(self, folder: Path, keep: int = 3):
        self.folder = Path(folder).absolute()
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
        tree = jax.tree.map(lambda x: np.array(x, copy=True), tree)
        extra = {**extra, "sha256": _digest(tree)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave(extra))
        self._guard(lambda: self._manager.save(step, args=args, force=True), f"step {step}")

    def wait(self) -> None:
        """Returns when the last save is on the disk; raises as `save` does."""
        self._guard(self._manager.wait_until_finished, "the last step")

    def _guard(self, call, what: str) -> None:
        try:
            call()
            self._manager.check_for_errors()
        except Exception as error:  # Orbax and TensorStore wrap a full disk in several types
            good = self.newest()
            kept = "there is no earlier checkpoint" if good is None else f"the last good checkpoint is step {good}"
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"the checkpoint of {what} could not be written to {self.folder}: {reason}; {kept}. Free some space or "
                "make the folder writable, then run the same command again"
            ) from None

    def _steps_on_disk(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def newest(self) -> int | None:
        """The step of the newest checkpoint that is written whole, or None."""
        return max(self._steps_on_disk(), default=None)

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, as (step, tree, extra); None where there is none at all.

        A damaged one is named in a warning and moved aside, to `NAME.damaged`.

        Args:
          like: a tree of arrays or shapes with the structure that was saved.

        Raises:
          CheckpointError: there are checkpoints, and every one of them is damaged.
        """
        steps = self._steps_on_disk()
        like = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), extra=ocp.args.JsonRestore())
        for step in reversed(steps):
            try:
                loaded = self._manager.restore(step, args=args)
                tree, extra = loaded["state"], loaded["extra"]
                if extra.pop("sha256") != _digest(tree):
                    raise ValueError("its contents do not match their checksum")
            except Exception as error:  # whatever the damage makes Orbax raise
                damaged = self.folder / str(step)
                aside = self.folder / f"{step}.damaged"
                suffix = 1
                while aside.exists():
                    suffix += 1
                    aside = self.folder / f"{step}.damaged.{suffix}"
                os.rename(damaged, aside)
                log.warning(
                    "Warning: checkpoint %s is damaged (%s); moved to %s, trying the one before",
                    damaged, " ".join(str(error).split())[:200] or type(error).__name__, aside.name,
                )  # fmt: skip
                self._manager.reload()
            else:
                return step, tree, extra
        if steps:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged; remove the folder to start again")
        return None

    def close(self) -> None:
        self._manager.close()
