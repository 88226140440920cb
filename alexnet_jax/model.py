"""AlexNet as a Flax module: sections 3.1 to 3.5 of Krizhevsky, Sutskever and Hinton (2012).

Between two layers the activations are a list with one NHWC array a tower. A layer that is given the list stays inside
its towers; a layer that is given `[meet(…)]`, one array of all channels, sees both. That is figure 2 of the paper. One
device holds both towers; on a mesh with an axis for them each holds one, and `meet` is where the devices communicate.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from alexnet_jax.ops import conv, dropout, local_response_norm, max_pool, spatial_response_norm
from alexnet_jax.variants import Variant, variant_named

ACTIVATIONS = {"relu": nn.relu, "tanh": jnp.tanh}
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
OUTPUTS = (
    "conv1", "norm1", "pool1", "conv2", "norm2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8"
)  # fmt: skip


class Stem(NamedTuple):
    """The first convolution: a square kernel, its stride, and the zero padding on every side."""

    kernel: int = 11
    stride: int = 4
    padding: int = 0


def join(towers: Sequence[jax.Array]) -> jax.Array:
    """The towers' activations as one array: the first half of the channels is tower 0, the second tower 1."""
    return jnp.concatenate(towers, axis=-1)


def widths_problem(widths: Sequence[int], towers: int) -> str:
    """What is wrong with the widths of conv1 … conv5, fc6 and fc7, or ""."""
    least = (towers,) + (2 if towers == 2 else 0,) * 6
    if len(widths) == 7 and all(w >= low and w % towers == 0 for w, low in zip(widths, least, strict=True)):
        return ""
    takes = "even numbers" if towers == 2 else "numbers, of which 0 leaves out a layer after conv1"
    return f"expected seven {takes} (conv1 to conv5, fc6, fc7)"


def _parts(tower_axis: str | None) -> int:
    """The number of devices that share the towers: 1 or 2."""
    return lax.axis_size(tower_axis) if tower_axis else 1


class TowerConv(nn.Module):
    """A convolution with bias, over one input that both towers see or over one input per tower."""

    features: int
    kernel: int
    kernel_std: float
    bias: float
    stride: int = 1
    padding: int = 0
    rounds_up: bool = True
    dtype: Any = jnp.float32
    towers: int = 2
    tower_axis: str | None = None
    conv: Callable = conv

    @nn.compact
    def __call__(self, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        here, towers = self.features // _parts(self.tower_axis), self.towers // _parts(self.tower_axis)
        shape = (self.kernel, self.kernel, inputs[0].shape[-1], here)
        kernel = self.param("kernel", nn.initializers.normal(self.kernel_std), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.constant(self.bias), (here,)).astype(self.dtype)
        # Rounding the output size up lets the last window hang over the right and bottom edge.
        hang = [-(side + 2 * self.padding - self.kernel) % self.stride for side in inputs[0].shape[1:3]]
        padding = tuple((self.padding, self.padding + self.rounds_up * after) for after in hang)
        split = partial(jnp.split, indices_or_sections=towers, axis=-1)
        if len(inputs) < towers:
            outputs = split(self.conv(inputs[0], kernel, self.stride, padding))
        else:
            outputs = [self.conv(x, k, self.stride, padding) for x, k in zip(inputs, split(kernel), strict=True)]
        return [x + b for x, b in zip(outputs, split(bias), strict=True)]


class Dense(nn.Module):
    """A fully connected layer: [B, in] to [B, features], or to this device's half of them."""

    features: int
    kernel_std: float
    bias: float
    dtype: Any = jnp.float32
    tower_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        here = self.features // _parts(self.tower_axis)
        shape = (x.shape[-1], here)
        kernel = self.param("kernel", nn.initializers.normal(self.kernel_std), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.constant(self.bias), (here,)).astype(self.dtype)
        return x @ kernel + bias


class AlexNet(nn.Module):
    """The network of section 3.5.

    Attributes:
      num_classes: the number of logits.
      variant: a name in `VARIANTS`. "caffe" normalizes across the towers, so they cannot lie on two devices.
      dtype: of the activations; parameters are float32 always.
      stem: the first convolution; the default is the paper's 11×11, stride 4.
      widths: kernels or units of conv1 … conv5, fc6, fc7, both towers together. With one tower, 0 leaves a layer out.
      towers: 2, or 1 for a network whose layers all see every channel before them.
      activation: "relu", or the "tanh" that section 3.1 holds it against.
      lrn: whether local response normalization stands after conv1 and conv2.
      lrn_alpha: its α; None is the variant's own, meant for images in 0 to 255.
      pool_window: z of section 3.4, where s = 2 always.
      dropout: the rate at fc6 and fc7.
      kernel_std, bias: the initial standard deviation of the eight layers' kernels, and the initial value of their
        biases; None is the variant's own.
      conv: the convolution; `ops.convolve` where XLA's partitioner is to split it.
      data_axis, tower_axis: the mesh axes that share the batch and the towers, when the network is applied under
        `jax.shard_map`; its parameters are then this device's part of the output channels.

    `init(key, images)["params"]` holds `conv1` … `conv5`, `fc6`, `fc7`, `fc8`, each with `kernel` and `bias`.
    `apply({"params": p}, images, train)` maps float images [B, H, W, C], in the paper's scale (0 to 255, mean
    subtracted), to float32 logits [B, num_classes]; training takes `rngs={"dropout": key}`.

    Raises:
      ValueError: a field with a value that it does not take, or images that the network cannot take.
    """

    num_classes: int = 1000
    variant: str = "paper"
    dtype: Any = jnp.float32
    stem: Stem = Stem()
    widths: tuple[int, ...] = (96, 256, 384, 384, 256, 4096, 4096)
    towers: int = 2
    activation: str = "relu"
    lrn: bool = True
    lrn_alpha: float | None = None
    pool_window: int = 3
    dropout: float = 0.5
    kernel_std: tuple[float, ...] | None = None
    bias: tuple[float, ...] | None = None
    conv: Callable = conv
    data_axis: str | None = None
    tower_axis: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        variant = self._check(images)
        std = dict(zip(LAYERS, self.kernel_std or variant.kernel_std, strict=True))
        bias = dict(zip(LAYERS, self.bias or variant.bias, strict=True))
        width = dict(zip(LAYERS, (*self.widths, self.num_classes), strict=True))
        k, n, alpha, beta = variant.lrn
        alpha = alpha if self.lrn_alpha is None else self.lrn_alpha
        lrn = partial(local_response_norm, k=k, n=n, alpha=alpha, beta=beta)
        f = ACTIVATIONS[self.activation]

        outputs = {}

        def see(name, towers):  # section 3.1, where the variant has it
            outputs[name] = [f(x) for x in towers] if name in variant.activation_after else towers
            return outputs[name]

        def common(name):
            return dict(
                features=width[name], kernel_std=std[name], bias=bias[name], dtype=self.dtype,
                tower_axis=self.tower_axis, name=name,
            )  # fmt: skip

        def meet(name, towers):  # section 3.2: all that one tower learns of the other
            x = join(towers)
            if _parts(self.tower_axis) > 1:
                with jax.named_scope(name):
                    x = lax.all_gather(x, self.tower_axis, axis=-1, tiled=True)
            return x

        def convolve(name, inputs, kernel, stride=1, padding=0):
            if not width[name]:
                return inputs
            shape = dict(kernel=kernel, stride=stride, padding=padding, rounds_up=variant.rounds_up, conv=self.conv)
            return see(name, TowerConv(towers=self.towers, **shape, **common(name))(inputs))

        def normalize(name, towers):  # section 3.3
            if self.lrn and variant.lrn_sees_both_towers:
                towers = jnp.split(lrn(join(towers)), self.towers, axis=-1)
            elif self.lrn:
                towers = [lrn(x) for x in towers]
            if name in variant.spatial_norm_after:
                towers = [spatial_response_norm(x, *variant.spatial_norm) for x in towers]
            return see(name, towers)

        def pool(name, towers):  # section 3.4
            return see(name, [max_pool(x, window=self.pool_window, stride=2) for x in towers])

        def connect(name, x):
            if not width[name]:
                return [x]
            x = see(name, [f(Dense(**common(name))(x))])[0]
            # Section 4.2: half of the outputs in training, half of each output in testing.
            kept = 1 - self.dropout
            scale = (1 / kept if train else 1.0) if variant.dropout_rescales else (1.0 if train else kept)
            if not train or not self.dropout:
                return [x * scale]
            towers = self.towers // _parts(self.tower_axis)
            example = lax.axis_index(self.data_axis) * x.shape[0] if self.data_axis else 0
            tower = lax.axis_index(self.tower_axis) * towers if self.tower_axis else 0
            with jax.named_scope(name):
                return [scale * dropout(self.make_rng("dropout"), x, self.dropout, towers, example, tower)]

        # Section 3.5, with the sizes of a 224×224 image.
        x = [images.astype(self.dtype)]
        x = convolve("conv1", x, *self.stem)  # 55×55×96
        x = pool("pool1", normalize("norm1", x))  # 27×27×96
        x = convolve("conv2", x, kernel=5, padding=2)  # 27×27×256, within the towers
        x = pool("pool2", normalize("norm2", x))  # 13×13×256
        x = convolve("conv3", [meet("conv3", x)], kernel=3, padding=1)  # 13×13×384, the towers meet
        x = convolve("conv4", x, kernel=3, padding=1)  # 13×13×384, within the towers
        x = convolve("conv5", x, kernel=3, padding=1)  # 13×13×256, within the towers
        x = meet("fc6", pool("pool5", x))  # 6×6×256, the towers meet, here and from here on
        x = connect("fc6", x.reshape(x.shape[0], -1))  # 4096
        x = connect("fc7", meet("fc7", x))  # 4096
        x = meet("fc8", see("fc8", [Dense(**common("fc8"))(meet("fc8", x))]))  # 1000
        if self.is_mutable_collection("activations") and not self.is_initializing():
            self.sow("activations", "layers", {name: join(towers) for name, towers in outputs.items()})
        return x.astype(jnp.float32)

    def _check(self, images: jax.Array) -> Variant:
        variant = variant_named(self.variant)
        if self.towers not in (1, 2):
            raise ValueError(f"towers={self.towers}: expected 1 or 2")
        if problem := widths_problem(self.widths, self.towers):
            raise ValueError(f"widths={self.widths}: {problem}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: expected a rate of at least 0 and below 1")
        if self.towers % _parts(self.tower_axis):
            raise ValueError(f"towers={self.towers}: a single tower cannot lie on two devices")
        for name, values in (("kernel_std", self.kernel_std), ("bias", self.bias)):
            if values and len(values) != len(LAYERS):
                raise ValueError(f"{name}={values}: expected eight numbers, conv1 to fc8")
        if variant.lrn_sees_both_towers and _parts(self.tower_axis) > 1:
            raise ValueError(f"variant={self.variant!r}: its normalization sees both towers; keep them on one device")
        if images.ndim != 4:
            raise ValueError(f"images of shape {images.shape}: expected [B, H, W, C]")
        kernel, stride, padding = self.stem
        if kernel < 1 or stride < 1 or padding < 0:
            raise ValueError(f"stem={tuple(self.stem)}: expected kernel ≥ 1, stride ≥ 1 and padding ≥ 0")
        z = self.pool_window
        if z < 1:
            raise ValueError(f"pool_window={z}: expected at least 1")
        size = min(images.shape[1:3])
        maps = 1 + (size + 2 * padding - kernel + (stride - 1) * variant.rounds_up) // stride
        for _ in range(3):
            maps = (maps - z) // 2 + 1
        if maps < 1:
            raise ValueError(
                f"images of {images.shape[1]}×{images.shape[2]}: too small for a {kernel}×{kernel} stem of stride "
                f"{stride} and three poolings of pool_window={z}, stride 2; use larger images, a smaller stem or window"
            )
        return variant


def activations(model: AlexNet, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Every layer's output on a batch of images, without dropout.

    Args:
      params: the model's parameters, as `init(...)["params"]`.
      images: [B, H, W, C].

    Returns:
      The arrays named in `OUTPUTS`, in that order, without those of layers that are left out; each as the next layer
      reads it: after ReLU, except where the variant has none there. fc8 is the logits. The channels of tower 0 come
      before those of tower 1.
    """
    outputs = model.apply({"params": params}, images, mutable=["activations"])[1]["activations"]["layers"][0]
    return {name: outputs[name] for name in OUTPUTS if name in outputs}
