"""The training loop (section 5): resuming, steps, validations and checkpoints."""

import contextlib
import logging
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding

from alexnet_jax import sharding
from alexnet_jax.checkpoint import CheckpointError, Checkpoints, newest_step
from alexnet_jax.config import as_json, check_config
from alexnet_jax.data.batch import Batch
from alexnet_jax.errors import UserError
from alexnet_jax.finetuning import check_fits, start_of, with_weights
from alexnet_jax.inference import Network, evaluate
from alexnet_jax.metrics import Metrics
from alexnet_jax.optimizer import plateau_update
from alexnet_jax.probe import is_probe, on_features
from alexnet_jax.progress import Progress
from alexnet_jax.report import final_test, result_table, run_summary
from alexnet_jax.runtime import distributed
from alexnet_jax.runtime.files import user_path
from alexnet_jax.runtime.jax_settings import run_settings
from alexnet_jax.runtime.signals import Signals, Stopped, collected_signals, raised_signals
from alexnet_jax.setup import Setup, setup
from alexnet_jax.train_step import TrainState, create_state, make_train_step
from alexnet_jax.weights.workdir import write_preprocess
from alexnet_jax.workdir import CHECKPOINTS, UNVALIDATED, check_config_matches, claimed, read_result

STEPS_IN_FLIGHT = 2  # steps that the device has yet to finish when the next is dispatched

log = logging.getLogger(__name__)


class DivergedError(UserError):
    """The loss or the parameters are no longer finite."""


class Interrupted(Exception):
    """SIGINT or SIGTERM stopped the run; `saved` names the step of the checkpoint that was saved, or is ""."""

    def __init__(self, number: int, saved: str = ""):
        where = f" at {saved}; checkpoint saved, " if saved else "; "
        super().__init__(f"stopped by {signal.Signals(number).name}{where}run the same command to resume")
        self.signal, self.saved = number, saved


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise Interrupted immediately in set-up and test, which have nothing to save."""
    try:
        with raised_signals():
            yield
    except Stopped as stop:
        raise Interrupted(stop.signal) from None


@run_settings()
def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start if there is none, to the last step; then test once.

    Each of several processes (`distributed.start`) calls this with the same arguments.

    Args:
      config: of `alexnet_jax.configs`.
      workdir: the run's working directory; docs/training.md lists its files.

    Returns:
      The contents of `result.json`.

    Raises:
      errors.UserError: a config, a working directory, a data set or a checkpoint that cannot be used; processes that
        differ; or a DivergedError.
      Interrupted: SIGINT or SIGTERM was received; in training, the checkpoint of the step is saved.
    """
    workdir, started = user_path(workdir, "--workdir"), time.monotonic()
    flags = {**as_json(config), "workdir": str(workdir.absolute())}
    distributed.require_same("flags", flags, "start every process with the same flags")
    with _interruptible():
        config, mean, weights = start_of(config, workdir)
    values = as_json(config)
    check_config(config)
    check_config_matches(values, workdir)
    if (result := read_result(workdir)) is not None:
        return _report(result, workdir)
    with _interruptible():
        run = setup(config, mean)
        if weights is not None:
            check_fits(run, weights)
        with claimed(workdir, values):
            if (result := read_result(workdir, " when it is locked")) is not None:  # another run has just finished
                return _report(result, workdir)
            if jax.process_index() == 0:
                write_preprocess(workdir, run.preprocess, run.dataset.class_names)
            checkpoints = Checkpoints(workdir / CHECKPOINTS)
            unvalidated = Checkpoints(workdir / UNVALIDATED, keep=1, others=(checkpoints.folder,))
            state = create_state(run.model, run.optimizer, run.preprocess.image_shape, run.seed, run.mesh, run.frozen)
            images_per_s = 0.0
            checkpoint, validated = _restore(checkpoints, unvalidated, state)
            if checkpoint:
                _, state, extra = checkpoint
                started, images_per_s = started - extra["seconds"], extra["images_per_s"]
            elif config.init:
                state = with_weights(state, run, config, weights)
            del weights  # the state has a copy
            log.info(run_summary(run, int(state.step)))
            if state.step < run.num_steps or not validated:
                trained = on_features(run, state.params) if is_probe(run) else run
                with collected_signals() as signals:
                    state, images_per_s = _train(
                        trained, state, validated, checkpoints, unvalidated, workdir, started, images_per_s, signals
                    )
            checkpoints.close()
            unvalidated.close()
            if jax.process_index() == 0:
                shutil.rmtree(workdir / UNVALIDATED, ignore_errors=True)
            return final_test(run, state, workdir, started, images_per_s)


def _restore(checkpoints: Checkpoints, unvalidated: Checkpoints, like: TrainState) -> tuple[Any, bool]:
    """Return the newest checkpoint, or None, and whether its validation is done."""
    if unvalidated.newest() > checkpoints.newest():
        with contextlib.suppress(CheckpointError):  # it is renamed, with a warning
            return unvalidated.restore(like), False
    return checkpoints.restore(like), True


def _report(result: dict[str, Any], workdir: Path) -> dict[str, Any]:
    log.info("%s is finished; its result:\n\n%s", workdir, result_table(result))
    return result


class _StepMetrics:
    """The metrics of the last steps, which stay on the device until they are shown, and the speed of all steps.

    The clock is restarted after compilation, validation and saving, so the speed is that of the steps alone.
    """

    def __init__(self, run: Setup, first: int, metrics: Metrics, progress: Progress):
        self.run, self.metrics, self.progress = run, metrics, progress
        self.pending: list[dict[str, jax.Array]] = []
        self.in_flight: deque[jax.Array] = deque()
        self.first = self.shown = first
        self.seconds = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.monotonic()

    def add(self, values: dict[str, jax.Array]) -> None:
        """Add the metrics of a step, and wait for the step `STEPS_IN_FLIGHT` before it, which frees its batch."""
        self.pending.append(values)
        self.in_flight.append(values["loss"])
        if len(self.in_flight) > STEPS_IN_FLIGHT:
            self.in_flight.popleft().block_until_ready()
        self.progress.advance()

    def show(self, step: int) -> None:
        """Wait for the steps before `step` and show their means; raises DivergedError if a loss is not finite."""
        if not self.pending:
            return
        values = {k: np.array([float(m[k]) for m in self.pending]) for k in self.pending[0]}
        self.pending.clear()
        if (diverged := ~np.isfinite(values["loss"])).any():
            i = int(diverged.argmax())
            raise _diverged(f"the loss is {values['loss'][i]}", self.shown + i + 1, values["learning_rate"][i])
        seconds = time.monotonic() - self.clock
        images_per_s = (step - self.shown) * self.run.batch_size / seconds
        self.seconds += seconds
        self.shown = step
        self.restart_clock()
        means = {k: float(v.mean()) for k, v in values.items()}
        self.metrics.write(
            step, epoch=step / self.run.train_data.steps_per_epoch, train_loss=means["loss"],
            train_error=means["error"], learning_rate=float(values["learning_rate"][-1]), images_per_s=images_per_s,
        )  # fmt: skip
        self.progress.show(
            step, (self.run.num_steps - step) * self.run.batch_size / images_per_s, loss=f"{means['loss']:.4f}",
            error=f"{100 * means['error']:.2f}%", images_per_s=f"{images_per_s:.0f}",
        )  # fmt: skip

    def images_per_s(self) -> float | None:
        """Return the mean images/s of the steps that were shown, None if there are none."""
        return (self.shown - self.first) * self.run.batch_size / self.seconds if self.seconds else None


def _diverged(what: str, step: int, learning_rate: float) -> DivergedError:
    return DivergedError(f"{what} at step {step}, with learning rate {learning_rate:.3g}")


@jax.jit
def _finite(params) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]))


def _train(
    run: Setup, state: TrainState, validated: bool, checkpoints: Checkpoints, unvalidated: Checkpoints, workdir: Path,
    started: float, last_images_per_s: float, signals: Signals,
) -> tuple[TrainState, float]:  # fmt: skip
    """Train from the state's step to the last; return the last state and the images/s of these steps alone.

    The state is saved before each validation, in `unvalidated`, and after it, with the updated learning-rate decay, in
    `checkpoints`. A run that stops between the two starts with the validation when it is resumed. A signal ends the
    run after the current step, and at once in the validation and in the first step, which have nothing to save.

    Args:
      validated: whether the validation of the first state is done.
      last_images_per_s: images/s before the first state, returned if no step is left.
    """
    first, total = int(state.step), run.num_steps
    alone = jax.process_count() == 1  # one of several processes may not stop at once
    train_step = make_train_step(run.model, run.optimizer, run.preprocess, run.learning_rate, run.mesh, run.frozen)
    order_key, step_key = jax.random.split(jax.random.wrap_key_data(state.key))
    metrics, progress = Metrics(workdir, first, validated), Progress(total, first)
    shown = _StepMetrics(run, first, metrics, progress)
    # Replicated here: if the train step moved the key to all devices, the host would wait for it.
    key_of = jax.jit(jax.random.fold_in, out_shardings=NamedSharding(run.mesh, sharding.REPLICATED))

    def images_per_s() -> float:
        return shown.images_per_s() or last_images_per_s

    def save(step: int, folder: Checkpoints = checkpoints) -> None:
        if not _finite(state.params):
            raise _diverged("the parameters are not finite", step, float(values["learning_rate"]))
        folder.save(step, state, {"seconds": time.monotonic() - started, "images_per_s": images_per_s()})

    def stop(number: int, step: int) -> NoReturn:
        shown.show(step)
        save(step)
        checkpoints.wait()
        raise Interrupted(number, f"step {step} of {total}")

    def next_batch(step: int) -> Batch:
        try:
            with signals.raised() if alone and step > first else contextlib.nullcontext():  # the workers may be slow
                return run.train_data.batch(order_key, step)
        except Stopped:
            if not signals:
                raise
            stop(signals[0], step)

    try:
        if not validated:
            values = {"learning_rate": run.learning_rate(state.step - 1, state.plateau)}  # of the last step
            state = _validate(run, state, first, float(values["learning_rate"]), metrics, progress)
            save(first)
        for step in range(first, total):
            with raised_signals() if alone and step == first else contextlib.nullcontext():  # the first step compiles
                batch = next_batch(step)
                state, values = train_step(state, batch, key_of(step_key, step))
            if step == first:  # images/s do not include the compilation
                shown.restart_clock()
            if step % run.log_every == 0:  # this step is dispatched, so reading earlier metrics leaves no device idle
                shown.show(step)
            shown.add(values)
            done = step + 1
            if done % run.eval_every == 0 or done == total:
                shown.show(done)
                save(done, unvalidated)
                unvalidated.wait()
                state = _validate(run, state, done, float(values["learning_rate"]), metrics, progress)
                save(done)
                shown.restart_clock()
            number = signals[0] if signals else 0
            if jax.process_count() > 1:  # one process alone may have received the signal
                number = distributed.maximum(number) if done % run.log_every == 0 else 0
            if number:
                stop(number, done)
        checkpoints.wait()
    except DivergedError as error:
        checkpoints.wait()
        newest = newest_step(workdir / CHECKPOINTS)
        kept = "there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest} is kept"
        raise DivergedError(
            f"{error}: {kept}; lower config.learning_rate or raise config.warmup_steps, in another --workdir"
        ) from None
    finally:
        run.train_data.close()
        progress.close()
        metrics.close()
    return state, images_per_s()


def _validate(
    run: Setup, state: TrainState, step: int, learning_rate: float, metrics: Metrics, progress: Progress
) -> TrainState:
    """Evaluate on the validation set, and return the state with the schedule updated by the error."""
    with raised_signals() if jax.process_count() == 1 else contextlib.nullcontext():
        result = evaluate([Network(run.model, state.params, run.preprocess)], run.validation_data, mesh=run.mesh)
    metrics.write(
        step, validation_loss=result.loss, validation_top1_error=result.top1_error,
        validation_top5_error=result.top5_error,
    )  # fmt: skip
    progress.print(
        f"epoch {step / run.train_data.steps_per_epoch:.2f}  step {step}  "
        f"validation error {100 * result.top1_error:.2f}%  loss {result.loss:.4f}  learning rate {learning_rate:.2g}"
    )
    patience = run.plateau_patience or run.num_steps + 1
    return state.replace(plateau=plateau_update(state.plateau, jnp.float32(result.top1_error), patience))
