"""Several processes on this machine as one run: they train as one process does, and all end if one of them fails."""

import os
import signal

import jax
import numpy as np
import pytest
import synthetic_data
from runners import (
    ENVIRONMENT,
    TINY,
    assert_same_state,
    corrupt,
    end,
    follow,
    largest_file,
    losses,
    run_main,
    saved_state,
    start_main,
    start_processes,
)

from alexnet_jax.runtime import distributed

FLAGS = (
    *TINY, "--config.batch_size=48", "--config.num_train_steps=30", "--config.eval_every=15",
    "--config.ten_crop=False",
    "--config.learning_rate=0.005",  # at 0.02 rounding alone is 1e-5 of the loss after 15 steps
)  # fmt: skip
ONE_DEVICE_EACH = ("--config.mesh.cpu_devices=1", "--config.mesh.tower=2")  # the paper's two GPUs, in two machines


@pytest.fixture(scope="module")
def one_process(synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    code, output = run_main(folder, *FLAGS, "--config.mesh.cpu_devices=1", env=ENVIRONMENT)
    assert code == 0, output
    return folder


@pytest.fixture(scope="module")
def uninterrupted(synthetic, tmp_path_factory):
    """Two processes of one device and one tower each, which nobody stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    codes, outputs = end(start_processes(folder, *FLAGS, *ONE_DEVICE_EACH))
    assert codes == [0, 0], outputs
    return folder, outputs


def assert_same_training(folder, one_process):
    np.testing.assert_allclose(losses(folder), losses(one_process), rtol=1e-5)
    ours, theirs = saved_state(folder, 30), saved_state(one_process, 30)
    assert ours.keys() == theirs.keys()
    for path in theirs:
        if path.startswith("/params/"):  # of about 0.1; a ReLU at zero may go either way by rounding
            np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("data,tower", [(4, 1), (2, 2)])
def test_two_processes_of_two_devices_train_as_one_device_does(one_process, tmp_path, data, tower):
    codes, outputs = end(
        start_processes(tmp_path, *FLAGS, "--config.mesh.cpu_devices=2", f"--config.mesh.tower={tower}")
    )
    assert codes == [0, 0], outputs
    assert f"mesh {data} data × {tower} tower, 2 processes" in outputs[0]
    assert_same_training(tmp_path, one_process)


def test_a_tower_in_each_process(one_process, uninterrupted):
    folder, (first, second) = uninterrupted
    assert_same_training(folder, one_process)
    assert "test top-1 error" in first and second == ""
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["15", "30"]
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert {"config.json", "result.json", "filters.png"} < {p.name for p in folder.iterdir()}


def test_two_kills_a_signal_and_a_corrupt_checkpoint_do_not_change_the_result(uninterrupted, tmp_path):
    for killed, step in ((1, "step 5/"), (0, "step 20/")):  # before and after the first checkpoint
        processes = start_processes(tmp_path, *FLAGS, *ONE_DEVICE_EACH)
        follow(processes[0], step)
        processes[killed].kill()
        codes, outputs = end(processes, within=60)
        code, output = codes[1 - killed], outputs[1 - killed]
        # Python prints its message, or XLA prints its own first.
        messages = f"process {1 - killed} lost another process", "another task died"
        assert code != 0 and any(message in output for message in messages), output
    processes = start_processes(tmp_path, *FLAGS, *ONE_DEVICE_EACH)
    follow(processes[0], "step 20/")
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = end(processes)
    assert codes == [143, 143] and "stopped by SIGTERM" in outputs[0], outputs
    assert outputs[1].strip() == "SIGTERM: saving a checkpoint and exiting; press again to exit immediately"
    newest = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert newest > 20
    corrupt(largest_file(tmp_path / "checkpoints" / str(newest)))
    codes, outputs = end(start_processes(tmp_path, *FLAGS, *ONE_DEVICE_EACH))
    assert codes == [0, 0], outputs
    assert f"checkpoints/{newest} is corrupt" in outputs[0] and "resuming from the checkpoint of step 15" in outputs[0]
    assert "Traceback" not in outputs[0]
    assert_same_state(tmp_path, uninterrupted[0], 30)


@pytest.mark.parametrize("flags,each,words", [
    ([], [[], ["--config.batch_size=96", "--config.mesh.cpu_devices=3"]],
     "process 1 differs from process 0 in flags (batch_size: 48 in process 0, 96 in process 1; mesh: "),
    (["--initialization_timeout=3", "--num_processes=3"], [[], []], "Error: 3 s have passed and not all processes"),
])  # fmt: skip
def test_what_cannot_be_one_run_is_one_line_in_each_process(synthetic, tmp_path, flags, each, words):
    codes, outputs = end(
        start_processes(tmp_path / "run", *FLAGS, "--config.mesh.cpu_devices=2", *flags, each=each), within=60
    )
    assert codes == [1, 1], outputs
    for output in outputs:
        assert words in output and output.count("\n") == 1, output
    assert not (tmp_path / "run").exists()


def test_slurms_tasks_are_detected_and_a_mesh_without_some_of_their_devices_is_refused(synthetic, tmp_path):
    tasks = [
        {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
         "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)
    ]  # fmt: skip
    flags = (*FLAGS, "--config.mesh.cpu_devices=2", "--config.mesh.data=1")
    processes = [start_main(tmp_path / "run", *flags, env={**ENVIRONMENT, **task}) for task in tasks]
    codes, outputs = end(processes, within=60)
    assert codes == [1, 1], outputs
    for output in outputs:
        assert output.startswith(
            "Error: config.mesh of data=1, tower=1 leaves out some of the 4 devices of 2 processes"
        )
        assert output.count("\n") == 1


def test_a_process_that_fails_alone_prints_the_reason_and_does_not_wait(synthetic, tmp_path):
    (tmp_path / "file").write_text("")
    flags = [flag for flag in FLAGS if not flag.startswith("--config.data_dir=")]
    folders = [{"TFDS_DATA_DIR": str(folder)} for folder in (synthetic_data.DATA_DIR, tmp_path / "file")]
    other, failing = start_processes(tmp_path / "run", *flags, *ONE_DEVICE_EACH, environments=folders)
    codes, outputs = end([failing], within=60)
    other.kill()  # it would end when the heartbeats have stopped for 30 s
    other.communicate()
    assert codes == [1], outputs
    assert outputs[0].startswith("Error: config.dataset='synthetic': TFDS has no such data set"), outputs
    assert outputs[0].count("\n") == 1


@pytest.mark.parametrize("address,number,process,words", [
    (None, 2, None, "missing: --coordinator_address and --process_id;"),
    ("localhost", 2, 1, "--coordinator_address=localhost: expected HOST:PORT"),
    ("localhost:1", 2, 2, "--process_id=2: expected 0 to 1"),
])  # fmt: skip
def test_flags_that_name_no_process(address, number, process, words):
    with pytest.raises(distributed.DistributedError, match=words):
        distributed.start(address, number, process)


def test_a_task_that_asks_for_one_process_stays_alone(monkeypatch):
    for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"):
        monkeypatch.setenv(f"SLURM_{name}", "2")
    distributed.start(num_processes=1)
    assert not jax.distributed.is_initialized()
