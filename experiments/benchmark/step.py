"""Train step and inference by batch and dtype, in alternation with PyTorch where it is installed."""

import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp

from alexnet_jax.errors import UserError, one_line
from experiments import measure
from experiments.benchmark.layers import step_bytes
from experiments.benchmark.peer import Peer, differences, network
from experiments.benchmark.programs import Call, inference, training_step
from experiments.benchmark.report import agreement, case_line
from experiments.benchmark.setting import Setting

# Relative to the largest element of an array. Float32 and float64 may select different maxima of a pooling window, and
# so give different gradients.
TOLERANCE = {"logits": 1e-5, "gradients": 1e-2}


def run(setting: Setting) -> dict[str, Any]:
    """Measure training and inference over the batches and dtypes.

    Raises:
      UserError: the PyTorch that was named is missing, or no batch could be measured.
      ValueError: PyTorch does not compute the same.
    """
    result = {
        "shape": setting.shape, "rates": measure.rates(setting.dtypes, setting.rounds),
        "memory_bytes": measure.device_memory(), "cases": [],
    }  # fmt: skip
    peer = Peer(setting.torch_python)
    try:
        result["torch"] = peer.ask("version")
        if result["torch"]:
            result["differences"] = differences(peer, setting.model, setting.shape)
            print(agreement(result), flush=True)
            for name, difference in result["differences"].items():
                if not difference < TOLERANCE["logits" if name == "logits" else "gradients"]:
                    raise ValueError(f"{name} differs by {difference:.1e} of its largest element: not the same network")
        elif setting.torch_python != sys.executable:
            raise UserError(f"--torch-python={setting.torch_python} cannot import torch: {peer.last_error()}")
        else:
            print(f"Measured alone, without PyTorch: {peer.last_error()}", flush=True)
        for dtype in setting.dtypes:
            for batch in setting.batches:
                for which in ("training", "inference"):
                    if case := _case(setting, which, dtype, batch, peer if result["torch"] else None):
                        result["cases"].append(case)
                        print(case_line(case), flush=True)
        if not result["cases"]:
            raise UserError("--batches: no batch could be measured; give smaller ones")
        result["rates"] = measure.rates(setting.dtypes, setting.rounds, result["rates"])
    finally:
        peer.close()
    return result


def _case(setting: Setting, which: str, dtype: str, batch: int, peer: Peer | None) -> dict[str, Any] | None:
    """Return the record of one case; None if it fails, for example out of memory; the other cases are kept."""
    model, peak = setting.model.clone(dtype=jnp.dtype(dtype)), measure.Peak()
    try:
        call = (training_step if which == "training" else inference)(model, batch, setting.shape)
        measure.seconds(call.run, 1)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        print(f"{which} {dtype} batch {batch} failed: {one_line(error)}", flush=True)
        return None
    return {
        "pass": which, "dtype": dtype, "batch": batch, **call.cost,
        "bytes": step_bytes(model, batch, setting.shape)[which],
        **_alternate(call, peer, setting, batch, which, dtype), **peak.record(),
    }  # fmt: skip


def _torch_modes(setting: Setting, batch: int) -> dict[str, dict[str, bool]]:
    """Return PyTorch's modes by name; on a CPU, where compiling is slow, compiled ones at the largest batch only."""
    with_compiled = batch == setting.batches[-1] or jax.default_backend() != "cpu"
    return {
        ("compiled" if compiled else "eager") + (", channels-last" if channels_last else ""):
            {"compiled": compiled, "channels_last": channels_last}
        for compiled in ((False, True) if with_compiled and not setting.quick else (False,))
        for channels_last in (False, True)
    }  # fmt: skip


def _alternate(call: Call, peer: Peer | None, setting: Setting, batch: int, which: str, dtype: str) -> dict[str, Any]:
    """Return the median seconds of a call that has run once, from rounds that alternate with PyTorch's modes."""
    counts, times, errors = {"jax": measure.repeats(measure.seconds(call.run, 1))}, {"jax": []}, {}
    what = {"network": network(setting.model, setting.shape), "batch": batch, "dtype": dtype}
    what["train"] = which == "training"

    def request(ask, name, **what):
        answer = peer.ask(ask, name=name, **what) or {"error": peer.last_error()}
        if "error" in answer:
            errors[name] = answer["error"]
        return answer.get("seconds")

    for name, mode in _torch_modes(setting, batch).items() if peer else ():
        if seconds := request("open", name, **what, **mode):
            counts[name], times[name] = measure.repeats(seconds), []
    for _ in range(setting.rounds):
        for name, count in counts.items():
            if name == "jax":
                measure.seconds(call.run, 1)  # the first step after PyTorch's is slower
                times[name].append(measure.seconds(call.run, count))
            elif name not in errors and (seconds := request("time", name, steps=count)):
                times[name].append(seconds / count)
    if peer:
        peer.ask("close")
    medians = {name: statistics.median(each) for name, each in times.items() if name not in errors}
    return {
        "seconds": medians["jax"], "rounds_s": times["jax"], "images_per_s": batch / medians["jax"],
        "peers": [
            {"mode": name, "images_per_s": batch / seconds, "ratio": seconds / medians["jax"], "rounds_s": times[name]}
            for name, seconds in medians.items() if name != "jax"
        ],
        "peer_errors": errors,
    }  # fmt: skip
