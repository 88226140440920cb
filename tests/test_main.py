"""The training command in real processes: stopped by signals, on a full disk, and with wrong flags."""

import os
import resource
import signal
import subprocess
import sys
import time

import jax
import pytest
from runners import ROOT, SYNTHETIC, TINY, assert_same_state, corrupt, follow, largest_file, run_main, start_main


@pytest.fixture(scope="module")
def uninterrupted(synthetic, tmp_path_factory):
    """A run without interruption: (its workdir, its output)."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, output = run_main(folder, *TINY)
    assert code == 0, output
    return folder, output


def test_the_output(uninterrupted):
    _, output = uninterrupted
    for text in ("device ", "1,000 to train, 200 to validate, 200 to test", "conv1", "fc8", "step 20/40",
                 "validation error", "time left", "test top-1 error", "test top-5 error"):  # fmt: skip
        assert text in output, text


def test_a_run_that_is_killed_several_times_resumes_to_the_same_state(uninterrupted, tmp_path):
    for step in ("step 5/", "step 25/"):  # before the first checkpoint; between two
        process = start_main(tmp_path, *TINY)
        follow(process, step)
        process.kill()
        process.wait()
    process = start_main(tmp_path, *TINY)  # and while a checkpoint is being written
    deadline = time.monotonic() + 120
    while not list((tmp_path / "checkpoints").glob("*tmp*")):
        assert process.poll() is None and time.monotonic() < deadline
    process.kill()
    process.wait()
    assert list((tmp_path / "checkpoints").glob("*tmp*"))
    code, output = run_main(tmp_path, *TINY)
    assert code == 0 and "resuming from the checkpoint of step" in output, output
    assert_same_state(tmp_path, uninterrupted[0], 40)


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_a_corrupt_one_falls_back(uninterrupted, tmp_path, number, code):
    process = start_main(tmp_path, *TINY)
    follow(process, "step 15/")
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code and "checkpoint saved, run the same command to resume" in output
    assert "Traceback" not in output
    newest = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert newest >= 15
    corrupt(largest_file(tmp_path / "checkpoints" / str(newest)))
    code, output = run_main(tmp_path, *TINY)
    assert code == 0 and f"checkpoints/{newest} is corrupt" in output and "Traceback" not in output
    assert_same_state(tmp_path, uninterrupted[0], 40)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs a machine without a GPU")
def test_a_platform_that_is_not_there_is_one_line(synthetic, tmp_path):
    code, output = run_main(tmp_path, *TINY, env={**os.environ, "JAX_PLATFORMS": "cuda"})
    assert code == 1 and output.count("\n") == 1 and output.startswith("Error: JAX_PLATFORMS=cuda: "), output


@pytest.mark.parametrize("line,flags", [
    ("epoch 0.50", ("--config.train_split=train[:100]", "--config.test_split=train", "--config.ten_crop=True")),
    ("device ", ()),
])  # fmt: skip
def test_a_signal_in_the_set_up_or_the_test_stops_at_once_and_resumes(synthetic, tmp_path, line, flags):
    one_step = (*TINY, "--config.num_train_steps=1", "--config.log_every=1", *flags)
    process = start_main(tmp_path, *one_step)
    follow(process, line)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "run the same command to resume" in output and "Traceback" not in output
    assert not (tmp_path / "result.json").exists()
    if flags:
        assert time.monotonic() - sent < 5  # of minutes
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_another_config_is_refused_and_a_finished_run_reports(uninterrupted):
    folder, _ = uninterrupted
    code, output = run_main(folder, *TINY, "--config.momentum=0.8")
    assert code == 1 and "momentum: 0.9 in the workdir, 0.8 given" in output and output.count("\n") == 1
    code, output = run_main(folder, *TINY)
    assert code == 0 and "is finished" in output and "test top-1 error" in output


def test_a_second_ctrl_c_exits_immediately_and_a_second_run_is_refused(uninterrupted, tmp_path):
    process = start_main(tmp_path, *TINY)
    follow(process, "step 5/")
    process.send_signal(signal.SIGSTOP)
    code, output = run_main(tmp_path, *TINY)
    refused = f"Error: --workdir={tmp_path}: another process is training in it; wait for it, or stop it"
    assert code == 1 and output.splitlines()[-1] == refused and "Traceback" not in output
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    follow(process, "SIGINT: saving a checkpoint and exiting")
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in output


def test_a_corrupt_result_is_named(uninterrupted, tmp_path):
    (tmp_path / "result.json").write_text("{")
    code, output = run_main(tmp_path, *TINY)
    assert code == 1 and output == f"Error: {tmp_path}/result.json is not JSON; delete it to test the network again\n"


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of a file as Linux does")
def test_a_full_disk_keeps_the_last_good_checkpoint(uninterrupted, tmp_path):
    process = start_main(tmp_path, *TINY)
    follow(process, "step 15/")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    last = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    code, output = run_main(tmp_path, *TINY, preexec_fn=limit, env=environment)
    assert code == 1 and f"the last good checkpoint is step {last}" in output, output
    assert "Traceback" not in output and "Free some space" in output
    code, output = run_main(tmp_path, *TINY)
    assert code == 0
    assert_same_state(tmp_path, uninterrupted[0], 40)


def test_a_workdir_that_cannot_be_written(synthetic, tmp_path):
    (tmp_path / "file").write_text("")
    code, output = run_main(tmp_path / "file" / "run", *TINY)
    assert code == 1 and output.splitlines()[-1].startswith("Error: --workdir=") and "Traceback" not in output


@pytest.mark.parametrize("flags,words", [
    (["--config.num_train_step=5"], "config.num_train_step: no such field. Did you mean config.num_train_steps?"),
    (["--config.mesh.towers=2"], "config.mesh.towers: no such field. Did you mean config.mesh.tower?"),
    (["--config.batch_size=many"], "config.batch_size='many': expected a whole number"),
    (["--config.batch_size=1.5"], "config.batch_size='1.5': expected a whole number"),
    (["--config.mesh=2"], "config.mesh='2': expected its fields, config.mesh.cpu_devices, config.mesh.data"),
    (["--config.widths=32.,64,96,96,96,64,64"], "config.widths=(32.0, 64, 96, 96, 96, 64, 64): expected seven even"),
    (["--config.lrn=maybe"], "config.lrn='maybe': expected True or False"),
    (["--config.train_split=train", "--config.validation_split=test", "--config.test_split=dev"],
     "config.test_split: split 'dev' of synthetic: it has train (1,200)"),
    (["--config.mesh.foo=2"], "config.mesh.foo: no such field. The fields are mesh.cpu_devices, mesh.data, mesh.tower"),
    (["--config=/dev/null"], "--config=/dev/null: "),
    (["--config=alexnet_jax/errors.py"], "'get_config'; expected a Python file with a function get_config"),
    (["--config=no_such.py"], "--config=no_such.py: No such file or directory (expected a file or one of cifar10"),
    (["--config", "no_such.py"], "--config=no_such.py: No such file or directory (expected a file or one of cifar10"),
    (["--config=tests"], "--config=tests: Is a directory (expected a file or one of "),
    (["--config=tests/conftest.py"], "--config=tests/conftest.py: No module named 'downloads'"),
    (["--config=cifar"], "--config=cifar: No such file or directory (expected a file or one of cifar10, fashion_mnist"),
    (["--config=imagenet2012:nope"], "--config=imagenet2012:nope: expected one of paper, source2012, caffe, torch"),
    (["--config.seed=1", "--config=cifar10"], "--config.seed is before --config; give --config"),
    (["--config.seed=1", "--config=alexnet_jax/configs/cifar10.py"], "--config.seed is before --config; give --config"),
    (["--colour=1"], "colour"),
    (["8"], "unexpected argument '8'"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_line(synthetic, tmp_path, flags, words):
    code, output = run_main(tmp_path / "run", *flags, *SYNTHETIC)
    assert code == 1 and words in output and output.count("\n") == 1, output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("installed", [False, True])
def test_help_lists_the_flags(tmp_path, installed):
    script = tmp_path / "alexnet-train"  # as pip installs it
    script.write_text("from alexnet_jax.main import main\nmain()\n")
    command = [str(script)] if installed else ["-m", "alexnet_jax.main"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command, "--help"], env=environment, capture_output=True, text=True)
    for flag in ("--workdir", "--config", "--num_processes", "--compile_cache"):
        assert flag in done.stdout, done.stdout + done.stderr
