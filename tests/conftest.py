import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[1]
# Compiled programs are shared between the processes of one test session.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Code is compiled in less than half the time, and so is the suite; the program that it is made from is the same.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
DEVICES = 8  # virtual ones, for the meshes of these tests
os.environ.setdefault("PJRT_NPROC", str(os.cpu_count() + DEVICES))  # as sharding.make_mesh does
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.devices()  # started now: the first config that a test trains may ask for fewer

# A network of the same eight layers that trains in seconds, on a part of the real data.
TINY = (
    "--config.widths=8,16,16,16,16,32,32",
    "--config.kernel_std=0.28,0.1,0.12,0.12,0.12,0.3,0.25,0.05",
    "--config.train_split=train[:1000]",
    "--config.validation_split=train[1000:1200]",
    "--config.test_split=test[:200]",
    "--config.batch_size=50",
    "--config.num_train_steps=40",
    "--config.eval_every=10",
    "--config.log_every=5",
    "--config.warmup_steps=0",
    "--config.learning_rate=0.02",
)


def start_main(workdir, *flags, **popen):
    """`python -m alexnet_jax.main` as a user starts it, its output in a pipe."""
    command = [sys.executable, "-m", "alexnet_jax.main", "--workdir", str(workdir), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)


def run_main(workdir, *flags, **popen):
    """Runs it to the end: (exit code, output)."""
    process = start_main(workdir, *flags, **popen)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def saved_state(workdir, step):
    """Every array of a checkpoint, by its path in the tree, as Orbax alone reads it."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # for what was saved by devices that are not here
    tree = ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(
        Path(workdir).absolute() / "checkpoints" / str(step) / "state",
        args=ocp.args.StandardRestore(fallback_sharding=here),
    )
    leaves = {}

    def collect(path, node):
        if isinstance(node, dict):
            for name, child in node.items():
                collect(f"{path}/{name}", child)
        elif isinstance(node, list | tuple):
            for i, child in enumerate(node):
                collect(f"{path}/{i}", child)
        else:
            leaves[path] = np.asarray(node)

    collect("", tree)
    return leaves


@pytest.fixture(scope="session")
def fashion_mnist():
    """The real data set, prepared on first use where a user has it too."""
    from alexnet_jax import data

    return data.open_builder("fashion_mnist")


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory):
    """A folder with the four original files, fetched from wherever this machine can get them."""
    from alexnet_jax.fashion_mnist import find_files

    folder = tmp_path_factory.mktemp("idx")
    for name, content in find_files().items():
        (folder / name).write_bytes(content)
    return folder
