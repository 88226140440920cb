"""Train step and inference as compiled programs with their arguments, ready to be timed."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alexnet_jax import AlexNet, paper_sgd
from alexnet_jax.inference import jit_forward, predict
from alexnet_jax.train_step import create_state, make_train_step
from experiments import measure


class Call(NamedTuple):
    """A compiled program with its arguments on the device, and its cost."""

    run: Callable[[], Any]
    cost: dict[str, Any]  # flops, compile_s, program_bytes, donated_bytes
    text: Callable[[], str]  # of the compiled program


def _compile(traced: jax.stages.Traced) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    start = time.perf_counter()
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    return compiled, {"flops": measure.flops(traced), "compile_s": seconds, **measure.memory(compiled)}


def training_step(model: AlexNet, batch: int, shape: tuple[int, int, int]) -> Call:
    """Return the train step of `alexnet_jax.train` on one random batch of images [H, W, C]; a call is the next step."""
    data, preprocess = measure.random_batch(shape, batch, model.num_classes)
    optimizer, key = paper_sgd(), jax.random.key(1)
    state = create_state(model, optimizer, shape, 0)
    step = make_train_step(model, optimizer, preprocess, lambda step, plateau: jnp.float32(1e-4))
    compiled, cost = _compile(step.trace(state, data, key))

    def run():
        nonlocal state
        state, metrics = compiled(state, data, key)
        return state, metrics

    return Call(run, cost, compiled.as_text)


def inference(model: AlexNet, batch: int, shape: tuple[int, int, int]) -> Call:
    """Return the class probabilities of one random batch of images [H, W, C], on the center crop."""
    data, preprocess = measure.random_batch(shape, batch, model.num_classes)
    params = create_state(model, paper_sgd(), shape, 0).params
    function = jit_forward(lambda params, images: predict(model, params, images, preprocess, ten_crop=False))
    compiled, cost = _compile(function.trace(params, data.images))
    return Call(partial(compiled, params, data.images), cost, compiled.as_text)
