"""Several processes as one run: how they find each other, what they must agree on, and how one of them leaves."""

import json
import os
import sys
import threading
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed as _jax_distributed  # JAX has no public name for its key-value store
from jax.experimental import multihost_utils

HEARTBEAT_S = 30  # a process that has been silent for so long is dead, and ends the others
LEAVE_S = 5  # how long a process that ends on an error waits for others that end on the same one


class DistributedError(Exception):
    """Processes that cannot be one run; one line that says why."""


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: int = 300,
) -> None:
    """Joins the processes of a run: those given, or those that JAX detects; with neither, this process is alone.

    Must come before anything that starts JAX's backend.

    Args:
      coordinator_address: HOST:PORT of process 0, at which all meet.
      num_processes: how many there are; 1 alone asks for a run of one process on a cluster that JAX would detect.
      process_id: 0 to num_processes − 1, a different one in each process.
      timeout_s: for how long each waits for the rest; then it says so and ends this process.

    Raises:
      DistributedError: some of the three without the rest, or what JAX finds wrong with them or with the cluster.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if num_processes == 1 and coordinator_address is None and not process_id:
        return
    if 0 < len(missing) < len(given):
        raise DistributedError(
            f"{' and '.join(missing)} is missing: give all of {', '.join(given)}, or none of them on Slurm, Kubernetes "
            "or a TPU pod"
        )
    if not missing and not 0 <= process_id < num_processes:
        raise DistributedError(
            f"--process_id={process_id}: expected 0 to {num_processes - 1}, with --num_processes={num_processes}"
        )
    if not missing and not coordinator_address.rpartition(":")[2].isdigit():
        raise DistributedError(f"--coordinator_address={coordinator_address}: expected HOST:PORT")

    def give_up():  # JAX would abort, with a stack trace
        where = coordinator_address or "the address that JAX detected"
        print(
            f"Error: {timeout_s} s have passed and not all processes of this run have met at {where}; start all of "
            "them, with the same flags but for --process_id (--initialization_timeout is how long they wait)",
            flush=True,
        )
        os._exit(1)

    # Signals are this program's own: it agrees on the step at which all stop.
    jax.config.update("jax_enable_preemption_service", False)
    waiting = threading.Timer(timeout_s, give_up)
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id,
            cluster_detection_method="deactivate" if not missing else None,
            initialization_timeout=timeout_s + 60, heartbeat_timeout_seconds=HEARTBEAT_S, shutdown_timeout_seconds=60,
        )  # fmt: skip
    except Exception as error:  # each cluster has errors of its own
        if missing and isinstance(error, ValueError) and "coordinator_address" in str(error):
            return  # no flags, no cluster
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DistributedError(
            f"the processes of this run cannot be joined: {reason} (--num_processes=1 trains in this process alone)"
        ) from None
    finally:
        waiting.cancel()


def process_id() -> int:
    """This process's number, before the backend has started too; 0 without others."""
    return _jax_distributed.global_state.process_id


def differences(there: dict[str, Any], here: dict[str, Any], words: tuple[str, str]) -> str:
    """The names whose values differ, with both values and a word for each; "" if none does."""
    return "; ".join(
        f"{name}: {there.get(name)!r} {words[0]}, {here.get(name)!r} {words[1]}"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    )


def require_same(what: str, values: dict[str, Any], advice: str) -> None:
    """Returns if every process gives the same values, plain ones; uses no device, so a mesh need not fit yet.

    Args:
      what: names this comparison, the same in every process.

    Raises:
      DistributedError: they differ; the same line in every process, naming one that differs from process 0.
    """
    state = _jax_distributed.global_state
    if state.client is None or state.num_processes == 1:
        return
    key, milliseconds = f"alexnet_jax/{what}", 1000 * 2 * HEARTBEAT_S
    state.client.key_value_set(f"{key}/{state.process_id}", json.dumps(values))
    if state.process_id == 0:
        verdict = ""
        for other in range(1, state.num_processes):
            theirs = json.loads(state.client.blocking_key_value_get(f"{key}/{other}", milliseconds))
            if different := differences(json.loads(json.dumps(values)), theirs, ("in process 0", "there")):
                verdict = f"process {other} differs from process 0 in {what} ({different}); {advice}"
                break
        state.client.key_value_set(f"{key}/verdict", verdict)
    if verdict := state.client.blocking_key_value_get(f"{key}/verdict", milliseconds):
        raise DistributedError(verdict)


def highest(number: int) -> int:
    """The highest of the numbers that the processes give; every one must call it, and none goes on before all have."""
    if not jax.distributed.is_initialized():
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def from_first(number: int) -> int:
    """The number that process 0 gives; every process must call it."""
    if not jax.distributed.is_initialized():
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def leave(code: int) -> NoReturn:
    """Ends this process with an exit code, and without waiting long for others that may never end.

    Those that end on the same error meet here, so that process 0 does not pull the coordinator from under them.
    """
    client = _jax_distributed.global_state.client
    if client is None:
        sys.exit(code)
    try:
        client.wait_at_barrier("alexnet_jax/leave", 1000 * LEAVE_S)
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError:
        pass
    os._exit(code)  # JAX's own shutdown, at a usual exit, would wait for all and then abort
