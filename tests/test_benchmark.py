"""The benchmark on a small network: what it counts against sums by hand, what it computes against PyTorch."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile

import chex
import jax
import numpy as np
import pytest
from runners import ROOT, wait_for

import experiments.command
from alexnet_jax import AlexNet
from alexnet_jax.errors import UserError
from alexnet_jax.model import LAYERS, OUTPUTS
from experiments import measure
from experiments.benchmark import __main__ as command
from experiments.benchmark import growth, layers, operations, programs, report, step
from experiments.benchmark.peer import Peer, differences
from experiments.benchmark.setting import Setting

SMALL = AlexNet(num_classes=10, widths=(8, 16, 16, 16, 16, 32, 32))
SETTING = Setting(SMALL, (64, 64, 3), (2, 4), ("float32",), 1, sys.executable, quick=True)
# Multiplications and additions of an image forward, by the sizes of section 3.5: kernels × channels that each sees ×
# (pixels × taps, along a side, less the taps that fall on the padding)².
PAPER = {
    "conv1": 2 * 96 * 3 * (55 * 11 - 3) ** 2,
    "conv2": 2 * 256 * 48 * (27 * 5 - 6) ** 2,
    "conv3": 2 * 384 * 256 * (13 * 3 - 2) ** 2,
    "conv4": 2 * 384 * 192 * (13 * 3 - 2) ** 2,
    "conv5": 2 * 256 * 192 * (13 * 3 - 2) ** 2,
    "fc6": 2 * 9216 * 4096,
    "fc7": 2 * 4096**2,
    "fc8": 2 * 4096 * 1000,
}


def test_the_operations_of_each_layer_are_the_papers():
    counted = {}
    for layer in layers.layers_of(AlexNet(), 1, (224, 224, 3)):
        outputs = jax.eval_shape(layer.function, layer.params, layer.inputs)
        forward, both = (
            measure.flops(jax.jit(function).trace(layer.params, layer.inputs, outputs))
            for function in layers.forward_and_backward(layer)
        )
        counted[layer.name] = forward, both - forward
    assert list(counted) == list(OUTPUTS)
    for name, flops in PAPER.items():
        forward, backward = counted[name]
        assert forward == pytest.approx(flops, rel=0.02), name  # the bias, ReLU and dropout are counted too
        assert backward == pytest.approx(flops if name == "conv1" else 2 * flops, rel=0.01), name


def test_the_least_bytes_are_each_array_once():
    by_name = {layer.name: layer for layer in layers.layers_of(AlexNet(), 2, (224, 224, 3))}
    x, y, w = 4 * 2 * 27**2 * 96, 4 * 2 * 27**2 * 256, 4 * (25 * 48 * 256 + 256)
    assert layers.least_bytes(by_name["conv2"]) == (x + w + y, 2 * x + 2 * w + y)
    images, y, w = 4 * 2 * 224**2 * 3, 4 * 2 * 55**2 * 96, 4 * (121 * 3 * 96 + 96)
    assert layers.least_bytes(by_name["conv1"]) == (images + w + y, images + 2 * w + y)  # no gradient of the images


def test_a_training_step_counts_as_its_layers_do():
    call = programs.training_step(SMALL, 2, (64, 64, 3))
    together = 0
    for layer in layers.layers_of(SMALL, 2, (64, 64, 3)):
        outputs = jax.eval_shape(layer.function, layer.params, layer.inputs)
        both = layers.forward_and_backward(layer)[1]
        together += measure.flops(jax.jit(both).trace(layer.params, layer.inputs, outputs))
    assert together < call.cost["flops"] < 1.5 * together  # also the images, the loss and the update
    state, _ = call.run()
    assert call.cost["donated_bytes"] >= measure.size((state.params, state.opt_state))
    assert call.cost["program_bytes"] > call.cost["donated_bytes"]


def test_pytorch_computes_the_same():
    python = os.environ.get("TORCH_PYTHON")  # an interpreter that has PyTorch, where this one has not
    if not python:
        pytest.importorskip("torch")
    peer = Peer(python or sys.executable)
    try:
        actual = differences(peer, SMALL, (64, 64, 3))
    finally:
        peer.close()
    assert set(actual) == {"logits", *(f"{layer}/{x}" for layer in LAYERS for x in ("kernel", "bias"))}
    assert max(actual.values()) < 1e-4


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed here")
def test_without_pytorch_it_is_measured_alone(capsys):
    result = step.run(SETTING._replace(batches=(2,)))
    assert result["torch"] is None and [c["peers"] for c in result["cases"]] == [[], []]
    assert "Measured alone, without PyTorch: ModuleNotFoundError" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed here")
def test_the_python_that_is_named_must_have_pytorch(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    with pytest.raises(UserError, match="python cannot import torch: ModuleNotFoundError: No module named 'torch'"):
        step.run(SETTING._replace(batches=(2,), torch_python=str(python)))


@pytest.mark.parametrize("names", [*((name,) for name in operations.OWN), operations.OWN], ids=", ".join)
def test_xlas_operations_compute_the_same(names):
    images = np.random.default_rng(3).normal(0, 64, (2, 64, 64, 3)).astype(np.float32)
    params = jax.tree.map(lambda x: 5 * x, SMALL.init(jax.random.key(0), images)["params"])

    def gradients(model):
        return jax.grad(lambda params: (model.apply({"params": params}, images) ** 2).sum())(params)

    expected = gradients(SMALL)
    actual = gradients(operations.with_plain(SMALL, *names))
    for layer, leaves in expected.items():
        for name, gradient in leaves.items():
            largest = np.abs(gradient).max()
            assert largest > 0
            chex.assert_trees_all_close(actual[layer][name] / largest, gradient / largest, atol=1e-4)


def test_the_exponent_of_a_curve():
    curve = [{"flops": x, "seconds": 3 * x**1.5} for x in (1e9, 2e9, 7e9)]
    assert growth.exponent(curve) == pytest.approx(1.5)


def test_the_memory_of_an_image():
    cases = [{"pass": "training", "dtype": "float32", "batch": b, "program_bytes": 500 + 7 * b} for b in (1, 8, 32)]
    assert report.memory_model({"cases": cases}, "float32") == pytest.approx((500, 7))


def test_the_command_and_what_it_leaves(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmark", f"--workdir={tmp_path}", "--quick", "--batches=2"]
    done = subprocess.run([*command, "--parts=step"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "benchmark.json").read_text())
    part = records["step"]
    assert set(records) == {"step"} and part["device"] and part["date"] and part["jax"] == jax.__version__
    cases = {(c["pass"], c["batch"]): c for c in part["cases"]}
    assert set(cases) == {("training", 2), ("inference", 2)}
    for case in cases.values():
        assert case["seconds"] == pytest.approx(np.median(case["rounds_s"]))
        assert case["images_per_s"] == pytest.approx(case["batch"] / case["seconds"])
        assert case["flops"] > 0 and case["bytes"] > 0 and case["compile_s"] > 0 and case["program_bytes"] > 0
    assert cases["training", 2]["flops"] > 2 * cases["inference", 2]["flops"]
    text = (tmp_path / "benchmark.md").read_text()
    assert "## Training and inference" in text and f"{part['device']}, {part['date']}" in text
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags,words", [
    (["--parts=speed"], "--parts: unknown part 'speed'; the parts are step"),
    (["--batches=8,many"], "--batches=8,many: expected positive numbers"),
    (["--dtypes=float16"], "--dtypes: 'float16'"),
    (["--colour=1"], "unexpected argument '--colour=1'"),
    (["--config.batch_siz=1"], "config.batch_siz: no such field. Did you mean config.batch_size?"),
])  # fmt: skip
def test_bad_flags_are_one_line(tmp_path, flags, words):
    with pytest.raises(SystemExit) as stop:
        command.main([f"--workdir={tmp_path / 'out'}", *flags])
    assert words in stop.value.code and "\n" not in stop.value.code and not (tmp_path / "out").exists()


def test_a_stopped_process_leaves_no_temporary_folder(tmp_path, monkeypatch):
    """Neither one that exits, nor one that does not react to SIGTERM, nor the command between."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(experiments.command, "EXIT_S", 1)
    for ignore in ("", "signal.signal(signal.SIGTERM, signal.SIG_IGN); "):
        code = f"import signal, tempfile, time; {ignore}print(tempfile.mkdtemp(), flush=True); time.sleep(1000)"
        command = [sys.executable, "-c", code]
        with (
            pytest.raises(SystemExit),
            experiments.command.child_process(command, stdout=subprocess.PIPE, text=True) as process,
        ):
            assert process.stdout.readline().startswith(str(tmp_path))
            raise SystemExit(143)
        assert process.returncode < 0 and not list(tmp_path.iterdir())


def test_a_stopped_benchmark_leaves_no_temporary_folder(tmp_path):
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "experiments.benchmark", f"--workdir={tmp_path}/run", "--quick"]
    process = subprocess.Popen(
        [*command, "--parts=stream,start"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "TMPDIR": f"{tmp_path}/tmp"},
    )  # fmt: skip
    wait_for(lambda: list((tmp_path / "tmp").glob("*/*/images/train")), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "Traceback" not in output, output
    assert not list((tmp_path / "tmp").iterdir())
