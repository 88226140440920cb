"""AlexNet as a Flax module: sections 3.1 to 3.5 of Krizhevsky, Sutskever and Hinton (2012).

Between two layers the activations are a list with one NHWC array per tower. A layer is confined to its towers, except
conv3 and the fully connected layers, which concatenate them: figure 2 of the paper. One device holds both towers; on a
mesh with a tower axis each device holds one, and such a layer gathers the other's activations.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import Dtype
from jax import lax

from alexnet_jax.checks import check_images, check_network, check_tower_devices
from alexnet_jax.ops import OPS, Ops, ops_for
from alexnet_jax.variants import ACTIVATIONS, BEFORE, LAYERS, VARIANTS, Stem, Variant

OUTPUTS = (
    "conv1", "norm1", "pool1", "conv2", "norm2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8"
)  # fmt: skip


def all_gather_towers(towers: Sequence[jax.Array], tower_axis: str | None = None) -> jax.Array:
    """Return the activations of all towers as one array [..., C], the channels of tower 0 first (section 3.2).

    Args:
      towers: the activations of this device's towers.
      tower_axis: the mesh axis that shares the towers, under `jax.shard_map`; None: this device holds them all.
    """
    x = jnp.concatenate(towers, axis=-1)
    if tower_devices(tower_axis) == 1:
        return x
    # Along an axis of its own: a TPU scatters the gradient along the channels as an all-reduce of twice the bytes.
    devices = lax.all_gather(x, tower_axis)
    return jnp.moveaxis(devices, 0, -2).reshape(*x.shape[:-1], -1)


def tower_devices(tower_axis: str | None) -> int:
    """Return the number of devices that share the towers: 1 or 2."""
    return lax.axis_size(tower_axis) if tower_axis else 1


def _split_towers(arrays: Sequence[jax.Array], towers: int) -> list[jax.Array]:
    """Return one array per tower, from arrays that each hold the channels of equally many towers."""
    return [part for x in arrays for part in jnp.split(x, towers // len(arrays), axis=-1)]


class Conv(nn.Module):
    """A convolution with bias: a list of inputs [B, H, W, I] to a list of outputs [B, H', W', O], one per tower.

    A single input, such as the images, is read by all towers.

    Attributes:
      features: the output channels, summed over the towers.
      kernel_size, stride, padding: the side of the square kernel, its stride, and the zeros on every side.
      ceil_mode: whether the output size is rounded up, by more zeros at the right and bottom edge.
      gather: whether the kernels take the channels of both towers, or of their own tower alone.
      towers, tower_axis, conv: as in `AlexNet`; `conv` is that of its operations.
      epilogue: applied instead of adding the bias: (outputs, bias, towers) to the layer's outputs, where the arguments
        hold so many towers, and the bias is of `param_dtype`; None adds the bias.
      dtype, param_dtype, precision, kernel_init, bias_init: as in `flax.linen.Conv`.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    ceil_mode: bool = True
    gather: bool = False
    towers: int = 2
    tower_axis: str | None = None
    conv: Callable[..., jax.Array] = OPS.conv
    epilogue: Callable[[list[jax.Array], jax.Array, int], list[jax.Array]] | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: lax.PrecisionLike = None
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.01)
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        if self.gather:
            inputs = [all_gather_towers(inputs, self.tower_axis)]
        features, towers = (n // tower_devices(self.tower_axis) for n in (self.features, self.towers))
        shape = (self.kernel_size, self.kernel_size, inputs[0].shape[-1], features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype).astype(self.dtype)
        bias = self.param("bias", self.bias_init, (features,), self.param_dtype)
        extra_padding = [
            -(side + 2 * self.padding - self.kernel_size) % self.stride * self.ceil_mode
            for side in inputs[0].shape[1:3]
        ]
        padding = tuple((self.padding, self.padding + extra) for extra in extra_padding)

        def conv(x, kernel):
            return self.conv(x, kernel, self.stride, padding, self.precision)

        # One convolution per tower, which is faster than a grouped one (docs/performance.md#convolution).
        outputs = [conv(x, k) for x, k in zip(inputs, jnp.split(kernel, len(inputs), axis=-1), strict=True)]
        if self.epilogue is not None:
            return self.epilogue(outputs, bias, towers)
        split_outputs = partial(_split_towers, towers=towers)
        biases = split_outputs([bias.astype(self.dtype)])
        return [x + b for x, b in zip(split_outputs(outputs), biases, strict=True)]


class Dense(nn.Module):
    """A fully connected layer over both towers: a list of inputs [B, ...], one per tower, to [B, features].

    Attributes:
      features: the units, summed over the towers; on a mesh each device returns those of its tower.
      gather_outputs: whether each device returns the units of both towers.
      tower_axis: as in `AlexNet`.
      dtype, param_dtype, precision, kernel_init, bias_init: as in `flax.linen.Dense`.
    """

    features: int
    gather_outputs: bool = False
    tower_axis: str | None = None
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: lax.PrecisionLike = None
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.01)
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, inputs: Sequence[jax.Array]) -> jax.Array:
        x = all_gather_towers(inputs, self.tower_axis)
        x = x.reshape(x.shape[0], -1)
        features = self.features // tower_devices(self.tower_axis)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], features), self.param_dtype).astype(self.dtype)
        bias = self.param("bias", self.bias_init, (features,), self.param_dtype).astype(self.dtype)
        x = jnp.matmul(x, kernel, precision=self.precision) + bias
        return all_gather_towers([x], self.tower_axis) if self.gather_outputs else x


class AlexNet(nn.Module):
    """The network of section 3.5.

    Attributes:
      num_classes: the number of logits.
      variant: a name in `VARIANTS`. The LRN of "caffe" runs across the towers, so they must be on one device.
      dtype, param_dtype, precision: of the activations, of the parameters, and of the products, as in Flax.
      stem: the first convolution; None is the variant's own, in the paper 11×11 with stride 4.
      widths: kernels or units of conv1 … conv5, fc6, fc7, summed over the towers; None is the variant's own. A width
        of 0 omits a layer after conv1, with its activation and its LRN; its pooling remains.
      towers: 2, or 1 for a network whose layers all take every channel before them; None is the variant's own.
      activation: "relu", or the "tanh" that section 3.1 compares it with.
      lrn: whether local response normalization (LRN) follows conv1 and conv2.
      lrn_alpha: its α; None is the variant's own, meant for images in 0 to 255.
      pool_window: z of section 3.4, where s = 2 always.
      dropout: the rate at fc6 and fc7: of their outputs, or in "torchvision" of their inputs.
      kernel_std, bias: the initial standard deviation of the eight layers' kernels, and the initial value of their
        biases; None is the variant's own.
      ops: the operations; `PLAIN` gives XLA's own, which every transformation of JAX works on. None: `ops_for` the
        first device.
      data_axis, tower_axis: the mesh axes that share the batch and the towers, when the network is applied under
        `jax.shard_map`; its parameters are then this device's part of the output channels.

    `init(key, images)["params"]` holds `conv1` … `conv5`, `fc6`, `fc7`, `fc8`, each with `kernel` and `bias`.
    `apply({"params": p}, images, train)` maps float images [B, H, W, C], in the paper's scale (0 to 255, mean
    subtracted), to float32 logits [B, num_classes]; training takes `rngs={"dropout": key}`. With `convolutions_only` it
    ends with the output of conv5 and its pooling, [B, H', W', C'], for images of any size that is large enough.

    Raises:
      ValueError: a field with a value that it does not take, or images that the network cannot take.
    """

    num_classes: int = 1000
    variant: str = "paper"
    dtype: Dtype = jnp.float32
    stem: Stem | None = None
    widths: tuple[int, ...] | None = None
    towers: int | None = None
    activation: str = "relu"
    lrn: bool = True
    lrn_alpha: float | None = None
    pool_window: int = 3
    dropout: float = 0.5
    kernel_std: tuple[float, ...] | None = None
    bias: tuple[float, ...] | None = None
    ops: Ops | None = None
    data_axis: str | None = None
    tower_axis: str | None = None
    param_dtype: Dtype = jnp.float32
    precision: lax.PrecisionLike = None

    def __post_init__(self):
        known = isinstance(self.variant, str) and self.variant in VARIANTS  # `check_network` reports another
        variant = VARIANTS[self.variant] if known else Variant()
        for name in ("stem", "widths", "towers"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(variant, name))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, convolutions_only: bool = False) -> jax.Array:
        check_network(self)
        check_images(self, images.shape)
        check_tower_devices(self, tower_devices(self.tower_axis))

        # Section 3.5. Activation, LRN and pooling follow in the variant's order. Comments: the paper's operations and
        # sizes (summed over the towers, after the convolution → after pooling).
        x = [images.astype(self.dtype)]  # 224×224×3
        x = self._conv("conv1", x, *self.stem)  # ReLU, LRN, pooling: 55×55×96 → 27×27×96
        x = self._conv("conv2", x, 5, padding=2, join=True)  # likewise: 27×27×256 → 13×13×256
        x = self._conv("conv3", x, 3, padding=1, gather=True)  # from both towers; ReLU: 13×13×384
        x = self._conv("conv4", x, 3, padding=1)  # ReLU: 13×13×384
        x = self._conv("conv5", x, 3, padding=1, join=True)  # ReLU, pooling: 13×13×256 → 6×6×256
        if convolutions_only:
            return jnp.concatenate(x, axis=-1)
        x = self._dense("fc6", x, train)  # from both towers; ReLU, dropout: 4096
        x = self._dense("fc7", x, train)  # from both towers; ReLU, dropout: 4096
        logits = Dense(gather_outputs=True, **self._fields("fc8"))(x)  # from both towers: 1000

        self._record("fc8", [logits])
        return logits.astype(jnp.float32)

    @nn.nowrap
    def _conv(self, name, x, kernel_size, stride=1, padding=0, gather=False, *, join=False):
        """Return the outputs of a convolution and of the operations that follow it, one per tower.

        `join`: the next layer gathers the towers, so one function for all these operations returns them as one array.
        """
        fields, variant = self._fields(name), VARIANTS[self.variant]
        if not fields["features"]:  # the layer is omitted
            return self._apply_in_order(name, variant.operations(name, omitted=True), x)
        shape = dict(kernel_size=kernel_size, stride=stride, padding=padding, gather=gather)
        order = variant.operations(name)
        fused = self._fused(order, join)
        x = Conv(
            **fields, **shape, ceil_mode=variant.ceil_mode, towers=self.towers, conv=self._ops.conv, epilogue=fused
        )(x)  # fmt: skip
        if fused:
            return x
        self._record(f"{name}{BEFORE}", x, "preactivations")
        self._record(name, x)
        with jax.named_scope(name):
            return self._apply_in_order(name, order, x)

    @nn.nowrap
    def _apply_in_order(self, name, order, towers):
        """Return the activations of this device's towers after the operations of `order`, as `Variant` names them."""
        variant, number = VARIANTS[self.variant], name.removeprefix("conv")
        for operation in order:
            if operation == "relu":  # section 3.1
                towers = [self._activate(x) for x in towers]
            elif operation == "lrn":  # section 3.3
                name = f"norm{number}"
                towers = self._lrn(towers) if self.lrn else towers
            elif operation == "contrast_norm":
                towers = [self._ops.spatial_response_norm(x, *variant.contrast_norm) for x in towers]
            elif operation == "pool":  # section 3.4
                name = f"pool{number}"
                towers = [self._ops.max_pool(x, window=self.pool_window, stride=2) for x in towers]
            self._record(name, towers)
        return towers

    @property
    def _ops(self):
        return self.ops or ops_for(jax.devices()[0])

    @nn.nowrap
    def _activate(self, x):
        return self._ops.relu(x) if self.activation == "relu" else ACTIVATIONS[self.activation](x)

    @nn.nowrap
    def _fused(self, order, join):
        """Return one function of a convolution's outputs and bias that computes all of `order`, or None."""
        variant, ops = VARIANTS[self.variant], self._ops
        if self.activation != "relu" or self.is_mutable_collection("activations"):
            return None
        join = join and not variant.dropout_on_inputs  # dropout needs an array per tower
        outputs = 1 if join else self.towers // tower_devices(self.tower_axis)
        pooling = dict(window=self.pool_window, stride=2, outputs=outputs)
        if ops.relu_lrn_pool and order == ["relu", "lrn", "pool"] and self.lrn and not variant.lrn_across_towers:
            return partial(ops.relu_lrn_pool, **self._lrn_constants(), **pooling)
        if ops.relu_pool and (order == ["relu", "pool"] or order == ["relu", "lrn", "pool"] and not self.lrn):
            return partial(ops.relu_pool, **pooling)
        return None

    @nn.nowrap
    def _lrn_constants(self):
        k, n, alpha, beta = VARIANTS[self.variant].lrn
        return dict(k=k, n=n, alpha=alpha if self.lrn_alpha is None else self.lrn_alpha, beta=beta)

    @nn.nowrap
    def _lrn(self, towers):
        constants = self._lrn_constants()
        if VARIANTS[self.variant].lrn_across_towers:
            x = self._ops.local_response_norm(all_gather_towers(towers), **constants)
            return jnp.split(x, self.towers, axis=-1)
        return [self._ops.local_response_norm(x, **constants) for x in towers]

    @nn.nowrap
    def _dense(self, name, x, train):
        """Return a list with the output of a fully connected layer, after its activation, with its dropout."""
        fields = self._fields(name)
        if not fields["features"]:
            return x
        dropout_on_inputs = VARIANTS[self.variant].dropout_on_inputs
        if dropout_on_inputs:
            x = self._dropout(name, x, train)
        x = [Dense(**fields)(x)]
        self._record(f"{name}{BEFORE}", x, "preactivations")
        with jax.named_scope(name):
            x = [self._activate(x[0])]
        self._record(name, x)
        return x if dropout_on_inputs else self._dropout(name, x, train)

    @nn.nowrap
    def _dropout(self, name, arrays, train):
        """Return arrays that each hold equally many towers, [B, ...], after the dropout of the layer `name`."""
        # Section 4.2: half of the outputs in training, half of each output in testing.
        keep_rate = 1 - self.dropout
        train_scale, test_scale = (1 / keep_rate, 1.0) if VARIANTS[self.variant].inverted_dropout else (1.0, keep_rate)
        if not train or not self.dropout:
            return [x * (train_scale if train else test_scale) for x in arrays]
        batch = arrays[0].shape[0]
        device_towers = self.towers // tower_devices(self.tower_axis)
        towers = device_towers // len(arrays)
        first_example = lax.axis_index(self.data_axis) * batch if self.data_axis else 0
        first_tower = lax.axis_index(self.tower_axis) * device_towers if self.tower_axis else 0

        def drop(key, x, first_tower):
            units = self._ops.dropout(key, x.reshape(batch, -1), self.dropout, towers, first_example, first_tower)
            return train_scale * units.reshape(x.shape)

        with jax.named_scope(name):
            key = self.make_rng("dropout")
            return [drop(key, x, first_tower + i * towers) for i, x in enumerate(arrays)]

    @nn.nowrap
    def _fields(self, name):
        """Return the fields that `Conv` and `Dense` share, for one of `LAYERS`."""
        variant, i = VARIANTS[self.variant], LAYERS.index(name)
        return dict(
            features=(*self.widths, self.num_classes)[i],
            kernel_init=nn.initializers.normal((self.kernel_std or variant.kernel_std)[i]),
            bias_init=nn.initializers.constant((self.bias or variant.bias)[i]),
            tower_axis=self.tower_axis,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name=name,
        )

    @nn.nowrap
    def _record(self, name, towers, collection="activations"):
        """Sow an output for `activations` or `features`; a later one of the same name replaces it."""
        if self.is_mutable_collection(collection) and not self.is_initializing():
            output = {name: jnp.concatenate(towers, axis=-1)}
            self.sow(collection, "outputs", output, reduce_fn=lambda old, new: old | new, init_fn=dict)


def activations(model: AlexNet, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Return every layer's output on a batch of images, without dropout.

    Args:
      params: the model's parameters, as `init(...)["params"]`.
      images: [B, H, W, C].

    Returns:
      The arrays named in `OUTPUTS`, in that order, without those of omitted layers; each after the activation, unless
      the variant applies it later. fc8 is the logits. The channels of tower 0 come before those of tower 1.

      fc6 and fc7 do not contain the factor 1 − `dropout` (section 4.2) by which the variants `paper` and `source2012`
      multiply them in testing.
    """
    outputs = model.apply({"params": params}, images, mutable=["activations"])[1]["activations"]["outputs"]
    return {name: outputs[name] for name in OUTPUTS if name in outputs}
