"""Check each operation and the network on this device: python -m experiments.on_gpu.correctness --workdir DIR

All are compared with the float64 NumPy of tests/reference.py, forward and gradient, in float32 and in bfloat16.
Float32 is checked with `jax.default_matmul_precision("highest")` and with JAX's default, which is TF32 on a recent
NVIDIA GPU. DIR/correctness.json holds a record for each array that was compared, and the memory of the real train
step; DIR/train_step.hlo.txt.gz is that step's HLO, optimized for this device. The exit status is 1 if a check failed.
"""

import argparse
import concurrent.futures
import gzip
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from alexnet_jax import (
    AlexNet,
    Stem,
    activations,
    cross_entropy,
    dropout,
    local_response_norm,
    max_pool,
    ops,
    paper_sgd,
    pca_lighting,
    random_crop,
    random_flip,
    spatial_response_norm,
)
from alexnet_jax.runtime.files import write_json

sys.path.append(str(Path(__file__).parents[2] / "tests"))
import reference

LRN = (2.0, 5, 1e-4, 0.75)
SPATIAL_NORM = (5, 0.001, 0.75, 1.0)
CASES = (("float32", "highest"), ("float32", "default"), ("bfloat16", "default"))

# The largest norm of a difference, relative to that of the reference, where u is the relative rounding of one number
# in the product's or the result's dtype: 2^-24 in float32, 2^-11 in TF32, 2^-9 in bfloat16.
# - An operation rounds its two inputs and its result: 4 u; its sums are float32's: 1e-5.
# - Eight layers in a row, with errors that are independent: about four times that.
# - A network's gradient passes n ReLUs and poolings. Rounding changes a sign or a window's maximum at a few u of the
#   elements, whose gradient is then lost or moves to another element: 3 √(n u). One of the 70,000 positive maxima of
#   pool1 alone changes the norm by √(2 / 70,000): 1e-2 in any case.


def operation_tolerance(u: float) -> float:
    return 4 * u + 1e-5


def network_tolerance(u: float) -> float:
    return 4 * operation_tolerance(u)


# How many ReLUs and poolings a gradient passes on its way from the loss to a layer's parameters.
PASSED = {"fc8": 0, "fc7": 1, "fc6": 2, "conv5": 4, "conv4": 5, "conv3": 6, "conv2": 8, "conv1": 10}


def gradient_tolerance(layer: str, u: float) -> float:
    n = PASSED[layer]
    return network_tolerance(u) + (3 * (n * u) ** 0.5 + 1e-2 if n else 0.0)


def exact(u: float) -> float:
    return 0.0


def rounding(dtype: str, precision: str, products: bool) -> float:
    """Return u of a check's dtype, and of its products' precision if it has any."""
    if dtype == "bfloat16":
        return 2.0**-9
    default = {"gpu": 2.0**-11, "tpu": 2.0**-9}.get(jax.default_backend(), 2.0**-24)
    return default if products and precision == "default" else 2.0**-24


class Check(NamedTuple):
    """An operation with arguments, and the expected results.

    Attributes:
      operation: a jittable function of the arguments that returns {name: array}.
      oracle: a function without arguments that returns the expected results, NumPy arrays in float64.
      arguments: NumPy arrays, trees of them, or JAX keys.
      tolerance: for each name a function of u that returns the largest error; "" is for the other names.
      products: whether it contains matrix products, whose precision is then varied.
      dtypes: the dtypes in which it is checked.
      cast: whether floating-point arguments are cast to that dtype.
    """

    name: str
    operation: Callable[..., dict[str, Any]]
    oracle: Callable[[], dict[str, Any]]
    arguments: tuple
    tolerance: dict[str, Callable[[float], float]] = {"": operation_tolerance}
    products: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    cast: bool = True

    def cases(self) -> list[tuple[str, str]]:
        """Return the (dtype, precision) to check; without products the precision changes nothing."""
        return [(d, p) for d, p in CASES if d in self.dtypes and (self.products or p == "default")]


class Setting(NamedTuple):
    """The network whose layers are checked, the side of its images, its batch, and the batch of the train step."""

    model: AlexNet
    side: int
    batch: int
    train_batch: int


def run_case(check: Check, dtype: str, precision: str, oracle: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a record for each array that the operation returns; `oracle` is called after it has run."""
    u = rounding(dtype, precision, check.products)

    def cast(x):
        is_float = isinstance(x, np.ndarray) and x.dtype.kind == "f"
        return x.astype(jnp.dtype(dtype)) if check.cast and is_float else x

    with jax.default_matmul_precision(None if precision == "default" else precision):
        actual = jax.jit(check.operation)(*jax.tree.map(cast, check.arguments))
    expected = oracle()
    if set(actual) != set(expected):
        raise ValueError(f"the results are {sorted(actual)}, expected {sorted(expected)}")
    records = []
    for name, right in expected.items():
        tolerance = check.tolerance.get(name, check.tolerance.get(""))(u)
        records.append({
            "name": f"{check.name}: {name}", "dtype": dtype, "precision": precision,
            **compare(np.asarray(actual[name]).astype(np.float32), np.asarray(right), tolerance),
        })  # fmt: skip
    return records


def compare(actual: np.ndarray, right: np.ndarray, tolerance: float) -> dict[str, Any]:
    """Return the error by norm and by the largest element, each relative to the reference's."""
    if actual.shape != right.shape:
        raise ValueError(f"shape {actual.shape}, expected {right.shape}")
    difference, right = (actual - right).ravel(), right.ravel()
    error, largest = (
        float(size(difference) / (size(right) or 1)) for size in (np.linalg.norm, lambda x: np.abs(x).max())
    )
    numbers = {"error": error, "largest": largest} if np.isfinite(error) else {"error": "not finite"}
    return {**numbers, "tolerance": tolerance, "ok": bool(error <= tolerance)}


def with_gradient(function: Callable, *names: str) -> Callable[..., dict[str, Any]]:
    """Return a function of (*arguments, gradient of the result) that returns the result and the gradients by name."""

    def both(*arguments):
        *inputs, g = arguments
        y, pullback = jax.vjp(function, *inputs)
        return {"result": y, **{f"d{name}": dx for name, dx in zip(names, pullback(g), strict=True)}}

    return both


def _normal(seed: int, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)


# The checks. Each takes the operation as an argument, so that all implementations pass the same check.


def lrn_checks(name: str, operation: Callable, shape: Sequence[int]) -> list[Check]:
    """Check `operation(x, k, n, alpha, beta)` on one tower's activations, which are large, so that LRN scales them."""
    x, g = _normal(0, shape, 100), _normal(1, shape)

    def oracle():
        return {"result": reference.lrn(x, *LRN), "dx": reference.lrn_gradient(x, g, *LRN)}

    return [Check(name, with_gradient(lambda x: operation(x, *LRN), "x"), oracle, (x, g))]


def spatial_norm_checks(name: str, operation: Callable, shape: Sequence[int]) -> list[Check]:
    x, g = _normal(0, shape, 50), _normal(1, shape)

    def oracle():
        return {
            "result": reference.spatial_norm(x, *SPATIAL_NORM),
            "dx": reference.spatial_norm_gradient(x, g, *SPATIAL_NORM),
        }

    return [Check(name, with_gradient(lambda x: operation(x, *SPATIAL_NORM), "x"), oracle, (x, g))]


def max_pool_checks(name: str, operation: Callable, shape: Sequence[int]) -> list[Check]:
    """Check `operation(x, window, stride)` on small integers, which have many ties and are exact in every dtype."""
    random = np.random.default_rng(0)
    x = random.integers(-8, 9, shape).astype(np.float32)
    g = random.integers(-8, 9, reference.max_pool(x).shape).astype(np.float32)

    def oracle():
        return {"result": reference.max_pool(x), "dx": reference.max_pool_gradient(x, g)}

    function = lambda x: operation(x, window=3, stride=2)  # noqa: E731
    return [Check(name, with_gradient(function, "x"), oracle, (x, g), {"": exact})]


def relu_lrn_pool(x: jax.Array, towers: int, k: float, n: int, alpha: float, beta: float) -> jax.Array:
    """Compose ReLU, LRN within each tower and max pooling, on all channels, as the network does."""
    parts = jnp.split(x, towers, axis=-1)
    return jnp.concatenate([max_pool(local_response_norm(nn.relu(part), k, n, alpha, beta)) for part in parts], -1)


def relu_lrn_pool_checks(name: str, operation: Callable, shape: Sequence[int], towers: int) -> list[Check]:
    """Check `operation(x, towers, k, n, alpha, beta)` on all channels.

    The gradient of the result is zero where a window's two largest elements are so near that bfloat16 may select the
    other one, so that all remaining differences are rounding.
    """
    x = _normal(0, shape, 100)
    a = reference.relu(x)
    b = np.concatenate([reference.lrn(part, *LRN) for part in np.split(a, towers, -1)], -1)
    second, first = np.sort(reference.window_taps(b, 3, 2), 0)[-2:]
    g = _normal(1, first.shape) * (first - second > 2.0**-5 * first)

    def oracle():
        db = reference.max_pool_gradient(b, g)
        parts = zip(*(np.split(of, towers, -1) for of in (a, db)), strict=True)
        da = np.concatenate([reference.lrn_gradient(part, g, *LRN) for part, g in parts], -1)
        return {"result": first, "dx": reference.relu_gradient(x, da)}

    function = lambda x: operation(x, towers, *LRN)  # noqa: E731
    return [Check(name, with_gradient(function, "x"), oracle, (x, g))]


def conv_checks(
    name: str, operation: Callable, shape: Sequence[int], kernel: Sequence[int], stride: int, padding: tuple
) -> list[Check]:
    """Check `operation(x, kernel, stride, padding)` on one tower's layer."""
    x, w = _normal(0, shape), _normal(1, kernel)
    # The result's shape, without computing it.
    sides = [(side + sum(edges) - kernel[0]) // stride + 1 for side, edges in zip(shape[1:3], padding, strict=True)]
    g = _normal(2, (shape[0], *sides, kernel[3]))

    def oracle():
        dx, dkernel = reference.conv_gradient(x, w, g, stride, padding)
        return {"result": reference.conv(x, w, stride, padding), "dx": dx, "dkernel": dkernel}

    function = lambda x, w: operation(x, w, stride, padding)  # noqa: E731
    return [Check(name, with_gradient(function, "x", "kernel"), oracle, (x, w, g), products=True)]


def dropout_checks(name: str, operation: Callable, shape: Sequence[int]) -> list[Check]:
    """Check the values of `operation(key, x, rate, towers, first_example, first_tower)`, its rate, and its parts."""
    x, g, key, (batch, units) = _normal(0, shape), _normal(1, shape), jax.random.key(2), shape
    mask = np.asarray(jax.jit(lambda: operation(key, jnp.ones(shape), 0.5, 2, 0, 0))()) != 0

    def oracle():
        return {"result": reference.dropout(x, mask), "dx": reference.dropout(g, mask)}

    def share(ones):
        return {"share of zeros": jnp.mean(operation(key, ones, 0.5, 2, 0, 0) == 0)}

    def in_parts(x):  # of four devices: two with a tower each, for two parts of the batch
        examples = [(0, x[: batch // 2]), (batch // 2, x[batch // 2 :])]
        rows = [
            jnp.concatenate([operation(key, half, 0.5, 1, i, t) for t, half in enumerate(jnp.split(part, 2, -1))], -1)
            for i, part in examples
        ]
        return {"result on four devices": jnp.concatenate(rows)}

    deviation = 5 * 0.5 / np.sqrt(batch * units) / 0.5  # five standard deviations, relative to one half
    ones = np.ones(shape, np.float32)
    return [
        Check(name, with_gradient(lambda x: operation(key, x, 0.5, 2, 0, 0), "x"), oracle, (x, g)),
        Check(name, share, lambda: {"share of zeros": 0.5}, (ones,), {"": lambda u: deviation}),
        Check(name, in_parts, lambda: {"result on four devices": mask}, (ones,), {"": exact}),
    ]


def cross_entropy_checks(name: str, operation: Callable, batch: int, classes: int) -> list[Check]:
    logits, labels = _normal(0, (batch, classes), 10), np.random.default_rng(1).integers(0, classes, batch)

    def both(logits):
        loss, gradient = jax.value_and_grad(operation)(logits, labels)
        return {"result": loss, "dlogits": gradient}

    def oracle():
        gradient = reference.cross_entropy_gradient(logits, labels)
        return {"result": reference.cross_entropy(logits, labels), "dlogits": gradient}

    return [Check(name, both, oracle, (logits,), dtypes=("float32",))]


def sgd_checks(name: str, optimizer: optax.GradientTransformationExtraArgs, shape: Sequence[int]) -> list[Check]:
    """Check two updates, the second at a tenth of the learning rate."""
    w, gradients, rates = _normal(0, shape), _normal(1, (2, *shape)), (0.01, 0.001)

    def operation(w, gradients):
        params, state = {"kernel": w}, optimizer.init({"kernel": w})
        for rate, g in zip(rates, gradients, strict=True):
            updates, state = optimizer.update({"kernel": g}, state, params, learning_rate=rate)
            params = optax.apply_updates(params, updates)
        return {"weights": params["kernel"], "velocity": updates["kernel"]}

    def oracle():
        weights, velocity = w, np.zeros(shape)
        for rate, g in zip(rates, gradients, strict=True):
            weights, velocity = reference.sgd(weights, velocity, g, rate)
        return {"weights": weights, "velocity": velocity}

    return [Check(name, operation, oracle, (w, gradients), dtypes=("float32",))]


def random_crop_checks(name: str, operation: Callable, shape: Sequence[int], size: int) -> list[Check]:
    """Check `operation(key, images, size)`; its crop of an image of coordinates gives the positions."""
    images, key = _normal(0, shape, 60), jax.random.key(1)
    rows, columns = np.indices(shape[1:3], np.float32)
    coordinates = np.broadcast_to(np.stack([rows, columns], -1), (*shape[:3], 2))
    places = np.asarray(jax.jit(lambda x: operation(key, x, size))(coordinates))[:, 0, 0].astype(int)
    oracle = lambda: {"result": reference.crop(images, places, size)}  # noqa: E731
    drawn = lambda x: {"result": operation(key, x, size)}  # noqa: E731
    return [Check(name, drawn, oracle, (images,), {"": exact}, dtypes=("float32",))]


def random_flip_checks(name: str, operation: Callable, shape: Sequence[int]) -> list[Check]:
    """Check `operation(key, images)`; images of coordinates show which ones are flipped."""
    images, key = _normal(0, shape, 60), jax.random.key(1)
    coordinates = np.broadcast_to(np.arange(shape[2], dtype=np.float32)[:, None], (*shape[:3], 1))
    flipped = np.asarray(jax.jit(partial(operation, key))(coordinates))[:, 0, 0, 0] > 0
    oracle = lambda: {"result": reference.flip(images, flipped)}  # noqa: E731
    drawn = lambda x: {"result": operation(key, x)}  # noqa: E731
    return [Check(name, drawn, oracle, (images,), {"": exact}, dtypes=("float32",))]


def pca_lighting_checks(name: str, operation: Callable, shape: Sequence[int]) -> list[Check]:
    """Check `operation(key, images, eigenvalues, eigenvectors)`; with all λ = 1 and p = I its shift is α."""
    images, key = _normal(0, shape, 60), jax.random.key(1)
    eigenvalues = np.float32([55.5, 4.8, 1.15])
    eigenvectors = np.linalg.qr(_normal(1, (3, 3)))[0]
    with jax.default_matmul_precision("highest"):
        shift = jax.jit(partial(operation, key))(jnp.zeros((shape[0], 1, 1, 3)), jnp.ones(3), jnp.eye(3))
    alpha = np.asarray(shift)[:, 0, 0]

    def drawn(images):  # also the shift alone, which is small compared with the pixels
        shifts = operation(key, jnp.zeros((shape[0], 1, 1, 3)), eigenvalues, eigenvectors)
        return {"result": operation(key, images, eigenvalues, eigenvectors), "shift": shifts}

    def oracle():
        zeros = np.zeros((shape[0], 1, 1, 3))
        result, shift = (reference.pca_lighting(x, alpha, eigenvalues, eigenvectors) for x in (images, zeros))
        return {"result": result, "shift": shift}

    return [Check(name, drawn, oracle, (images,), products=True, dtypes=("float32",))]


def bilinear(images: jax.Array, side: int) -> jax.Array:
    """Return enlarged images, as `alexnet_jax.preprocess` does."""
    return jax.image.resize(images, (images.shape[0], side, side, images.shape[3]), "bilinear")


def resize_checks(name: str, operation: Callable, shape: Sequence[int], side: int) -> list[Check]:
    images = _normal(0, shape, 60)
    oracle = lambda: {"result": reference.resize(images, side)}  # noqa: E731
    resized = lambda x: {"result": operation(x, side)}  # noqa: E731
    return [Check(name, resized, oracle, (images,), dtypes=("float32",))]  # its products are "highest" always


class _DropoutKeys(nn.Module):
    """A module that returns the dropout keys of a network's fc6 and fc7."""

    @nn.compact
    def __call__(self):
        return self.make_rng("dropout"), self.make_rng("dropout")


def network_checks(name: str, model: AlexNet, side: int, batch: int) -> list[Check]:
    """Check the paper's variant of the network: logits in testing, and in training the loss, logits and all gradients.

    The scale of the kernels keeps the scale of the activations from layer to layer; LRN changes them noticeably.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    params = {
        layer: {
            "kernel": _normal(i, of["kernel"].shape, (2 / of["kernel"].size * of["kernel"].shape[-1]) ** 0.5),
            "bias": _normal(i + 100, of["bias"].shape),
        }
        for i, (layer, of) in enumerate(shapes.items())
    }
    params["fc8"]["kernel"] *= 0.05  # logits of about 1, so that no class is certain
    images, labels = _normal(0, (batch, side, side, 3), 60), np.arange(batch) % model.num_classes
    key = jax.random.key(3)

    @jax.jit
    def draw_masks():
        keys = zip(_DropoutKeys().apply({}, rngs={"dropout": key}), model.widths[5:], strict=True)
        return [dropout(k, jnp.ones((batch, units)), 0.5, model.towers) != 0 for k, units in keys]

    masks = jax.tree.map(np.asarray, draw_masks())

    def result(test_logits, loss, logits, gradients):
        leaves = {f"d{layer}.{leaf}": g for layer, of in gradients.items() for leaf, g in of.items()}
        return {"test logits": test_logits, "loss": loss, "logits": logits, **leaves}

    def operation(model, params, images):
        def loss_fn(params):
            logits = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
            return cross_entropy(logits, labels), logits

        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return result(model.apply({"params": params}, images), loss, logits, gradients)

    def oracle():
        how = dict(stem=tuple(model.stem), towers=model.towers)
        test_logits, _ = reference.network(params, images, scale=0.5, **how)
        return result(test_logits, *reference.loss_and_gradients(params, images, labels, masks=masks, **how))

    tolerance = {
        "": network_tolerance,
        **{f"d{layer}.{leaf}": partial(gradient_tolerance, layer) for layer, of in params.items() for leaf in of},
    }
    return [
        Check(
            name, partial(operation, model.clone(dtype=jnp.dtype(dtype))), oracle, (params, images),
            tolerance, products=True, dtypes=(dtype,), cast=False,
        )
        for dtype in ("bfloat16", "float32")
    ]  # fmt: skip


def groups_of(setting: Setting) -> dict[str, Callable[[], list[Check]]]:
    """Return for each group a function that returns its checks, the most important group first."""
    model, side, batch, _ = setting
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    maps = {name: x.shape for name, x in jax.eval_shape(partial(activations, model), params, images).items()}
    tower = lambda name: (*maps[name][:-1], maps[name][-1] // model.towers)  # noqa: E731
    stem, past = model.stem, -(side + 2 * model.stem.padding - model.stem.kernel) % model.stem.stride
    edges = (stem.padding, stem.padding + past)
    layers = {  # of one call of the convolution: input shape, kernel size, stride, padding, features
        "conv1": (images.shape, *stem[:2], edges, maps["conv1"][-1]),
        "conv2": (tower("pool1"), 5, 1, (2, 2), tower("conv2")[-1]),
        "conv3": (maps["pool2"], 3, 1, (1, 1), maps["conv3"][-1]),
        "conv4": (tower("conv3"), 3, 1, (1, 1), tower("conv4")[-1]),
        "conv5": (tower("conv4"), 3, 1, (1, 1), tower("conv5")[-1]),
    }

    def of(checks, operations, **shapes):  # each operation with each shape
        return [
            check for shape_name, shape in shapes.items() for name, operation in operations.items()
            for check in checks(f"{name}, {shape_name}", operation, *shape)
        ]  # fmt: skip

    lrns = {"LRN": local_response_norm, "LRN, plain": ops.PLAIN.local_response_norm}
    pools = {"max pool": max_pool, "max pool, plain": ops.PLAIN.max_pool}
    convs = {"conv": ops.conv, "conv, plain": ops.PLAIN.conv}
    fused = {"ReLU + LRN + pool": relu_lrn_pool}
    if (selected := ops.ops_for(jax.devices()[0])).relu_lrn_pool:
        fused["ReLU + LRN + pool, kernels"] = lambda x, towers, *c: selected.relu_lrn_pool(
            jnp.split(x, towers, axis=-1), jnp.zeros(x.shape[-1:]), towers, *c
        )[0]
    if selected.relu_pool:  # with a bias that makes all of x positive
        pools["ReLU + pool, kernels"] = lambda x, window, stride: (
            selected.relu_pool([x], jnp.full(x.shape[-1:], 9.0), 1, window, stride)[0] - 9
        )
    conv_shapes = {
        name: (shape, (kernel, kernel, shape[-1], features), stride, (edges, edges))
        for name, (shape, kernel, stride, edges, features) in layers.items()
    }
    drawn, many = (32, side + side // 7, side + side // 7, 3), 8 * batch
    return {
        "network": lambda: network_checks("network", model, side, batch),
        "LRN": lambda: of(lrn_checks, lrns, norm1=(tower("norm1"),), norm2=(tower("norm2"),)),
        "max pool": lambda: of(
            max_pool_checks, pools, pool1=(tower("norm1"),), pool2=(tower("norm2"),), pool5=(tower("conv5"),)
        ),
        "ReLU + LRN + pool": lambda: of(
            relu_lrn_pool_checks, fused, stage1=(maps["conv1"], model.towers), stage2=(maps["conv2"], model.towers)
        ),
        "conv": lambda: of(conv_checks, convs, **conv_shapes),
        "rest": lambda: [
            *dropout_checks("dropout", dropout, (many, model.widths[5])),
            *spatial_norm_checks("spatial norm, norm2", spatial_response_norm, tower("norm2")),
            *cross_entropy_checks("cross-entropy", cross_entropy, 128, model.num_classes),
            *sgd_checks("SGD update", paper_sgd(), params["conv2"]["kernel"].shape),
            *random_crop_checks("random crop", random_crop, drawn, side),
            *random_flip_checks("random flip", random_flip, drawn),
            *pca_lighting_checks("PCA lighting", pca_lighting, drawn),
            *resize_checks("resize", bilinear, (many, 28, 28, 3), side),
        ],
    }


def train_step(setting: Setting, path: Path) -> dict[str, Any]:
    """Compile the train step in bfloat16, write its optimized HLO, and return the bytes that it needs."""
    from alexnet_jax.train_step import create_state, make_train_step  # these import TFDS and Grain
    from experiments import measure

    model, shape = setting.model.clone(dtype=jnp.bfloat16), (setting.side, setting.side, 3)
    data, preprocess = measure.random_batch(shape, setting.train_batch, model.num_classes)
    optimizer = paper_sgd()
    state = create_state(model, optimizer, shape, 0)
    step = make_train_step(model, optimizer, preprocess, lambda step, plateau: jnp.float32(1e-4))
    compiled = step.lower(state, data, jax.random.key(1)).compile()
    with gzip.open(path, "wt") as file:
        file.write(compiled.as_text())
    sizes = compiled.memory_analysis()
    names = (f"{kind}_size_in_bytes" for kind in ("argument", "output", "temp", "alias", "generated_code"))
    return {"dtype": "bfloat16", "batch": setting.train_batch, **{name: getattr(sizes, name) for name in names}}


class _Schedule:
    """Checks in threads, so that NumPy computes while XLA compiles; after the budget none starts or is waited for."""

    def __init__(self, budget: float):
        self.began = time.monotonic()
        self.deadline = self.began + budget
        threads = max(2, (os.cpu_count() or 2) // 2)
        self._pools = [concurrent.futures.ThreadPoolExecutor(count) for count in (1, threads, threads)]
        self._groups, self._oracles, self._cases = self._pools

    def start(self, function: Callable[[], list[dict[str, Any]]]) -> concurrent.futures.Future:
        return self._cases.submit(self._unless_late, function)

    def start_group(self, make: Callable[[], list[Check]]) -> concurrent.futures.Future:
        """Start the cases of a group's checks, one group after the other; return a future of [(name, future)]."""

        def cases():
            checks = make()
            oracles = {check.oracle: self._oracles.submit(self._unless_late, check.oracle) for check in checks}
            return [
                (f"{check.name}, {case[0]}, {case[1]}",
                 self.start(partial(run_case, check, *case, oracles[check.oracle].result)))
                for check in checks for case in check.cases()
            ]  # fmt: skip

        return self._groups.submit(self._unless_late, cases)

    def _unless_late(self, function):
        if time.monotonic() > self.deadline:
            raise TimeoutError
        return function()

    def wait(self, name: str, future: concurrent.futures.Future) -> tuple[Any, list[dict[str, Any]]]:
        """Return the future's result, or None and a record with the reason."""
        try:
            return future.result(max(0.0, self.deadline - time.monotonic())), []
        except TimeoutError:
            return None, [{"name": name, "skipped": "budget"}]
        except Exception as error:  # any: the other checks continue
            return None, [{"name": name, "error": f"{type(error).__name__}: {error}", "ok": False}]

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)


def line(record: dict[str, Any]) -> str:
    """Return a record as a line of the table."""
    name = f"{record['name'][:44]:<44} {record.get('dtype', ''):<8} {record.get('precision', ''):<7}"
    if "skipped" in record:
        return f"{name} skipped: {record['skipped']}"
    verdict = "ok" if record["ok"] else "FAILED"
    if "largest" not in record:
        return f"{name} {verdict}: {record['error']}"
    return f"{name} {record['error']:9.1e} {record['largest']:9.1e} {record['tolerance']:9.1e}  {verdict}"


def run(setting: Setting, groups: dict[str, Callable[[], list[Check]]], workdir: Path, budget: float) -> bool:
    """Run the checks, print and write their records, and return whether none failed."""
    schedule, records, seconds = _Schedule(budget), [], {}
    device = jax.devices()[0]
    report = {
        "device": device.device_kind, "platform": device.platform, "jax": jax.__version__, "budget_s": budget,
        "seconds": seconds, "train_step": None, "records": records,
    }  # fmt: skip
    print(f"{'':44} {'':8} {'':7} {'error':>9} {'largest':>9} {'tolerance':>9}")
    hlo = schedule.start(partial(train_step, setting, workdir / "train_step.hlo.txt.gz"))
    started = {group: schedule.start_group(make) for group, make in groups.items()}

    def write(group):
        seconds[group] = time.monotonic() - schedule.began
        write_json(workdir / "correctness.json", report)
        print(f"{group}: complete {seconds[group]:.1f} s after the start", flush=True)

    for group, future in started.items():
        cases, actual = schedule.wait(group, future)
        for name, case in cases or ():
            result, reason = schedule.wait(name, case)
            actual += result or reason
        records += actual
        for record in actual:
            print(line(record))
        write(group)
    report["train_step"], reason = schedule.wait("train step", hlo)
    records += reason
    schedule.close()
    print("\n".join(map(line, reason)) or f"train step: {report['train_step']}")
    write("train step")
    return all(record.get("ok", True) for record in records)


def main(argv: Sequence[str] | None = None) -> int:
    program, about = "python -m experiments.on_gpu.correctness", __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("--workdir", type=Path, required=True, help="for correctness.json and train_step.hlo.txt.gz")
    parser.add_argument("--quick", action="store_true", help="a small network, to see that it works")
    parser.add_argument("--budget", type=float, default=75, help="seconds after which nothing is started (default: 75)")
    flags, began = parser.parse_args(argv), time.monotonic()
    flags.workdir.mkdir(parents=True, exist_ok=True)
    setting = Setting(AlexNet(), 224, 2, 128)
    if flags.quick:
        small = AlexNet(num_classes=10, stem=Stem(5, 2, 2), widths=(8, 16, 16, 16, 16, 32, 32))
        setting = Setting(small, 40, 2, 4)
    groups = groups_of(setting)  # which starts the device
    return 0 if run(setting, groups, flags.workdir, flags.budget - (time.monotonic() - began)) else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # does not wait for threads that run beyond the budget
