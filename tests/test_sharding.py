"""The two-tower split on virtual devices: the same training on any mesh, and communication where the paper has it."""

import json
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runners import ROOT, saved_state, tiny_config

from alexnet_jax import AlexNet, Stem, inference, paper_sgd, preprocess, sharding
from alexnet_jax.data import DeviceBatches, DeviceData, load
from alexnet_jax.model import all_gather_towers
from alexnet_jax.train import train_and_evaluate
from alexnet_jax.train_step import create_state, make_train_step
from experiments import sharding as harness

MESHES = [(1, 1), (1, 2), (4, 1), (2, 2), (4, 2)]
MODEL = AlexNet(num_classes=10, stem=Stem(5, 2, 2), widths=(8, 16, 24, 24, 16, 32, 24),
                kernel_std=(0.28, 0.1, 0.1, 0.12, 0.12, 0.3, 0.25, 0.05))  # fmt: skip


def twenty_steps(mesh, examples):
    optimizer, prepare = paper_sgd(), preprocess.fit(examples.images, 2, 28, 0, True, False, 1 / 70)
    state = create_state(MODEL, optimizer, prepare.image_shape, 0, mesh)
    step = make_train_step(MODEL, optimizer, prepare, lambda step, plateau: jnp.float32(0.02), mesh)
    data = DeviceData(examples, 32, mesh)
    losses = []
    for i in range(20):
        state, metrics = step(state, data.batch(jax.random.key(5), i), jax.random.key(i))
        losses.append(float(metrics["loss"]))
    network = inference.Network(MODEL, state.params, prepare)
    tested = inference.evaluate([network], DeviceBatches(examples, 48, mesh), mesh=mesh)
    return state, losses, tested


@pytest.fixture(scope="module")
def one_device(fashion_mnist):
    examples = load(fashion_mnist, "train[:203]")
    return examples, twenty_steps(sharding.make_mesh(1, 1), examples)


@pytest.mark.parametrize("data,tower", MESHES[1:])
def test_the_same_training_on_any_mesh(one_device, data, tower):
    examples, (_, losses, tested) = one_device
    state, sharded_losses, sharded_tested = twenty_steps(sharding.make_mesh(data, tower), examples)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    assert sharded_tested.confusion.sum() == len(examples.labels) == tested.confusion.sum()
    assert sharded_tested.loss == pytest.approx(tested.loss, rel=1e-4)
    kernel = state.params["conv2"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(5, 5, 4, 16 // tower)}
    velocity = state.opt_state.velocity["fc8"]["kernel"]
    assert {s.data.shape for s in velocity.addressable_shards} == {(24, 10 // tower)}


def in_program_and_in_theory(data, tower, model=MODEL):
    layout = harness.Layout(f"{data}x{tower}", data, tower)
    record = harness.measure(layout, model, (28, 28, 1), 16, steps=1)
    return record["collectives"], record["expected"]


@pytest.mark.parametrize("data,tower", [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (8, 1), (4, 2)])
def test_the_compiled_step_communicates_what_the_paper_says_and_nothing_else(data, tower):
    actual, expected = in_program_and_in_theory(data, tower)
    assert actual == expected
    where = {(c["layer"], c["axis"]) for c in actual if c["axis"] == "tower" and c["layer"] != "metrics"}
    assert where == ({(layer, "tower") for layer in ("conv3", "fc6", "fc7", "fc8")} if tower == 2 else set())
    if (data, tower) == (2, 2):  # conv3 sees 3×3 maps of 16 channels, 8 images on each device: by hand, in bytes
        conv3 = [c for c in actual if c["layer"] == "conv3" and c["axis"] == "tower"]
        assert [c["kind"] for c in conv3] == ["all-gather", "reduce-scatter"]
        assert {c["array_bytes"] for c in conv3} == {4 * 8 * 3 * 3 * 16} and {c["received"] for c in conv3} == {
            2 * 8 * 9 * 16
        }


def test_a_network_without_conv3_and_fc7_on_two_devices():
    """conv4 then takes its own tower's maps of conv2, and fc8 gathers fc6."""
    actual, expected = in_program_and_in_theory(1, 2, MODEL.clone(widths=(8, 16, 0, 24, 16, 32, 0)))
    assert actual == expected
    assert {c["layer"] for c in actual if c["layer"] != "metrics"} == {"fc6", "fc8"}


def test_a_gather_in_conv2_is_found():
    def gather_in_conv2(layer, inputs, kwargs, context):
        if context.module.name == "conv2":
            with jax.named_scope("conv2"):
                inputs = ([all_gather_towers(inputs[0], context.module.tower_axis)],)
        return layer(*inputs, **kwargs)

    with nn.intercept_methods(gather_in_conv2):
        actual, expected = in_program_and_in_theory(2, 2, MODEL.clone(num_classes=12))
    assert ("conv2", "tower") in {(c["layer"], c["axis"]) for c in actual}
    assert ("conv2", "tower") not in {(c["layer"], c["axis"]) for c in expected}


def test_a_checkpoint_resumes_on_any_other_mesh(synthetic, tmp_path):
    def run(folder, data, tower):
        config = tiny_config(num_train_steps=8, batch_size=48, eval_every=4)
        config.mesh.data, config.mesh.tower = data, tower
        return train_and_evaluate(config, folder)

    run(tmp_path / "first", 2, 2)
    for data, tower in ((1, 1), (1, 2), (8, 1)):
        folder = tmp_path / f"{data}x{tower}"
        shutil.copytree(tmp_path / "first", folder)
        (folder / "result.json").unlink()
        shutil.rmtree(folder / "checkpoints" / "8")  # what a kill between the two saves leaves
        assert f"mesh {data} data × {tower} tower" in run(folder, data, tower)["device"]
        end = saved_state(folder, 8)
        for path, leaf in saved_state(tmp_path / "first", 8).items():
            np.testing.assert_allclose(end[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


def test_the_harness_measures_every_layout(tmp_path):
    model = AlexNet(num_classes=16, stem=Stem(5, 2, 2), widths=(16, 16, 32, 32, 16, 32, 32))
    records = harness.study(devices=8, batch=16, steps=1, model=model, shape=(28, 28, 1))
    by_name = {r["layout"]: r for r in records}
    assert list(by_name) == [layout.name for layout in harness.LAYOUTS]
    one = by_name["one_device"]
    assert not one["collectives"] and one["optimizer_bytes"] == one["parameter_bytes"] > 0
    assert by_name["tower"]["parameter_bytes"] * 2 == one["parameter_bytes"]
    assert by_name["fsdp"]["parameter_bytes"] * 8 == one["parameter_bytes"]
    gathered = {c["layer"] for c in by_name["fsdp"]["collectives"] if c["kind"] == "all-gather"}
    assert {"conv1", "conv5", "fc6", "fc8"} <= gathered
    back = [c for c in by_name["one_weird_trick"]["collectives"] if c["layer"] == "fc6" and c["backward"]]
    assert all(c["array_bytes"] < 4 * (16 * 32 + 32) for c in back)  # fc6's gradient stays where its kernel is
    for record in records:
        assert record["step_s"] > 0 and record["compile_s"] > 0 and record["temporary_bytes"] > 0
        assert record["received_bytes"] >= record["minimum_bytes"]
    assert harness.table(records).count("\n") == len(records) + 1
    harness.plot(records, tmp_path / "sharding.png")
    assert (tmp_path / "sharding.png").stat().st_size > 10_000
    json.dumps(records)


@pytest.mark.parametrize("flags,words", [
    (["--layouts=ring"], "unknown layout 'ring'; expected some of one_device"),
    (["--devices=2", "--layouts=data", "--batch=3"], "--batch=3: data splits a batch into 2 parts"),
    (["--devices=0"], "--devices=0"),
    (["--batch=0"], "--batch=0: expected a positive number"),
    (["--devices=3", "--batch=6", "--layouts=data,one_weird_trick"], "--devices=3: one_weird_trick splits the 4096"),
    (["--devices=1", "--layouts=tower"], "--devices=1: tower needs a multiple of 2"),
])  # fmt: skip
def test_the_harness_answers_bad_flags_in_one_line(tmp_path, flags, words):
    command = [sys.executable, "-m", "experiments.sharding", "--workdir", str(tmp_path), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
