"""The metrics that a run writes while it trains: `metrics.jsonl` and TensorBoard events."""

import contextlib
import json
import time
from pathlib import Path

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from alexnet_jax.runtime.files import finite, read_json_lines, replaced


class Metrics:
    """`metrics.jsonl`, one object per line with its step, and the same values as TensorBoard events; from process 0."""

    def __init__(self, workdir: Path, step: int, validated: bool = True):
        """Open both; what an interrupted run wrote after `step` is dropped, since it will be written again.

        So is the validation of `step` unless it is `validated`.
        """
        self._first = jax.process_index() == 0
        if not self._first:
            return
        self.path = workdir / "metrics.jsonl"
        lines = read_json_lines(self.path) if self.path.exists() else []
        last = step if validated else step - 1
        kept = [x for x in lines if x["step"] <= (last if "validation_loss" in x else step)]
        with replaced(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  (open during the run)
        (workdir / "tensorboard").mkdir(exist_ok=True)
        # Without the thread of tensorboardX's SummaryWriter: an error of a full disk would not reach the run.
        self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
        if step:  # TensorBoard drops later steps of the previous file
            self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, **values: float) -> None:
        """Write the values of a step; raises OSError if the disk is full."""
        if not self._first:
            return
        self._file.write(json.dumps(finite({"step": step, **values}), allow_nan=False) + "\n")
        for name, value in values.items():
            event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """Close both files."""
        if self._first:
            for file in (self._file, self._events):
                with contextlib.suppress(OSError):  # `write` has raised it
                    file.close()
