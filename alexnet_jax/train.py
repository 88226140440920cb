"""The training run: state, step, loop, and what it leaves in its folder (section 5)."""

import contextlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from alexnet_jax import data, report
from alexnet_jax.checkpoint import Checkpoints
from alexnet_jax.evaluate import evaluate
from alexnet_jax.model import OUTPUTS, VARIANTS, AlexNet, Stem, activations
from alexnet_jax.optimizer import (
    Plateau,
    cross_entropy,
    learning_rate_at,
    paper_sgd,
    plateau_init,
    plateau_update,
)
from alexnet_jax.preprocess import Preprocess, fit

log = logging.getLogger(__name__)

UNRELATED_TO_RESULT = ("data_dir", "source_dir")  # may change between the starts of one run


class ConfigError(Exception):
    """A config that cannot work; one line with the field, what it got and what it takes."""


class DivergedError(Exception):
    """The loss or the parameters are no longer finite."""


class Interrupted(Exception):
    """SIGINT or SIGTERM; the state is saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes in training, and all that a checkpoint needs."""

    step: jax.Array  # updates done; with the seed it also gives the position in the data
    params: Any
    opt_state: Any
    plateau: Plateau
    key: jax.Array  # raw data of the run's key


class Batch(NamedTuple):
    images: jax.Array  # uint8 [B, H, W, C]
    labels: jax.Array  # int32 [B]


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for a value that no data set could make right."""

    def require(name, good, takes):
        if not good:
            raise ConfigError(f"config.{name}={config[name]!r}: expected {takes}")

    for name in ("batch_size", "image_size", "log_every"):
        require(name, config[name] >= 1, "a number of at least 1")
    for name in ("num_train_steps", "pad", "resize", "warmup_steps", "plateau_patience", "eval_every"):
        require(name, config[name] >= 0, "0 or more")
    require("seed", 0 <= config.seed < 2**32, "0 to 2³²−1")
    require("num_epochs", config.num_epochs > 0 or config.num_train_steps, "more than 0")
    require("learning_rate", 0 < config.learning_rate < math.inf, "a positive number")
    require("momentum", 0 <= config.momentum < 1, "at least 0 and below 1")
    require("weight_decay", 0 <= config.weight_decay < math.inf, "0 or more")
    require("input_scale", 0 < config.input_scale < math.inf, "a positive number")
    require("variant", config.variant in VARIANTS, f"one of {', '.join(VARIANTS)}")
    require("dtype", config.dtype in ("float32", "bfloat16"), "float32 or bfloat16")
    integers = lambda values: all(isinstance(v, int) for v in values)  # noqa: E731
    numbers = lambda values: all(isinstance(v, int | float) and v > 0 for v in values)  # noqa: E731
    stem_takes = "(kernel, stride, padding), with kernel and stride at least 1"
    require("stem", len(config.stem) == 3 and integers(config.stem) and min(config.stem[:2]) >= 1
            and config.stem[2] >= 0, stem_takes)  # fmt: skip
    require("widths", len(config.widths) == 7 and integers(config.widths)
            and all(w >= 2 and w % 2 == 0 for w in config.widths),
            "seven even numbers (conv1 to conv5, fc6, fc7)")  # fmt: skip
    require("kernel_std", len(config.kernel_std) in (0, 8) and numbers(config.kernel_std),
            "eight positive numbers (conv1 to fc8), or none")  # fmt: skip
    require("drop_at_epochs", numbers(config.drop_at_epochs), "positive numbers of epochs")


def check_data(config: ml_collections.ConfigDict, shape: tuple[int, ...], examples: int) -> None:
    """Raises ConfigError for a value that does not suit the images [H, W, C] or the size of the training set."""
    if config.batch_size > examples:
        raise ConfigError(
            f"config.batch_size={config.batch_size}: the training split has {examples:,} examples; expected no more"
        )
    side = min(shape[:2]) + 2 * config.pad
    if config.image_size > side:
        raise ConfigError(
            f"config.image_size={config.image_size}: the images are {shape[0]}×{shape[1]} with a border of "
            f"{config.pad}; expected at most {side} (or a larger config.pad; config.resize enlarges)"
        )
    if config.lighting and shape[2] != 3:
        raise ConfigError(
            f"config.lighting=True: {config.dataset} has {shape[2]} channel(s); PCA lighting needs three; set it to "
            "False for grey images"
        )
    seen = config.resize or config.image_size
    try:
        jax.eval_shape(build_model(config, 10).init, jax.random.key(0), jnp.zeros((1, seen, seen, shape[2])))
    except ValueError as error:
        field = "resize" if config.resize else "image_size"
        raise ConfigError(f"config.{field}={seen}: {error}") from None


def build_model(config: ml_collections.ConfigDict, num_classes: int) -> AlexNet:
    """The network that a config describes."""
    return AlexNet(
        num_classes=num_classes,
        variant=config.variant,
        dtype=jnp.dtype(config.dtype),
        stem=Stem(*config.stem),
        widths=tuple(config.widths),
        kernel_std=tuple(config.kernel_std) or None,
    )


def create_state(
    model: AlexNet, optimizer: optax.GradientTransformation, shape: tuple[int, ...], seed: int
) -> TrainState:
    """The state before the first step; `shape` is [H, W, C] of what the network sees."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = jax.jit(model.init)(init_key, jnp.zeros((1, *shape)))["params"]
    return TrainState(jnp.int32(0), params, optimizer.init(params), plateau_init(), jax.random.key_data(run_key))


def make_train_step(
    model: AlexNet,
    optimizer: optax.GradientTransformationExtraArgs,
    preprocess: Preprocess,
    learning_rate: Callable[[jax.Array, Plateau], jax.Array],
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """One update as a jitted function of (state, batch, key); the state is donated.

    The key is the step's own: augmentation and dropout draw from it. The metrics are those of the batch before the
    update: loss, top-1 error, and the learning rate.
    """

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch, key: jax.Array):
        image_key, dropout_key = jax.random.split(key)
        images = preprocess.train(image_key, batch.images)

        def loss_fn(params):
            logits = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_key})
            return cross_entropy(logits, batch.labels), logits

        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        rate = learning_rate(state.step, state.plateau)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, learning_rate=rate)
        params = optax.apply_updates(state.params, updates)
        error = jnp.mean(jnp.argmax(logits, axis=-1) != batch.labels)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {"loss": loss, "error": error, "learning_rate": rate}

    return train_step


class DeviceData:
    """A small data set as arrays on the device; an epoch is a permutation of it, and costs no host copy."""

    def __init__(self, examples: data.Examples, batch_size: int):
        self.images, self.labels = jnp.asarray(examples.images), jnp.asarray(examples.labels)
        self.batch_size = batch_size
        self.steps_per_epoch = len(examples.labels) // batch_size  # what is left over comes up in another epoch
        self._epoch, self._order = -1, None

    def batch(self, key: jax.Array, step: int) -> Batch:
        """The batch of a step: a function of the run's key and the step alone."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, _permutation(key, epoch, len(self.labels))
        return _take(self.images, self.labels, self._order, place * self.batch_size, self.batch_size)


@partial(jax.jit, static_argnums=2)
def _permutation(key, epoch, size):
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


@partial(jax.jit, static_argnums=4)
def _take(images, labels, order, start, size):
    chosen = jax.lax.dynamic_slice(order, (start,), (size,))
    return Batch(images[chosen], labels[chosen])


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM into the list it yields; a second one acts as it always did."""
    received, before = [], {}

    def handle(number, frame):
        received.append(number)
        signal.signal(number, before[number])

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


def _open_workdir(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Creates the folder, or checks that the run in it has this config."""
    wanted = json.loads(config.to_json_best_effort())
    path = workdir / "config.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError:
            raise ConfigError(f"{path} is not JSON; restore it, or train into another --workdir") from None
        fields = [k for k in sorted({*wanted, *found}) if k not in UNRELATED_TO_RESULT]
        fields = [k for k in fields if found.get(k) != wanted.get(k)]
        differing = [f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in fields]
        if differing:
            raise ConfigError(
                f"--workdir={workdir} holds a run of another config ({'; '.join(differing)}); give the same config, or "
                "another --workdir"
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        report.write_json(path, wanted)
    except OSError as error:
        raise ConfigError(f"--workdir={workdir} cannot be written: {error}") from None


def _finished(workdir: Path) -> dict[str, Any] | None:
    path = workdir / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def show_result(result: dict[str, Any]) -> str:
    """The final table."""
    percent = {k: f"{100 * v:.2f} %" for k, v in result.items() if k.endswith("_error")}
    return report.table([(k.replace("_", " "), str(percent.get(k, v))) for k, v in result.items()], ("result", "value"))


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains to the end, or goes on where an earlier call stopped, then tests once.

    Args:
      config: of `alexnet_jax.configs`.
      workdir: the run's folder; see README.md for what it will hold.

    Returns:
      The contents of `result.json`.

    Raises:
      ConfigError, data.DataError, checkpoint.CheckpointError, DivergedError: each with one line that says what to do.
      Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    with _signals() as received:
        return _Run(config, Path(workdir), received).result()


class _Run:
    def __init__(self, config, workdir, received):
        self.config, self.workdir, self.received = config, workdir, received

    def result(self):
        c = self.config
        check_config(c)
        start = time.monotonic()
        if (self.workdir / "config.json").exists():
            _open_workdir(c, self.workdir)
            if done := _finished(self.workdir):
                log.info("%s is finished; its result:\n\n%s", self.workdir, show_result(done))
                return done
        builder = data.open_builder(c.dataset, c.data_dir, c.source_dir)
        test_size = data.split_size(builder, c.test_split)
        train_set = data.load(builder, c.train_split)
        validation_set = data.load(builder, c.validation_split)
        check_data(c, train_set.images.shape[1:], len(train_set.labels))
        _open_workdir(c, self.workdir)
        names = builder.info.features["label"].names

        preprocess = fit(train_set.images, c.pad, c.image_size, c.resize, c.flip, c.lighting, c.input_scale)
        model = build_model(c, len(names))
        optimizer = paper_sgd(c.momentum, c.weight_decay)
        train_data = DeviceData(train_set, c.batch_size)
        validation = jax.tree.map(jnp.asarray, validation_set)
        per_epoch = train_data.steps_per_epoch
        total = c.num_train_steps or max(1, round(c.num_epochs * per_epoch))
        drops = tuple(round(e * per_epoch) for e in c.drop_at_epochs)
        train_step = make_train_step(
            model, optimizer, preprocess,
            lambda step, plateau: learning_rate_at(step, plateau, c.learning_rate, c.warmup_steps, drops),
        )  # fmt: skip

        state = create_state(model, optimizer, preprocess.image_shape, c.seed)
        checkpoints = Checkpoints(self.workdir / "checkpoints")
        seconds_before = 0.0
        if found := checkpoints.restore(state):
            _, state, extra = found
            state = jax.tree.map(jnp.asarray, state)
            seconds_before = extra["seconds"]
        first = int(state.step)
        self._summary(model, state, preprocess, builder, train_set, validation_set, test_size, first, total, per_epoch)

        run_key = jax.random.wrap_key_data(state.key)
        order_key, step_key = jax.random.split(run_key)
        eval_every = c.eval_every or per_epoch
        metrics = report.Metrics(self.workdir, first)
        progress = report.Progress(total, first)
        pending, shown, shown_at, trained = [], first, time.monotonic(), time.monotonic()
        saved = first if found else -1

        def seconds():
            return seconds_before + time.monotonic() - start

        def save(step):
            nonlocal saved
            if step == saved:
                return
            if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.params)):
                raise DivergedError(self._diverged("the parameters are", step, float(rate), saved))
            checkpoints.save(step, state, {"seconds": seconds()})
            saved = step

        def flush(step):
            """Reads the metrics of the steps before `step`, and shows them."""
            nonlocal shown, shown_at
            if not pending:
                return
            values = {k: np.array([float(m[k]) for m in pending]) for k in pending[0]}
            pending.clear()
            bad = ~np.isfinite(values["loss"])
            if bad.any():
                i = int(bad.argmax())
                what = f"the loss is {values['loss'][i]}"
                checkpoints.wait()
                raise DivergedError(self._diverged(what, shown + i + 1, values["learning_rate"][i], saved))
            now = time.monotonic()
            rate = (step - shown) * c.batch_size / (now - shown_at)
            left = (total - step) * c.batch_size / rate
            shown, shown_at = step, now
            means = {k: float(v.mean()) for k, v in values.items()}
            metrics.write(step, epoch=step / per_epoch, train_loss=means["loss"], train_error=means["error"],
                          learning_rate=float(values["learning_rate"][-1]), images_per_s=rate)  # fmt: skip
            progress.show(step, left, loss=f"{means['loss']:.4f}", error=f"{100 * means['error']:.2f}%",
                          images_per_s=f"{rate:.0f}")  # fmt: skip

        rate = jnp.float32(c.learning_rate)
        try:
            for step in range(first, total):
                batch = train_data.batch(order_key, step)
                state, values = train_step(state, batch, jax.random.fold_in(step_key, step))
                # Read only what an earlier step has left, so that the device always has the next step queued.
                if pending and step % c.log_every == 0:
                    flush(step)
                pending.append(values)
                rate = values["learning_rate"]
                progress.advance()
                done = step + 1
                if done % eval_every == 0 or done == total:
                    flush(done)
                    result = evaluate(model, state.params, *validation, preprocess)
                    state = state.replace(plateau=plateau_update(
                        state.plateau, jnp.float32(result.top1_error), c.plateau_patience or total + 1))  # fmt: skip
                    metrics.write(done, validation_loss=result.loss, validation_top1_error=result.top1_error,
                                  validation_top5_error=result.top5_error)  # fmt: skip
                    progress.say(
                        f"epoch {done / per_epoch:.2f}  step {done}  validation error {100 * result.top1_error:.2f}%  "
                        f"loss {result.loss:.4f}  learning rate {float(rate):.2g}"
                    )
                    save(done)
                    shown_at = time.monotonic()
                if self.received:
                    flush(done)
                    save(done)
                    checkpoints.wait()
                    name = signal.Signals(self.received[0]).name
                    message = f"stopped by {name} at step {done} of {total}, saved; the same command goes on"
                    raise Interrupted(self.received[0], message)
            checkpoints.wait()
        finally:
            progress.close()
            metrics.close()
        trained = time.monotonic() - trained

        test_set = data.load(builder, c.test_split)
        tested = evaluate(model, state.params, *map(jnp.asarray, test_set), preprocess, c.ten_crop)
        report.plot_filters(state.params["conv1"]["kernel"], self.workdir / "filters.png")
        report.plot_confusion(tested.confusion, names, self.workdir / "confusion.png")
        report.plot_curves(metrics.path, self.workdir / "curves.png")
        checkpoints.close()
        result = {
            "test_top1_error": tested.top1_error,
            "test_top5_error": tested.top5_error,
            "test_patches": 10 if c.ten_crop else 1,
            "validation_top1_error": float(state.plateau.best_error),
            "steps": total,
            "seconds": round(seconds(), 1),
            "images_per_s": round((total - first) * c.batch_size / trained, 1) if total > first else None,
            "device": _device(),
        }
        report.write_json(self.workdir / "result.json", result)
        log.info("\n%s\n\nWritten to %s", show_result(result), self.workdir)
        return result

    def _diverged(self, what, step, rate, saved):
        kept = f"the checkpoint of step {saved} is kept" if saved >= 0 else "no checkpoint was written yet"
        return (
            f"{what} not finite at step {step}, with learning rate {rate:.3g}: {kept}; lower config.learning_rate or "
            "raise config.warmup_steps, in another --workdir"
        )

    def _summary(
        self, model, state, preprocess, builder, train_set, validation_set, test_size, first, total, per_epoch
    ):
        image = jnp.zeros((1, *preprocess.image_shape), jnp.float32)
        shapes = jax.eval_shape(partial(activations, model), state.params, image)
        outputs = {name: shapes[name] for name in OUTPUTS}  # JAX sorts the names of a dict
        height, width, channels = train_set.images.shape[1:]
        log.info(
            "device     %s\ndata       %s: %s to train, %s to validate, %s to test; %d×%d×%d, %d classes\n"
            "steps      %s of %d images (%d an epoch)%s\n\n%s\n",
            _device(), builder.info.full_name, f"{len(train_set.labels):,}", f"{len(validation_set.labels):,}",
            f"{test_size:,}", height, width, channels, model.num_classes, f"{total:,}", self.config.batch_size,
            per_epoch, f"; going on after step {first:,}" if first else "", report.layer_table(outputs, state.params),
        )  # fmt: skip


def _device() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} × {device.device_kind}"
    return f"CPU, {len(os.sched_getaffinity(0))} cores"
