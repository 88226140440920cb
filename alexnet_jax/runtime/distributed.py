"""Several processes of one run: they connect, check that their values are the same, and exit."""

import json
import os
import sys
import threading
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed as _jax_distributed  # JAX has no public name for its key-value store
from jax.experimental import multihost_utils

from alexnet_jax.errors import UserError, one_line

HEARTBEAT_S = 30  # a process without a heartbeat for this long counts as lost, and the others exit
EXIT_TIMEOUT_S = 5  # how long a process that exits on an error waits for others that exit on the same one


class DistributedError(UserError):
    """Processes that cannot be one run."""


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout_s: int = 300,
) -> None:
    """Connect the processes of a run: those of the arguments, or those that JAX detects; otherwise this process alone.

    Call it before anything that starts JAX's backend.

    Args:
      coordinator_address: HOST:PORT of process 0, to which all connect.
      num_processes: their number; 1 without the other arguments: this process alone, even on a cluster.
      process_id: 0 to num_processes − 1, a different one in each process.
      timeout_s: how long each waits for the others before it prints an error and exits.

    Raises:
      DistributedError: only some of the three are given, or the processes cannot connect.
    """
    flags = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [flag for flag, value in flags.items() if value is None]
    if num_processes == 1 and coordinator_address is None and not process_id:
        return
    if 0 < len(missing) < len(flags):
        raise DistributedError(
            f"missing: {' and '.join(missing)}; give all of {', '.join(flags)}, or none of them on Slurm, Kubernetes "
            "or a TPU pod"
        )
    if not missing and not 0 <= process_id < num_processes:
        raise DistributedError(
            f"--process_id={process_id}: expected 0 to {num_processes - 1}, with --num_processes={num_processes}"
        )
    if not missing and not coordinator_address.rpartition(":")[2].isdigit():
        raise DistributedError(f"--coordinator_address={coordinator_address}: expected HOST:PORT")

    def give_up():  # JAX would abort, with a stack trace
        address = coordinator_address or "the address that JAX detected"
        print(
            f"Error: {timeout_s} s have passed and not all processes of this run have connected to {address}; start "
            "all of them, with the same flags except --process_id (--initialization_timeout sets how long they wait)",
            flush=True,
        )
        os._exit(1)

    # This program handles signals itself: it agrees on the step at which all processes stop.
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
    except Exception as error:  # of a type that depends on the cluster
        if missing and isinstance(error, ValueError) and "coordinator_address" in str(error):
            return  # no flags, no cluster
        raise DistributedError(
            f"the processes of this run cannot connect: {one_line(error, 300)} (--num_processes=1 trains in this "
            "process alone)"
        ) from None
    finally:
        waiting.cancel()


def process_id() -> int:
    """Return the number of this process, 0 if it is the only one; the backend need not have started."""
    return _jax_distributed.global_state.process_id


def differences(first: dict[str, Any], second: dict[str, Any], labels: tuple[str, str]) -> str:
    """Return the names whose values differ, with both values and a label for each; "" if none does."""
    return "; ".join(
        f"{name}: {first.get(name)!r} {labels[0]}, {second.get(name)!r} {labels[1]}"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    )


def require_same(what: str, values: dict[str, Any], advice: str) -> None:
    """Check that every process passes the same JSON values; needs no devices.

    Args:
      what: the name of this comparison, the same in every process.
      advice: the end of the error message.

    Raises:
      DistributedError: they differ; the same message in every process, naming one that differs from process 0.
    """
    state = _jax_distributed.global_state
    if state.client is None or state.num_processes == 1:
        return
    key, milliseconds = f"alexnet_jax/{what}", 1000 * 2 * HEARTBEAT_S
    state.client.key_value_set(f"{key}/{state.process_id}", json.dumps(values))
    if state.process_id == 0:
        verdict = ""
        for other in range(1, state.num_processes):
            other_values = json.loads(state.client.blocking_key_value_get(f"{key}/{other}", milliseconds))
            labels = ("in process 0", f"in process {other}")
            if different := differences(json.loads(json.dumps(values)), other_values, labels):
                verdict = f"process {other} differs from process 0 in {what} ({different}); {advice}"
                break
        state.client.key_value_set(f"{key}/verdict", verdict)
    if verdict := state.client.blocking_key_value_get(f"{key}/verdict", milliseconds):
        raise DistributedError(verdict)


def maximum(number: int) -> int:
    """Return the maximum of the processes' numbers; a barrier that every process must call."""
    if not jax.distributed.is_initialized():
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def total(arrays: Any) -> Any:
    """Return the sums of the processes' trees of NumPy arrays, in their own precision; every process must call it."""
    if not jax.distributed.is_initialized():
        return arrays

    def add(array):  # as bytes: JAX has no 64 bits here
        array = np.asarray(array)
        gathered = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), np.uint8))
        return np.ascontiguousarray(gathered).view(array.dtype).reshape(-1, *array.shape).sum(axis=0)

    return jax.tree.map(add, arrays)


def barrier() -> None:
    """Wait until every process has called this."""
    maximum(0)


def from_first(number: int) -> int:
    """Return the number of process 0; every process must call it."""
    if not jax.distributed.is_initialized():
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def exit_process(code: int) -> NoReturn:
    """Exit with a code, without waiting long for other processes that may never exit.

    Processes that exit on the same error wait for each other here, so that process 0 does not end the coordinator
    before the others have printed theirs.
    """
    client = _jax_distributed.global_state.client
    if client is None:
        sys.exit(code)
    try:
        client.wait_at_barrier("alexnet_jax/exit", 1000 * EXIT_TIMEOUT_S)
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError:
        pass
    os._exit(code)  # JAX's own shutdown at interpreter exit would wait for all and then abort
