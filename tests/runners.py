"""What several test files use: paths, a tiny config, commands as a user starts them, and checkpoints."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import synthetic_data

from alexnet_jax.configs import fashion_mnist

ROOT = Path(__file__).parents[1]
# Photographs and prepared data sets, which are not in this repository; tests that need them are skipped without them.
TEST_DATA = Path(os.environ.get("ALEXNET_TEST_DATA", ROOT.parent / "shared")) / "data"
PHOTOGRAPHS = TEST_DATA / "imagenet-samples"
CIFAR10 = TEST_DATA / "tfds"

# Compiled programs are shared between the processes of one test session.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Without optimization, code compiles in less than half the time; what it computes is the same up to rounding.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

SYNTHETIC = ("--config.dataset=synthetic", f"--config.data_dir={synthetic_data.DATA_DIR}")  # of the fixture `synthetic`

# A network of the same eight layers that trains in seconds.
TINY = (
    *SYNTHETIC,
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
# Only process 0 may write to JAX's cache of compiled programs, so the others compile each time: fast code matters less.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
TRAINED = dict(num_train_steps=40, eval_every=20, learning_rate=0.02)  # fields of the fixture `trained`
SHARD = 8  # images in a shard of a data set that a test prepares


def tiny_config(**fields):
    """The config of `TINY` with other steps, and some fields changed."""
    config = fashion_mnist.get_config()
    config.dataset, config.data_dir = "synthetic", str(synthetic_data.DATA_DIR)
    config.ten_crop = False
    config.widths = (8, 16, 16, 16, 16, 32, 32)
    config.kernel_std = (0.28, 0.1, 0.12, 0.12, 0.12, 0.3, 0.25, 0.05)
    config.train_split, config.validation_split, config.test_split = "train[:1000]", "train[1000:1200]", "test[:200]"
    config.num_train_steps, config.batch_size, config.warmup_steps = 6, 50, 0
    config.linear_decay = False
    config.mesh.data = 1
    config.update(fields)
    return config


def start_main(workdir, *flags, **popen):
    """Start `python -m alexnet_jax.main` as a user does, its output in a pipe."""
    command = [sys.executable, "-m", "alexnet_jax.main", "--workdir", str(workdir), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen)


def run_main(workdir, *flags, **popen):
    """Run the command of `start_main` to the end: (exit code, output)."""
    process = start_main(workdir, *flags, **popen)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def follow(process, text):
    """Read the output until a line begins with `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text):
            return
    raise AssertionError(f"no line begins with {text!r}:\n{''.join(lines)}")


def start_processes(workdir, *flags, each=((), ()), environments=({}, {})):
    """Start the processes of one run on a free port, with the same flags and for each some of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = (f"--coordinator_address=localhost:{port}", f"--num_processes={len(each)}", *flags)
    return [
        start_main(workdir, *common, f"--process_id={i}", *own, env={**ENVIRONMENT, **environment})
        for i, (own, environment) in enumerate(zip(each, environments, strict=True))
    ]


def end(processes, within=120):
    """Wait for all processes: (exit codes, outputs)."""
    deadline = time.monotonic() + within
    outputs = [p.communicate(timeout=max(1, deadline - time.monotonic()))[0] for p in processes]
    # gloo, which carries the CPU's collectives, prints what it is connected to
    outputs = ["".join(x for x in out.splitlines(keepends=True) if not x.startswith("[Gloo]")) for out in outputs]
    return [p.returncode for p in processes], outputs


def losses(workdir):
    """All losses of a run, in their order."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [x[k] for x in lines for k in ("train_loss", "validation_loss") if k in x]


def saved_state(workdir, step):
    """Every array of a checkpoint, by its path in the tree, as Orbax alone reads it."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # for arrays of devices that this process lacks
    tree = ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(
        Path(workdir).absolute() / "checkpoints" / str(step) / "state",
        args=ocp.args.StandardRestore(fallback_sharding=device),
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


def assert_same_state(workdir, other, step):
    """Assert that two runs saved the same bits."""
    ours, theirs = saved_state(workdir, step), saved_state(other, step)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf, path)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def corrupt(path, how="truncated"):
    """Truncate a file, flip one of its bits, or remove it."""
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "a bit flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


def files_of(folder):
    """The contents of a folder's files, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def blocked_workers(folder, name):
    """The environment of a command whose worker processes block for good, and the folder of their process IDs.

    Args:
      folder: for the module that Python imports at each start.
      name: a part of a file's name; they block when they open the first one.
    """
    (folder / "pids").mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "def block(event, arguments):\n"
        f"    if event == 'open' and {name!r} in str(arguments[0]):\n"
        f"        os.mkdir({str(folder / 'pids')!r} + f'/{{os.getpid()}}')\n"
        "        time.sleep(1000)\n"
        "if '--multiprocessing-fork' in sys.orig_argv:\n"
        "    sys.addaudithook(block)\n"
    )
    return {**ENVIRONMENT, "PYTHONPATH": str(folder)}, folder / "pids"


def wait_for(condition, process, within=120):
    """Wait until a condition is true while a process runs."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
