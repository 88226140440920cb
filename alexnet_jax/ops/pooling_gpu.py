"""What the kernels that end with max pooling (section 3.4) share, on NVIDIA GPUs.

A thread holds a group of channels of a pixel, its lanes. Neighboring threads of a warp read neighboring memory. Arrays
are [items, lanes]; only sums over channels split them into lanes, because Triton's compile time grows with the square
of the number of operations. A kernel takes a convolution's outputs as they are, one array or one per tower, and writes
the maxima as the next layer reads them, so that no other operation splits or concatenates them.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LANES = {jnp.dtype(jnp.bfloat16): 8, jnp.dtype(jnp.float32): 4}  # channels a thread: loads and stores of 16 bytes
WINDOW, STRIDE = 3, 2


class Blocks(NamedTuple):
    """The work items, rows of windows and warps of a program; a thread has one item where items = 32 · warps."""

    items: int = 128
    rows: int = 9
    warps: int = 4


class Layer(NamedTuple):
    """The static arguments of a call; `channels` are those of all towers."""

    batch: int
    height: int
    width: int
    channels: int
    lanes: int
    towers: int
    outputs: int  # arrays that the maxima are written to
    interpret: bool

    @property
    def rows(self):
        return (self.height - WINDOW) // STRIDE + 1

    @property
    def columns(self):
        return (self.width - WINDOW) // STRIDE + 1

    @property
    def pairs(self) -> tuple[int, int]:  # of columns and of rows of pixels
        return pl.cdiv(self.width, STRIDE), pl.cdiv(self.height, STRIDE)

    @property
    def maxima(self):
        return self.batch, self.rows, self.columns, self.channels

    @property
    def output(self):
        return *self.maxima[:3], self.channels // self.outputs

    @property
    def groups(self):
        return self.channels // self.lanes


class Items(NamedTuple):
    """The work items [items] of a program: an image, a column (of windows or of pairs of pixels), a channel group.

    A list of arrays [pixels, channels] holds the channels of equally many towers in each.
    """

    lanes: int
    groups: int
    inside: jax.Array
    image: jax.Array
    column: jax.Array
    group: jax.Array
    left: jax.Array  # whether the group before is of the same tower
    right: jax.Array

    @classmethod
    def of_program(cls, layer, columns, items):
        item = pl.program_id(0) * items + lax.iota(jnp.int32, items)
        group, pixel = item % layer.groups, item // layer.groups
        in_tower = layer.groups // layer.towers
        place = group % in_tower
        inside = item < layer.batch * columns * layer.groups
        at = pixel // columns, pixel % columns
        return cls(layer.lanes, layer.groups, inside, *at, group, place > 0, place < in_tower - 1)

    def pixel(self, layer, row, column):
        return (self.image * layer.height + row) * layer.width + column

    def window(self, layer, row, column):
        return (self.image * layer.rows + row) * layer.columns + column

    def has_window(self, layer, row, column):
        return self.inside & (row >= 0) & (row < layer.rows) & (column >= 0) & (column < layer.columns)

    def _elements(self, arrays, pixel, mask, step, size):
        """Yield each array, the group's elements from `step` on in it, and whether it holds them: [items, size]."""
        groups = self.groups // len(arrays)  # of an array
        for i, ref in enumerate(arrays):
            group, inside = pixel * groups + self.group % groups, mask
            if len(arrays) > 1:  # in Pallas' interpreter, a store without effect writes what was there
                holds = self.group // groups == i
                group, inside = jnp.where(holds, group, ref.shape[0] // self.lanes), mask & holds
            elements = (group * self.lanes + step)[:, None] + lax.broadcasted_iota(jnp.int32, (len(group), size), 1)
            yield ref, elements, jnp.broadcast_to(inside[:, None], elements.shape)

    def load(self, arrays, pixel, mask, step=0, size=None, other=0):
        """Return float32 [items, size], by default the group's lanes; `other` where mask [items] is false."""
        for ref, elements, inside in self._elements(arrays, pixel, mask, step, size or self.lanes):
            other = plgpu.load(ref.at[elements], mask=inside, other=other)
        return other.astype(jnp.float32)

    def load_with_neighbors(self, arrays, pixel, mask, reach, other=0):
        """Return the `reach` channels before the group, the group's, and as many after; `other` beyond the tower."""
        before = self.load(arrays, pixel, mask & self.left, -reach, reach, other)
        after = self.load(arrays, pixel, mask & self.right, self.lanes, reach, other)
        return before, self.load(arrays, pixel, mask, other=other), after

    def store(self, arrays, pixel, mask, values):
        for ref, elements, inside in self._elements(arrays, pixel, mask, 0, self.lanes):
            plgpu.store(ref.at[elements], values.astype(ref.dtype), mask=inside)

    def load_places(self, ref, window, mask, step=0, first=0, size=None):
        """Return positions of 0 to 15 [items, size] from lane `first` on of the group `step` further, or 15."""
        word = plgpu.load(ref.at[window * self.groups + self.group + step], mask=mask, other=-1).astype(jnp.int32)
        return (word[:, None] >> _bits(first, size or self.lanes)) & 15

    def store_places(self, ref, window, mask, places):
        """Store positions of 0 to 15 [items, lanes], all lanes in one word."""
        word = (places << _bits(0, self.lanes)).sum(1)
        plgpu.store(ref.at[window * self.groups + self.group], word.astype(ref.dtype), mask=mask)

    def store_bias_gradient(self, ref, layer, sums):
        """Store the sums [items, lanes] of a program, which `bias_gradient` adds up."""
        part = (pl.program_id(1) * layer.batch + self.image) * layer.pairs[0] + self.column
        self.store([ref], part, self.inside, sums)


def _bits(first, size):
    """Return int32 [1, size]: where in a word the four bits of each lane from `first` on start."""
    return 4 * (first + lax.broadcasted_iota(jnp.int32, (1, size), 1))


def kernel_call(
    kernel: Callable, layer: Layer, blocks: Blocks, columns: int, rows: int, out_shape: Any, name: str
) -> Callable[..., Any]:
    """Return the call of a kernel on items in so many columns, and so many rows."""
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(layer.batch * columns * layer.groups, blocks.items), pl.cdiv(rows, blocks.rows)),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=layer.interpret,
        name=name,
    )


def like(x, size, dtype):
    """Return the type of an output [size] that varies over the mesh axes that x varies over."""
    return jax.ShapeDtypeStruct((size,), dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def outputs(layer, x):
    """Return the types of the maxima, in the dtype of x."""
    return [like(x, prod(layer.output), x.dtype)] * layer.outputs


def places(layer, x):
    """Return the type of the maxima's positions, four bits each."""
    return like(x, prod(layer.maxima) // layer.lanes, f"int{4 * layer.lanes}")


def gradients(layer, inputs, blocks):
    """Return the types of the gradients of the inputs, and of the bias in parts."""
    columns, rows = layer.pairs
    parts = pl.cdiv(rows, blocks.rows) * layer.batch * columns
    return [like(x, x.size, x.dtype) for x in inputs], like(inputs[0], parts * layer.channels, jnp.float32)


def bias_gradient(layer, sums, bias):
    return sums.reshape(-1, layer.channels).sum(0).astype(bias.dtype)


def flat(arrays):
    return [x.reshape(-1) for x in arrays]


def in_shape(arrays, shape):
    return [x.reshape(shape) for x in arrays]


def unsupported(inputs: Sequence[jax.Array], towers: int, window: int, stride: int) -> str:
    """Return why a kernel does not take a convolution's outputs, each of equally many towers, or ""."""
    x, part = inputs[0], towers // len(inputs)
    if x.dtype not in LANES:
        return f"{x.dtype}: expected float32 or bfloat16"
    if (window, stride) != (WINDOW, STRIDE):
        return f"window={window}, stride={stride}: expected {WINDOW} and {STRIDE}"
    if x.ndim != 4 or min(x.shape[1:3]) < WINDOW or part < 1 or x.shape[3] % (8 * part) or x.size >= 2**31:
        return (
            f"shape {x.shape}, towers={part}: expected [B, H, W, C] with H and W from {WINDOW}, a multiple of "
            f"8 channels in each tower, and fewer than 2^31 elements"
        )
    return ""


def prepare(
    name: str, inputs: Sequence[jax.Array], bias: jax.Array, towers: int, outputs: int, interpret: bool
) -> tuple[jax.Array, Layer]:
    """Return the bias, varying over the mesh as the inputs do, and the layer; raises ValueError for its shape."""
    batch, height, width, channels = inputs[0].shape
    channels *= len(inputs)
    if bias.shape != (channels,):
        raise ValueError(f"{name}: bias of shape {bias.shape}: expected one number a channel, {(channels,)}")
    axes = jax.typeof(inputs[0]).manual_axis_type.varying - jax.typeof(bias).manual_axis_type.varying
    bias = lax.pcast(bias, tuple(axes), to="varying") if axes else bias
    return bias, Layer(batch, height, width, channels, LANES[inputs[0].dtype], towers, outputs, interpret)
