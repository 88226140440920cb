"""Dropout (section 4.2) with its random numbers drawn in one kernel, on NVIDIA GPUs.

XLA draws them in ten small operations a layer, most of them for the keys of the examples and towers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from alexnet_jax.ops.dropout import check_dropout, dropout

BLOCK = 1024  # units of a program
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def _threefry(key, x0, x1):
    """Return the two words of Threefry-2x32 with 20 rounds (Salmon et al., 2011), as `jax.random` draws them."""
    k0, k1 = key
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def _kernel(key_refs, example_ref, tower_ref, keep_ref, *, rate, towers, units):
    example, tower, block = (pl.program_id(axis) for axis in range(3))
    zero = jnp.uint32(0)
    key = tuple(ref[0] for ref in key_refs)
    for index in (example_ref[0] + example, tower_ref[0] + tower):  # `jax.random.fold_in`
        key = _threefry(key, zero, index.astype(jnp.uint32))
    unit = block * BLOCK + lax.iota(jnp.int32, BLOCK)
    high, low = _threefry(key, jnp.zeros(BLOCK, jnp.uint32), unit.astype(jnp.uint32))
    bits = ((high ^ low) >> jnp.uint32(9)) | jnp.uint32(0x3F800000)  # a float32 from 1 to 2
    keep = lax.bitcast_convert_type(bits, jnp.float32) - 1.0 < jnp.float32(1 - rate)
    places = (example * towers + tower) * units + unit
    plgpu.store(keep_ref.at[places], keep.astype(jnp.int8), mask=unit < units)


def keep_mask(
    key: jax.Array, shape: tuple[int, ...], rate: float, towers: int, first_example: jax.Array | int,
    first_tower: jax.Array | int, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Return the mask of `ops.dropout`, int8 [B, N]: 1 where a unit is kept."""
    batch, units = shape[0], shape[1] // towers
    # A number each: one array of them would be an operation of its own.
    scalars = [*jax.random.key_data(key), jnp.int32(first_example), jnp.int32(first_tower)]
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in scalars))

    def argument(x):
        axes = tuple(varying - jax.typeof(x).manual_axis_type.varying)
        return (lax.pcast(x, axes, to="varying") if axes else x).reshape(1)

    *words, example, tower = map(argument, scalars)
    mask = pl.pallas_call(
        partial(_kernel, rate=rate, towers=towers, units=units),
        grid=(batch, towers, pl.cdiv(units, BLOCK)),
        out_shape=jax.ShapeDtypeStruct(
            (batch * towers * units,), jnp.int8, manual_axis_type=jax.typeof(example).manual_axis_type
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="dropout",
    )(words, example, tower)
    return mask.reshape(shape)


def gpu_dropout(
    key: jax.Array,
    x: jax.Array,
    rate: float = 0.5,
    towers: int = 2,
    first_example: jax.Array | int = 0,
    first_tower: jax.Array | int = 0,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return what `ops.dropout` returns, the same units bit for bit; `interpret` runs without a GPU, as tests do."""
    check_dropout(x, rate, towers)
    is_threefry = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and "threefry" in str(jax.random.key_impl(key))
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    if not is_threefry or not partitionable:  # other numbers than the kernel's
        return dropout(key, x, rate, towers, first_example, first_tower)
    keep = keep_mask(key, x.shape, rate, towers, first_example, first_tower, interpret)
    return jnp.where(keep > 0, x, jnp.zeros((), x.dtype))
