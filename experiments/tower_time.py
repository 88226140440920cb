"""Time of a train step, two towers on two devices against one device: python -m experiments.tower_time --workdir DIR

The compact network with a tower on each of two devices, against the one-GPU network of footnote 2 (conv1 to conv4
halved) on one of them (section 3.2). A device of a CPU is a core here: two devices have two, and one device has one.
Each round times both, in alternating order, and the collectives of the first alone.
"""

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from matplotlib.figure import Figure

from alexnet_jax import sharding
from alexnet_jax.errors import UserError
from alexnet_jax.optimizer import learning_rate_at
from alexnet_jax.runtime.workers import available_cores
from alexnet_jax.setup import build_model, build_optimizer
from alexnet_jax.sharding import TOWER
from alexnet_jax.train_step import create_state, make_train_step
from experiments import ablations, measure, style
from experiments.claims import Claim, Finding
from experiments.command import save_figure
from experiments.comparison import compare_paired
from experiments.sharding.layouts import Layout
from experiments.sharding.theory import expected
from experiments.study import CHANNELS, CLASSES, Budget, Study, kernel_std, main

CLAIMS = (
    Claim("tower_time", "Two towers on two devices take slightly less time to train than the one-GPU network on one "
          "(3.2)", "“slightly less time”", math.log(0.95), ratio=True),
)  # fmt: skip
BATCH = 128  # images of a step, as in the paper
BUDGETS = {"full": Budget(100 * BATCH, 1), "reduced": Budget(20 * BATCH, 1)}  # of a round
SEEDS, REPEATS = 60, "rounds"  # 10 had a power of 0.39
CAPTION = "a: the times of every round. b: their ratios, below 1 if two towers are faster, with the geometric mean."
FORMS = {"towers": "two towers, two devices", "one_gpu": "one-GPU network, one device"}


def run(study: Study) -> dict[str, Any]:
    """Time both forms in `--seeds` rounds.

    Raises:
      UserError: fewer than two devices, or cores of a CPU, or a CPU without Linux.
    """
    cpu = jax.default_backend() == "cpu"
    devices = min(jax.device_count(), available_cores()) if cpu else jax.device_count()
    if devices < 2:
        raise UserError(f"there is one {'core' if cpu else 'GPU or TPU'}; expected two, one for each tower")
    if cpu and not hasattr(os, "sched_setaffinity"):
        raise UserError("the cores of one device cannot be fixed on this system; expected Linux, or two GPUs")
    configs = {"towers": study.config(), "one_gpu": study.config(**ablations.NETWORKS["one GPU"])}
    meshes = {"towers": sharding.make_mesh(data=1, tower=2), "one_gpu": sharding.one_device()}
    calls = {form: _train_step(config, meshes[form]) for form, config in configs.items()}
    side = configs["towers"].image_size
    model = build_model(configs["towers"], CLASSES)
    minimum = expected(Layout("tower", 1, 2), model, (side, side, CHANNELS), BATCH, 1, 2)
    gathered = [c.array_bytes for c in minimum if c.kind == "all-gather"]
    calls["collectives"] = _collectives(gathered, meshes["towers"])
    steps, start, rounds = max(1, study.budget.images // BATCH), time.monotonic(), []
    for number in study.seeds:
        order = list(calls) if number % 2 else list(calls)[::-1]
        seconds = {}
        for name in order:
            with on_one_core() if cpu and name == "one_gpu" else contextlib.nullcontext():
                seconds[name] = measure.seconds(calls[name], steps)
        rounds.append({"round": number, **{f"{name}_s": seconds[name] for name in calls}})
        times = ", ".join(f"{FORMS[form]} {1000 * seconds[form]:.1f} ms" for form in FORMS)
        print(f"round {number}: {times}", flush=True)
    study.seconds += time.monotonic() - start
    return {"batch": BATCH, "steps": steps, "received_bytes": sum(c.received for c in minimum), "rounds": rounds}


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Let all threads of this process share one core in this block; Linux."""
    cores = os.sched_getaffinity(0)

    def use(cores):
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread.name), cores)

    use({min(cores)})
    try:
        yield
    finally:
        use(cores)


def _compile(function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """Return the program of a jitted function, on a CPU without operations that are split over threads."""
    options = {"xla_cpu_multi_thread_eigen": False} if jax.default_backend() == "cpu" else None
    return function.lower(*arguments).compile(compiler_options=options)


def _train_step(config: ml_collections.ConfigDict, mesh: Mesh) -> Callable[[], Any]:
    """Return a function that trains one step on random images, which returns its metrics."""
    config.kernel_std = kernel_std(config)
    model, optimizer, side = build_model(config, CLASSES), build_optimizer(config), config.image_size
    batch, preprocess = measure.random_batch((side, side, CHANNELS), BATCH, CLASSES, mesh)
    rate = partial(learning_rate_at, base=config.learning_rate)
    state, key = create_state(model, optimizer, preprocess.image_shape, 0, mesh), jax.random.key(0)
    step = _compile(make_train_step(model, optimizer, preprocess, rate, mesh), state, batch, key)

    def call():
        nonlocal state
        state, metrics = step(state, batch, key)
        return metrics

    jax.block_until_ready(call())
    return call


def _collectives(gathered: list[int], mesh: Mesh) -> Callable[[], Any]:
    """Return a function that gathers float32 arrays of so many bytes over `tower`, and reduce-scatters them."""

    def communicate(arrays):
        whole = [lax.all_gather(x, TOWER, tiled=True) for x in arrays]
        return [lax.psum_scatter(x, TOWER, tiled=True) for x in whole]

    specs = PartitionSpec(TOWER)
    arrays = sharding.place([np.ones(size // 4, np.float32) for size in gathered], mesh, specs)
    function = jax.jit(jax.shard_map(communicate, mesh=mesh, in_specs=(specs,), out_specs=specs))
    program = _compile(function, arrays)
    jax.block_until_ready(program(arrays))
    return lambda: program(arrays)


def judge(records: dict[str, Any]) -> dict[str, Finding]:
    """Compare the logarithms of the times, paired by round."""
    times = {name: [r[f"{name}_s"] for r in records["rounds"]] for name in (*FORMS, "collectives")}
    towers, one_gpu, collectives = (1000 * statistics.median(x) for x in times.values())
    text = (
        f"{towers:.1f} ms a step with two towers, {one_gpu:.1f} ms with the one-GPU network (medians, batch "
        f"{records['batch']}; each device receives {records['received_bytes'] / 1e6:.1f} MB, whose collectives alone "
        f"take {collectives:.1f} ms); geometric mean of the rounds' ratios"
    )
    logarithms = (np.log(times[form]).tolist() for form in FORMS)
    return {"tower_time": Finding(text, compare_paired(*logarithms))}


@style.styled
def plot(records: dict[str, Any], path: Path) -> None:
    """Plot the times of every round, and their ratios with the mean and its interval."""
    rounds = [r["round"] for r in records["rounds"]]
    figure = Figure(figsize=(style.WIDTH, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
    labels = {**FORMS, "collectives": "of the first: collectives alone"}
    for (name, label), color in zip(labels.items(), (style.BLUE, style.ORANGE, style.GRAY), strict=True):
        left.plot(
            rounds, [1000 * r[f"{name}_s"] for r in records["rounds"]], "o-", markersize=3, color=color, label=label
        )
    left.set(xlabel="round", ylabel="ms a step", ylim=(0, None))
    comparison = judge(records)["tower_time"].comparison
    low, mean, high = (math.exp(comparison.difference + x) for x in (-comparison.noise, 0.0, comparison.noise))
    right.axhspan(low, high, color=style.BLUE, alpha=0.2, linewidth=0)
    right.axhline(mean, color=style.BLUE, label="mean, 95 % interval")
    right.axhline(1, color="black", linewidth=0.8)
    right.axhline(math.exp(CLAIMS[0].effect), color=style.GRAY, linestyle="--", label="5 % less")
    right.plot(rounds, [r["towers_s"] / r["one_gpu_s"] for r in records["rounds"]], "o", markersize=4, color=style.BLUE)
    right.set(xlabel="round", ylabel="two towers ÷ one-GPU network")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles = [handle for axes in (left, right) for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    style.label_panels([left, right])
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.modules[__name__])
