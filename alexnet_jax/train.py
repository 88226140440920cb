"""The training run: state, step, loop, and what it leaves in its folder (section 5)."""

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from alexnet_jax import data, distributed, recipe, report, sharding, stream
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.data import Batch, DeviceData
from alexnet_jax.evaluate import Network, evaluate, in_batches
from alexnet_jax.model import OUTPUTS, AlexNet, activations
from alexnet_jax.optimizer import learning_rate_at, paper_sgd, plateau_update
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.stream import StreamedData
from alexnet_jax.train_step import TrainState, create_state, make_train_step

log = logging.getLogger(__name__)


class DivergedError(Exception):
    """The loss or the parameters are no longer finite."""

    def __init__(self, what: str, step: int, learning_rate: float):
        super().__init__(f"{what} at step {step}, with learning rate {learning_rate:.3g}")

    def add(self, kept: str) -> None:
        """Appends what was kept, and what to do."""
        advice = "lower config.learning_rate or raise config.warmup_steps, in another --workdir"
        self.args = (f"{self.args[0]}: {kept}; {advice}",)


class Interrupted(Exception):
    """SIGINT or SIGTERM; the state is saved."""

    def __init__(self, number: int, step: int, total: int):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} at step {step} of {total}, saved; the same command goes on")
        self.signal = number


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM into the list it yields; a second one acts as it always did."""
    received, before = [], {}

    def handle(number, frame):
        received.append(number)
        signal.signal(number, before[number])
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saves and stops; once more stops at once\n".encode())

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread (a notebook's worker): its owner handles signals
        pass
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains to the end, or goes on where an earlier call stopped, then tests once.

    With several processes (`distributed.start`) each calls this with the same arguments.

    Args:
      config: of `alexnet_jax.configs`.
      workdir: the run's folder; see README.md for what it will hold.

    Returns:
      The contents of `result.json`.

    Raises:
      recipe.ConfigError, data.DataError, checkpoint.CheckpointError, distributed.DistributedError, DivergedError: one
        line that says what to do.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    workdir, started = Path(workdir), time.monotonic()
    flags = {**recipe.plain(config), "workdir": str(workdir.absolute())}
    distributed.require_same("flags", flags, "start every process with the same")
    recipe.check_config(config)
    recipe.check_workdir(config, workdir)
    finished = (workdir / "result.json").exists()
    shared = f"--workdir={workdir} must be a folder that all machines share"
    distributed.require_same("what it finds", {"a finished run": finished}, shared)
    if finished:
        try:
            result = json.loads((workdir / "result.json").read_text())
        except ValueError:
            raise recipe.ConfigError(f"{workdir / 'result.json'} is not JSON; delete it to test once more") from None
        log.info("%s is finished; its result:\n\n%s", workdir, show_result(result))
        return result
    with _signals() as received:
        task = _set_up(config)
        with recipe.claimed_workdir(config, workdir):
            checkpoints = Checkpoints(workdir / "checkpoints")
            state = create_state(task.model, task.optimizer, task.preprocess.image_shape, config.seed, task.mesh)
            images_per_s = None
            if found := checkpoints.restore(state):
                _, state, extra = found
                started, images_per_s = started - extra["seconds"], extra["images_per_s"]
            _show_summary(config, task, state)
            if state.step < task.total_steps:
                state, images_per_s = _train(config, task, state, checkpoints, workdir, started, received)
            checkpoints.close()
            return _test(config, task, state, workdir, started, images_per_s)


class _Task(NamedTuple):
    """What a config and its data set make."""

    builder: Any
    sizes: dict[str, int]  # examples to train, validate, test
    train_data: DeviceData | StreamedData
    validation: Iterable[Batch]
    preprocess: Preprocess
    model: AlexNet
    optimizer: optax.GradientTransformationExtraArgs
    train_step: Callable
    total_steps: int
    mesh: Mesh


def _set_up(config: ml_collections.ConfigDict) -> _Task:
    mesh = recipe.build_mesh(config)
    builder = data.open_builder(config.dataset, config.data_dir, config.source_dir)
    sizes = {}
    for use, field in {"train": "train_split", "validate": "validation_split", "test": "test_split"}.items():
        try:
            sizes[use] = data.split_size(builder, config[field])
        except data.DataError as error:
            raise data.DataError(f"config.{field}: {error}") from None
    num_classes = builder.info.features["label"].num_classes
    if config.streaming:
        recipe.check_data(config, data.image_shape(builder), sizes["train"], num_classes)
        train_data = StreamedData(builder, config.train_split, config.batch_size, mesh, config.loader_workers)
        images = stream.images(builder, config.train_split, config.loader_workers)
    else:
        images, labels = data.load(builder, config.train_split)
        recipe.check_data(config, images.shape[1:], len(labels), num_classes)
        train_data = DeviceData(data.Examples(images, labels), config.batch_size, mesh)
    preprocess = recipe.build_preprocess(config, builder, images)
    model = recipe.build_model(config, num_classes)
    optimizer = paper_sgd(
        config.learning_rate, config.momentum, config.weight_decay, config.bias_rate, config.bias_decay
    )
    drops = tuple(round(epoch * train_data.steps_per_epoch) for epoch in config.drop_at_epochs)
    total = config.num_train_steps or max(1, round(config.num_epochs * train_data.steps_per_epoch))
    schedule = partial(
        learning_rate_at, base=config.learning_rate, warmup_steps=config.warmup_steps, drop_at=drops,
        linear_steps=total * config.linear_decay,
    )  # fmt: skip
    train_step = make_train_step(model, optimizer, preprocess, schedule, mesh)
    validation = in_batches(config, builder, config.validation_split, mesh)
    return _Task(builder, sizes, train_data, validation, preprocess, model, optimizer, train_step, total, mesh)


class _StepMetrics:
    """The metrics of the last steps, left on the device until they are shown."""

    def __init__(self, config, task, first: int, metrics: report.Metrics, progress: report.Progress):
        self.metrics, self.progress = metrics, progress
        self.batch_size, self.per_epoch = config.batch_size, task.train_data.steps_per_epoch
        self.total = task.total_steps
        self.pending, self.shown = [], first
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.monotonic()

    def add(self, values: dict[str, jax.Array]) -> None:
        self.pending.append(values)
        self.progress.advance()

    def show(self, step: int) -> None:
        """Waits for the steps before `step` and shows their means; raises DivergedError if a loss is not finite."""
        if not self.pending:
            return
        values = {k: np.array([float(m[k]) for m in self.pending]) for k in self.pending[0]}
        self.pending.clear()
        if (bad := ~np.isfinite(values["loss"])).any():
            i = int(bad.argmax())
            raise DivergedError(f"the loss is {values['loss'][i]}", self.shown + i + 1, values["learning_rate"][i])
        images_per_s = (step - self.shown) * self.batch_size / (time.monotonic() - self.clock)
        self.shown = step
        self.restart_clock()
        means = {k: float(v.mean()) for k, v in values.items()}
        self.metrics.write(
            step, epoch=step / self.per_epoch, train_loss=means["loss"], train_error=means["error"],
            learning_rate=float(values["learning_rate"][-1]), images_per_s=images_per_s,
        )  # fmt: skip
        self.progress.show(
            step, (self.total - step) * self.batch_size / images_per_s, loss=f"{means['loss']:.4f}",
            error=f"{100 * means['error']:.2f}%", images_per_s=f"{images_per_s:.0f}",
        )  # fmt: skip


@jax.jit
def _finite(params) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]))


def _train(config, task, state, checkpoints, workdir, started, received) -> tuple[TrainState, float]:
    """The loop, from the state's step to the end: the last state, and images/s."""
    first, total = int(state.step), task.total_steps
    order_key, step_key = jax.random.split(jax.random.wrap_key_data(state.key))
    eval_every = config.eval_every or task.train_data.steps_per_epoch
    metrics, progress = report.Metrics(workdir, first), report.Progress(total, first)
    shown = _StepMetrics(config, task, first, metrics, progress)
    # On all devices at once: moved there by the train step itself it costs the host half a millisecond.
    key_of = jax.jit(jax.random.fold_in, out_shardings=NamedSharding(task.mesh, sharding.REPLICATED))
    clock = time.monotonic()

    def images_per_s(step):
        return (step - first) * config.batch_size / (time.monotonic() - clock)

    def save(step):
        if not _finite(state.params):
            raise DivergedError("the parameters are not finite", step, float(values["learning_rate"]))
        checkpoints.save(step, state, {"seconds": time.monotonic() - started, "images_per_s": images_per_s(step)})

    try:
        for step in range(first, total):
            batch = task.train_data.batch(order_key, step)
            state, values = task.train_step(state, batch, key_of(step_key, step))
            if step == first:  # and compiled, which is not to go into the images/s
                shown.restart_clock()
            if step % config.log_every == 0:  # this step is queued already: the device does not wait for the reader
                shown.show(step)
            shown.add(values)
            done = step + 1
            if done % eval_every == 0 or done == total:
                shown.show(done)
                network = Network(task.model, state.params, task.preprocess)
                result = evaluate([network], task.validation, mesh=task.mesh)
                patience = config.plateau_patience or total + 1
                state = state.replace(plateau=plateau_update(state.plateau, jnp.float32(result.top1_error), patience))
                metrics.write(
                    done, validation_loss=result.loss, validation_top1_error=result.top1_error,
                    validation_top5_error=result.top5_error,
                )  # fmt: skip
                progress.say(
                    f"epoch {done / task.train_data.steps_per_epoch:.2f}  step {done}  "
                    f"validation error {100 * result.top1_error:.2f}%  loss {result.loss:.4f}  "
                    f"learning rate {float(values['learning_rate']):.2g}"
                )
                save(done)
                shown.restart_clock()
            number = received[0] if received else 0
            if jax.process_count() > 1:  # a signal may reach one process alone, so now and then they ask each other
                number = distributed.highest(number) if done % config.log_every == 0 else 0
            if number:
                shown.show(done)
                save(done)
                checkpoints.wait()
                raise Interrupted(number, done, total)
        checkpoints.wait()
    except DivergedError as error:
        checkpoints.wait()
        kept = checkpoints.newest()
        error.add(f"the checkpoint of step {kept} is kept" if kept is not None else "no checkpoint was written yet")
        raise
    finally:
        task.train_data.close()
        progress.close()
        metrics.close()
    return state, images_per_s(total)


def _test(config, task, state, workdir, started, images_per_s) -> dict[str, Any]:
    """Reads the test set, this once; process 0 writes the pictures and `result.json`."""
    batches = in_batches(config, task.builder, config.test_split, task.mesh, config.ten_crop)
    tested = evaluate([Network(task.model, state.params, task.preprocess)], batches, config.ten_crop, task.mesh)
    kernel = multihost_utils.process_allgather(state.params["conv1"]["kernel"], tiled=True)
    result = {
        "test_top1_error": tested.top1_error,
        "test_top5_error": tested.top5_error,
        "test_patches": 10 if config.ten_crop else 1,
        "lowest_validation_top1_error": float(state.plateau.best_error),
        "steps": task.total_steps,
        "seconds": round(time.monotonic() - started, 1),
        "images_per_s": round(images_per_s, 1),
        "device": device_name(task.mesh),
    }
    if jax.process_index() == 0:
        report.plot_filters(kernel, workdir / "filters.png", config.towers)
        labels = task.builder.info.features["label"].names
        report.plot_confusion(tested.confusion, labels, workdir / "confusion.png")
        report.plot_curves(workdir / "metrics.jsonl", workdir / "curves.png")
        report.write_json(workdir / "result.json", result)
    distributed.highest(0)  # the others leave when it is written
    log.info("\n%s\n\nWritten to %s", show_result(result), workdir)
    return result


def show_result(result: dict[str, Any]) -> str:
    """The final table."""
    percent = {k: f"{100 * v:.2f} %" for k, v in result.items() if k.endswith("_error")}
    return report.table([(k.replace("_", " "), str(percent.get(k, v))) for k, v in result.items()], ("result", "value"))


def _show_summary(config, task, state) -> None:
    image = jnp.zeros((1, *task.preprocess.image_shape), jnp.float32)
    shapes = jax.eval_shape(partial(activations, task.model), state.params, image)
    shapes = {name: shapes[name] for name in OUTPUTS if name in shapes}  # JAX sorts the names of a dict
    layers = report.layer_table(shapes, state.params)
    sizes = ", ".join(f"{size:,} to {use}" for use, size in task.sizes.items())
    shape = "×".join(map(str, task.preprocess.mean.shape))
    going_on = f"; going on after step {state.step:,}" if state.step else ""
    log.info(
        f"device     {device_name(task.mesh)}\n"
        f"data       {task.builder.info.full_name}: {sizes}; {shape}, {task.model.num_classes} classes\n"
        f"steps      {task.total_steps:,} of {config.batch_size} images ({task.train_data.steps_per_epoch} an epoch)"
        f"{going_on}\n\n{layers}\n"
    )


def device_name(mesh: Mesh) -> str:
    """The accelerators, or the CPU with the cores that this process may use."""
    device, layout = mesh.devices.flat[0], " × ".join(f"{size} {axis}" for axis, size in mesh.shape.items())
    if (count := jax.process_count()) > 1:
        layout += f", {count} processes"
    if device.platform == "cpu":
        return f"CPU, {len(os.sched_getaffinity(0))} cores, mesh {layout}"
    return f"{mesh.size} × {device.device_kind}, mesh {layout}"
