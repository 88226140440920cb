"""Descriptions of accelerators, from which XLA compiles on a machine without one."""

import importlib
import importlib.util
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from alexnet_jax.errors import UserError, one_line

# XLA's own description of the GPU; the versions are those of the libraries that it compiles with.
H100 = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: {cuda} minor: {minor} }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class TargetError(UserError):
    """An unknown target, or one whose compiler is not installed."""


class Chip(NamedTuple):
    """The stated figures of a chip; bytes/s and FLOP/s in bfloat16."""

    name: str
    bandwidth: float
    flops: float
    memory: float


# By the vendors' data sheets.
CHIPS = {
    "h100": Chip("NVIDIA H100 SXM", 3.35e12, 989e12, 80e9),
    "v5e": Chip("TPU v5e", 819e9, 197e12, 16e9),
    "v5p": Chip("TPU v5p", 2765e9, 459e12, 95e9),
    "v6e": Chip("TPU v6e", 1640e9, 918e12, 32e9),
}


class Target(NamedTuple):
    """Devices that are described, not present."""

    name: str
    chip: Chip
    devices: list


def find(name: str) -> Target:
    """Return the devices of a target: `h100`, `h100:N` for N GPUs of a node, or a TPU slice as `v5e:2x2`.

    Raises:
      TargetError: no such target, or the extra that compiles for it is not installed.
    """
    chip, _, shape = name.partition(":")
    if chip == "h100" and re.fullmatch(r"[1-8]?", shape):
        return Target(name, CHIPS[chip], _gpus(int(shape or 1)))
    if chip in CHIPS and chip != "h100" and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        return Target(name, CHIPS[chip], _tpus(name))
    raise TargetError(
        f"--target={name}: expected h100, h100:N with N up to 8, or a TPU slice such as v5e:2x2, v6e:2x4 or v5p:2x2x1"
    )


def _gpus(count: int) -> list:
    plugins = {"13": ("jax_cuda13_plugin", "0"), "12": ("jax_cuda12_plugin", "9")}
    cuda = next((cuda for cuda, (package, _) in plugins.items() if importlib.util.find_spec(package)), None)
    if not cuda:
        raise TargetError('--target: compiling for a GPU needs JAX\'s CUDA plugin: pip install -e ".[compile-gpu]"')
    # Autotuning would run kernels.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    jax.config.update("jax_platforms", "cpu")
    jax.devices()  # JAX registers its plugins now, and logs an error if one is registered already
    try:
        importlib.import_module(f"jax_plugins.xla_cuda{cuda}").initialize()
    except Exception as error:  # it is registered already, with or without a GPU
        if "ALREADY_EXISTS" not in str(error):
            raise TargetError(f"--target: JAX's CUDA plugin does not start: {one_line(error)}") from None
    text = H100.format(cuda=cuda, minor=plugins[cuda][1])
    return topologies.get_topology_desc("h100", platform="cuda", target_config=text, topology=f"1x1x{count}").devices


def _tpus(name: str) -> list:
    if not importlib.util.find_spec("libtpu"):
        raise TargetError('--target: compiling for a TPU needs libtpu: pip install -e ".[compile-tpu]"')
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may compile
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    one_chip = {"chips_per_host_bounds": [1, 1, 1]} if name.endswith(":1x1") else {}
    try:
        return topologies.get_topology_desc(name, platform="tpu", **one_chip).devices
    except Exception as error:  # a shape that this TPU does not have
        raise TargetError(f"--target={name}: {one_line(error)}") from None
