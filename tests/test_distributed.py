"""Several real processes on this machine as one run: the same training, and an orderly end whatever happens to one."""

import json
import os
import signal
import socket
import time

import numpy as np
import pytest
from conftest import TINY, run_main, saved_state, start_main
from test_main import follow

FLAGS = (
    *TINY, "--config.batch_size=48", "--config.num_train_steps=20", "--config.ten_crop=False",
    "--config.learning_rate=0.005",  # at 0.02 rounding alone is 1e-5 of the loss after 20 steps
)  # fmt: skip
# Only process 0 may write to JAX's cache of compiled programs, so the others compile each time: fast code matters less.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
ONE_DEVICE_EACH = ("--config.mesh.cpu_devices=1", "--config.mesh.tower=2")  # the paper's two GPUs, in two machines


def start_processes(workdir, *flags, each=((), ())):
    """Starts a process for each of `each`, with its own flags."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = (*FLAGS, f"--coordinator_address=localhost:{port}", f"--num_processes={len(each)}", *flags)
    return [start_main(workdir, *common, f"--process_id={i}", *own, env=ENVIRONMENT) for i, own in enumerate(each)]


def end(processes, within=120):
    """Waits for all: (exit codes, outputs)."""
    deadline = time.monotonic() + within
    outputs = [p.communicate(timeout=max(1, deadline - time.monotonic()))[0] for p in processes]
    # gloo, which carries the CPU's collectives, says on its own what it is connected to
    outputs = ["".join(x for x in out.splitlines(keepends=True) if not x.startswith("[Gloo]")) for out in outputs]
    return [p.returncode for p in processes], outputs


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [x[k] for x in lines for k in ("train_loss", "validation_loss") if k in x]


@pytest.fixture(scope="module")
def one_process(fashion_mnist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    code, output = run_main(folder, *FLAGS, "--config.mesh.cpu_devices=1", env=ENVIRONMENT)
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def uninterrupted(fashion_mnist, tmp_path_factory):
    """Two processes of one device and one tower each, which nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    codes, outputs = end(start_processes(folder, *ONE_DEVICE_EACH))
    assert codes == [0, 0], outputs
    return folder, outputs


def assert_same_training(folder, one_process):
    np.testing.assert_allclose(losses(folder), losses(one_process), rtol=1e-5)
    ours, theirs = saved_state(folder, 20), saved_state(one_process, 20)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("data,tower", [(4, 1), (2, 2)])
def test_two_processes_of_two_devices_train_as_one_device_does(one_process, tmp_path, data, tower):
    codes, outputs = end(start_processes(tmp_path, "--config.mesh.cpu_devices=2", f"--config.mesh.tower={tower}"))
    assert codes == [0, 0], outputs
    assert f"mesh {data} data × {tower} tower, 2 processes" in outputs[0]
    assert_same_training(tmp_path, one_process)


def test_a_tower_in_each_process(one_process, uninterrupted):
    folder, (first, second) = uninterrupted
    assert_same_training(folder, one_process)
    assert "test top1 error" in first and second == ""
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["10", "20"]
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert {"config.json", "result.json", "filters.png"} < {p.name for p in folder.iterdir()}


def test_two_deaths_and_a_signal_later_it_ends_the_same(uninterrupted, tmp_path):
    for victim, step in ((1, "step 5/"), (0, "step 15/")):  # before and after the first checkpoint
        processes = start_processes(tmp_path, *ONE_DEVICE_EACH)
        follow(processes[0], step)
        processes[victim].kill()
        killed = time.monotonic()
        codes, outputs = end(processes, within=60)
        print(f"process {1 - victim} ended {time.monotonic() - killed:.1f} s after process {victim} was killed")
        assert codes[1 - victim] not in (0, None)
        # Python says it, or XLA before it could.
        words = (f"Error: process {1 - victim} lost another process", "another task died")
        assert any(w in outputs[1 - victim] for w in words), outputs[1 - victim]
    processes = start_processes(tmp_path, *ONE_DEVICE_EACH)
    follow(processes[0], "step 15/")
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = end(processes)
    assert codes == [143, 143], outputs
    assert "stopped by SIGTERM at step 20" in outputs[0] or "saved; the same command goes on" in outputs[0]
    codes, outputs = end(start_processes(tmp_path, *ONE_DEVICE_EACH))
    assert codes == [0, 0], outputs
    ours, theirs = saved_state(tmp_path, 20), saved_state(uninterrupted[0], 20)
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf, path)
