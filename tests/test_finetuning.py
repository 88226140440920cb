"""Runs that start from another network: what they take from it, what they train, and that they are runs as others."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_data
import tensorflow_datasets as tfds
import weight_files
from pages import SHELL, commands_of
from PIL import Image
from runners import CIFAR10, ROOT, assert_same_state, losses, saved_state, start_main, tiny_config

from alexnet_jax import AlexNet, Stem, activations, paper_sgd, sharding
from alexnet_jax.config import ConfigError
from alexnet_jax.configs import finetune
from alexnet_jax.data import load
from alexnet_jax.data.source import DataError
from alexnet_jax.evaluate import evaluate_workdirs
from alexnet_jax.export import export
from alexnet_jax.optimizer import scale_layers
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.probe import Head
from alexnet_jax.run import open_run
from alexnet_jax.train import train_and_evaluate
from alexnet_jax.train_step import create_state, make_train_step
from alexnet_jax.trained_layers import frozen_layers, layer_rates
from alexnet_jax.variants import LAYERS
from alexnet_jax.weights import load_weights, write_native
from alexnet_jax.workdir import WorkdirError

STEPS = 4
# The tiny network in one tower, with the LRN of pixels of another scale.
OTHER = dict(widths=(2, 2, 2, 2, 2, 2, 2), towers=1, input_scale=1.0, lrn_alpha=None, dropout=0.9)


def config_of(init, **fields):
    """A config of another network, whose fields are those of `init` in a run."""
    config = tiny_config(num_train_steps=STEPS, eval_every=2, learning_rate=0.01, init=str(init))
    with config.ignore_type():
        config.update(OTHER | fields)
    return config


def layers_of_state(state, part):
    return {path.removeprefix(part).split("/")[1] for path in state if path.startswith(part)}


def assert_close_state(ours, theirs, atol):
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        if path.startswith("/params") or "/velocity/" in path:
            np.testing.assert_allclose(ours[path], leaf, rtol=1e-3, atol=atol, err_msg=path)


@pytest.fixture(scope="module")
def file(opened, tmp_path_factory):
    """The network of `trained` as a file, with seven classes."""
    fc8 = {name: x[..., :7].copy() for name, x in opened.weights.params["fc8"].items()}
    weights = replace(
        opened.weights, model=opened.model.clone(num_classes=7), params=opened.weights.params | {"fc8": fc8},
        class_names=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("weights") / "seven.safetensors"
    write_native(weights, path)
    return path


@pytest.fixture(scope="module")
def tuned(file, tmp_path_factory):
    """A run from `file` with frozen convolutions: (working directory, log)."""
    folder, lines = tmp_path_factory.mktemp("tuned"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("alexnet_jax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train_and_evaluate(config_of(file, freeze="conv", learning_rates="fc=2,fc8=10"), folder)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return folder, "\n".join(lines)


@pytest.fixture(scope="module")
def probed(trained, tmp_path_factory):
    """A linear probe from the run `trained`, on other classes."""
    folder = tmp_path_factory.mktemp("probed")
    train_and_evaluate(config_of(trained, freeze="all_but_fc8", plateau_patience=1), folder)
    return folder


def test_frozen_layers_keep_their_bits_and_have_no_momentum(tuned, file):
    folder, log = tuned
    weights, state = load_weights(file), saved_state(folder, STEPS)
    for layer in LAYERS:
        for name, x in weights.params[layer].items():
            same = np.array_equal(state[f"/params/{layer}/{name}"], x)
            assert same == layer.startswith("conv"), (layer, name)
    velocities = {path.split("/")[-2] for path in state if "/velocity/" in path}
    assert velocities == {"fc6", "fc7", "fc8"}
    assert log.count("fc8 is reinitialized: config.init has 7 classes, and synthetic/1.0.0 has 10") == 1


def test_a_run_says_where_it_comes_from(tuned, file, tmp_path):
    folder, log = tuned
    config = json.loads((folder / "config.json").read_text())
    assert config["init"] == str(file) and re.fullmatch("[0-9a-f]{64}", config["init_sha256"])
    assert f"init       {file}, SHA-256 {config['init_sha256']}" in log
    assert "frozen     conv1, conv2, conv3, conv4, conv5\nrates      fc6 × 2, fc7 × 2, fc8 × 10\n" in log
    export(load_weights(folder), tmp_path / "out.safetensors")
    source = load_weights(tmp_path / "out.safetensors").source
    assert (source.init, source.init_sha256) == (config["init"], config["init_sha256"])


def test_the_network_and_its_image_preparation_are_those_of_the_file(tuned, file):
    weights, run = load_weights(file), open_run(tuned[0])
    assert run.model == weights.model.clone(num_classes=10, kernel_std=run.model.kernel_std, bias=run.model.bias)
    np.testing.assert_array_equal(run.preprocess.mean, weights.preprocess.mean)
    images = run.load("test[:20]").images
    ours, theirs = (
        activations(w.model, w.params, w.preprocess.center_crop(images))["pool5"] for w in (run.weights, weights)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_without_a_step_it_computes_what_the_network_computes(trained, opened, tmp_path):
    """Classes of the same names: fc8 is kept too."""
    train_and_evaluate(config_of(trained, num_train_steps=1, learning_rate=1e-30, weight_decay=0.0), tmp_path)
    images = opened.load("test[:20]").images
    np.testing.assert_array_equal(open_run(tmp_path).predict(images), opened.predict(images))


def test_images_of_another_size_take_the_mean_color_and_the_sizes_of_the_config(opened, synthetic_rgb, tmp_path):
    side, model = 40, opened.model.clone(towers=1)
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    mean = np.random.default_rng(0).uniform(0, 255, (side, side, 3)).astype(np.float32)
    weights = replace(
        opened.weights, model=model, params=jax.device_get(params), preprocess=replace(opened.preprocess, mean=mean)
    )
    write_native(weights, tmp_path / "rgb.safetensors")
    sizes = dict(dataset="synthetic_rgb", pad=0, image_size=30, resize=28, num_train_steps=1)
    train_and_evaluate(config_of(tmp_path / "rgb.safetensors", **sizes), tmp_path / "run")
    preprocess = open_run(tmp_path / "run").preprocess
    assert (preprocess.crop, preprocess.resize, preprocess.scale) == (30, 28, opened.preprocess.scale)
    assert preprocess.mean.shape == (32, 32, 3)
    np.testing.assert_allclose(preprocess.mean, np.broadcast_to(mean.mean((0, 1)), (32, 32, 3)), rtol=1e-6)
    with pytest.raises(ConfigError, match=r"fc6.kernel is .* inputs of 32×32 .* expected inputs of 28×28: .*resize=28"):
        train_and_evaluate(config_of(tmp_path / "rgb.safetensors", **sizes | {"resize": 32}), tmp_path / "other")
    assert not (tmp_path / "other").exists()  # the same command with another size is not refused


@pytest.mark.parametrize("run", ["tuned", "probed"])
def test_a_run_resumes_with_the_same_bits_and_without_the_file(run, request, file, trained, tmp_path, monkeypatch):
    folder = request.getfixturevalue(run)
    folder = folder[0] if run == "tuned" else folder
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "resumed")
    for path in ("result.json", "checkpoints/4"):
        target = tmp_path / "resumed" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    monkeypatch.setattr("alexnet_jax.finetuning.load_weights", lambda path: 1 / 0)
    fields = dict(freeze=config["freeze"], learning_rates=config["learning_rates"])
    given = config_of(config["init"], plateau_patience=config["plateau_patience"], **fields)
    train_and_evaluate(given, tmp_path / "resumed")
    assert_same_state(tmp_path / "resumed", folder, STEPS)
    for other in (dict(init_sha256="0" * 64), dict(freeze="conv1")):
        given.update(other)
        with pytest.raises((WorkdirError, ConfigError), match=next(iter(other))):
            train_and_evaluate(given, tmp_path / "resumed")
        given.update({k: config[k] for k in other})


def test_a_run_without_a_checkpoint_needs_the_same_file(file, trained, tmp_path):
    shutil.copy(file, tmp_path / "a.safetensors")
    given = config_of(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="SHA-256 .*; expected 00"):
        train_and_evaluate(config_of(file, init_sha256="00"), tmp_path / "run")
    train_and_evaluate(given, tmp_path / "run")
    for name in ("checkpoints", "result.json"):
        target = tmp_path / "run" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    write_native(load_weights(trained), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="has the SHA-256"):
        train_and_evaluate(given, tmp_path / "run")


@pytest.mark.parametrize("run", ["tuned", "probed"])
def test_towers_and_data_on_devices_of_their_own_give_the_same_network(run, request, tmp_path):
    folder = request.getfixturevalue(run)
    folder = folder[0] if run == "tuned" else folder
    config = json.loads((folder / "config.json").read_text())
    fields = {k: config[k] for k in ("freeze", "learning_rates", "plateau_patience")}
    given = config_of(config["init"], **fields)
    given.mesh.data, given.mesh.tower = 2, 2
    train_and_evaluate(given, tmp_path)
    assert_close_state(saved_state(tmp_path, STEPS), saved_state(folder, STEPS), atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path), losses(folder), rtol=1e-4)


@pytest.mark.parametrize(
    "variant,widths",
    [("paper", (2,) * 6 + (1000,)), ("paper", (2,) * 5 + (1000, 0)), ("caffe", (2,) * 6 + (1000,)),
     ("torchvision", (2,) * 6 + (1000,))],
)  # fmt: skip
def test_a_probe_draws_the_dropout_between_the_features_and_fc8(variant, widths):
    head = Head(num_classes=2, variant=variant, widths=widths, towers=1)
    params = {"fc8": {"kernel": jnp.ones((1000, 2)), "bias": jnp.zeros(2)}}
    trained = head.apply({"params": params}, jnp.ones((50, 1000)), train=True, rngs={"dropout": jax.random.key(0)})
    tested = head.apply({"params": params}, jnp.ones((50, 1000)))
    expected = {"paper": 500, "caffe": 1000, "torchvision": 1000}[variant]
    np.testing.assert_allclose(tested, expected)
    assert np.mean(trained) == pytest.approx(expected, rel=0.02)
    assert bool(np.std(trained)) == (variant != "torchvision")  # its dropout is before fc7


def test_a_probe_without_dropout_is_the_training_of_the_whole_network(opened, tmp_path):
    write_native(replace(opened.weights, model=opened.model.clone(dropout=0.0)), tmp_path / "a.safetensors")
    config = config_of(tmp_path / "a.safetensors", freeze="all_but_fc8", eval_every=STEPS)
    train_and_evaluate(config, tmp_path / "run")
    run, examples = open_run(tmp_path / "run"), load(opened.dataset.builder, config.train_split)
    state = create_state(run.model, paper_sgd(), run.preprocess.image_shape, config.seed)
    order_key, _ = jax.random.split(jax.random.wrap_key_data(state.key))
    order = jax.random.permutation(jax.random.fold_in(order_key, 0), len(examples.labels))
    # fc8 by NumPy, in float64: softmax regression on fc7 with the paper's update.
    fc7 = run.activations(examples.images).astype(np.float64)
    kernel, bias = (np.asarray(opened.params["fc8"][name], np.float64) for name in ("kernel", "bias"))
    v, u = np.zeros_like(kernel), np.zeros_like(bias)
    for i in range(STEPS):
        chosen = np.asarray(order[50 * i : 50 * (i + 1)])
        logits = fc7[chosen] @ kernel + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(50), examples.labels[chosen]] -= 1
        v = 0.9 * v - 0.01 * (5e-4 * kernel + fc7[chosen].T @ p / 50)
        u = 0.9 * u - 0.01 * (5e-4 * bias + p.mean(0))
        kernel, bias = kernel + v, bias + u
    np.testing.assert_allclose(run.params["fc8"]["kernel"], kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(run.params["fc8"]["bias"], bias, rtol=1e-3, atol=1e-5)


def test_a_probe_is_a_run_as_any_other(probed, opened, tmp_path):
    run = open_run(probed)
    for layer in LAYERS[:-1]:
        np.testing.assert_array_equal(run.params[layer]["kernel"], opened.params[layer]["kernel"])
    lines = [json.loads(line) for line in (probed / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation_top1_error" in line]
    assert [line["step"] for line in validated] == [2, 4]
    found = evaluate_workdirs([probed])  # the whole network, on the images
    assert found["center"]["top1_error"] == pytest.approx(validated[-1]["validation_top1_error"], abs=0.006)
    assert found["center"]["loss"] == pytest.approx(validated[-1]["validation_loss"], rel=1e-3)
    export(load_weights(probed), tmp_path / "probe.onnx", with_preprocessing=True)
    assert (tmp_path / "probe.onnx").stat().st_size


def test_a_probe_reads_pool5_of_a_network_without_fc6_and_fc7(synthetic, tmp_path):
    widths = (8, 16, 16, 16, 16, 0, 0)
    config = config_of("", towers=1, widths=widths, freeze="all_but_fc8", variant="torchvision", input_scale=1 / 70)
    train_and_evaluate(config, tmp_path)
    state = saved_state(tmp_path, STEPS)
    assert {path.split("/")[2] for path in state if path.startswith("/params")} == {*LAYERS[:5], "fc8"}
    assert {path.split("/")[-2] for path in state if path.startswith("/opt_state")} == {"fc8"}


def hlo(frozen, rates=None):
    model = AlexNet(num_classes=4, stem=Stem(3, 1, 1), widths=(8, 16, 16, 16, 16, 32, 32))
    optimizer = scale_layers(paper_sgd(), rates) if rates else paper_sgd()
    prepare = tiny_preprocess()
    state = create_state(model, optimizer, prepare.image_shape, 0, frozen=frozen)
    batch = sharding.place(
        (np.zeros((4, 28, 28, 3), np.uint8), np.zeros(4, np.int32)), sharding.one_device(), sharding.BATCH
    )
    step = make_train_step(model, optimizer, prepare, lambda step, plateau: jnp.float32(0.01), frozen=frozen)
    return step.lower(state, batch, jax.random.key(0)).compile().as_text()


def tiny_preprocess():
    return Preprocess(np.zeros((28, 28, 3), np.float32), pad=0, crop=28, resize=0, flip=True, lighting=None, scale=1.0)


@pytest.mark.parametrize("frozen", [("conv1", "conv2", "conv3"), ("conv1", "conv4")])
def test_no_gradient_is_computed_for_frozen_layers(frozen):
    text = hlo(frozen)
    backward = set(re.findall(r'op_name="[^"]*transpose\(jvp\(AlexNet\)\)/(conv\d|fc\d)/', text))
    first_trained = next(i for i, layer in enumerate(LAYERS) if layer not in frozen)
    assert backward == set(LAYERS[first_trained:])  # the gradient of a frozen layer's output passes it, above others
    forward = set(re.findall(r'op_name="[^"]*jvp\(AlexNet\)/(conv\d|fc\d)/', text))
    assert forward | set(re.findall(r"/AlexNet/(conv\d|fc\d)/", text)) >= set(LAYERS)


def test_rates_multiply_the_steps_of_their_layers():
    params = {"conv1": {"kernel": jnp.ones(3)}, "fc8": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}}
    gradients = jax.tree.map(lambda x: 0.3 * x, params)
    optimizer = scale_layers(paper_sgd(), {"conv1": 1.0, "fc8": 10.0})
    state = optimizer.init(params)
    for layer, rate in (("conv1", 0.01), ("fc8", 0.1)):  # each as if it were alone, with its own learning rate
        alone, own = {layer: params[layer]}, paper_sgd(rate)
        w, s, p, t = alone, own.init(alone), params, state
        for _ in range(3):
            updates, s = own.update({layer: gradients[layer]}, s, w)
            w = jax.tree.map(jnp.add, w, updates)
            updates, t = optimizer.update(gradients, t, p, learning_rate=0.01)
            p = jax.tree.map(jnp.add, p, updates)
        for name, x in w[layer].items():
            np.testing.assert_allclose(p[layer][name], x, rtol=1e-6)


def test_the_longest_name_decides():
    assert layer_rates(" fc8=10, conv=0.1,conv3=5,c=7 ", LAYERS) == {
        "conv1": 0.1, "conv2": 0.1, "conv3": 5, "conv4": 0.1, "conv5": 0.1, "fc6": 1, "fc7": 1, "fc8": 10,
    }  # fmt: skip
    assert set(layer_rates("", LAYERS).values()) == {1.0}
    assert frozen_layers("conv1, fc", LAYERS) == {"conv1", "fc6", "fc7", "fc8"}
    assert frozen_layers("all_but_fc8", LAYERS) == set(LAYERS) - {"fc8"}
    assert frozen_layers("", LAYERS) == frozenset()


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(freeze="conv9"), "config.freeze='conv9': no layer 'conv9'; expected some of conv1, "),
        (dict(freeze="conv1,"), "config.freeze='conv1,': no layer ''"),
        (dict(freeze="all_but_"), "no layer 'all_but_'"),
        (dict(freeze="conv,fc"), "it freezes every layer"),
        (
            dict(learning_rates="fc8"),
            "config.learning_rates='fc8': 'fc8' has no positive number; expected LAYER=FACTOR",
        ),
        (dict(learning_rates="fc8=-1"), "'fc8=-1' has no positive number"),
        (dict(learning_rates="fc8=nan"), "'fc8=nan' has no positive number; expected"),
        (dict(learning_rates="fc8=0"), "'fc8=0' has no positive number; to freeze layers, name them in freeze"),
        (dict(learning_rates="fc9=1"), "no trained layer 'fc9'"),
        (dict(freeze="conv1", learning_rates="conv1=2"), "no trained layer 'conv1'; expected LAYER=FACTOR"),
        (dict(learning_rates="fc8=1,fc8=2"), "'fc8' is given twice"),
        (dict(init_sha256="ab"), "config.init_sha256='ab': expected the SHA-256 of config.init, which is not set"),
        (dict(init="missing.pth"), "config.init: missing.pth: No such file or directory; expected torch's .pth"),
        (dict(init=str(ROOT / "README.md")), "not a file of weights"),
        (dict(init=str(ROOT / "tests")), "holds no run"),
        (dict(init="itself"), "config.init=.* is --workdir itself; expected another run: a run resumes without"),
        (dict(init="seven", dataset="synthetic_rgb"), r"takes images of 1 channel\(s\), and .* have 3"),
        (
            dict(init="seven", freeze="fc8"),
            "config.freeze: it freezes fc8, which is reinitialized .config.init has 7",
        ),
        (dict(init="seven", dataset="missing"), "has no such data set"),
    ],
)
def test_a_bad_value_is_one_line(fields, message, file, synthetic_rgb, tmp_path):
    paths = {"seven": str(file), "itself": str(tmp_path / "run")}
    fields = {k: paths.get(v, v) for k, v in fields.items()}
    with pytest.raises((ConfigError, DataError), match=message) as error:
        train_and_evaluate(tiny_config(**fields), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_the_config_finetune_needs_a_file(tmp_path):
    with pytest.raises(
        ConfigError, match="config.init is not set; expected --config.init=FILE, the weights or the run"
    ):
        train_and_evaluate(finetune.get_config(), tmp_path / "run")


@pytest.fixture(scope="module")
def own_images(tmp_path_factory):
    """A folder split/class/image with three classes of CIFAR-10, or with drawn images where that is missing."""
    root, names = tmp_path_factory.mktemp("own"), ("airplane", "automobile", "bird")
    if CIFAR10.exists():
        images, labels = load(tfds.builder("cifar10", data_dir=CIFAR10), "train[:300]")
    else:
        images, labels = synthetic_data.examples((32, 32, 3), 300, 0)
    for label, name in enumerate(names):
        for i, image in enumerate(images[labels == label][:9]):
            file = root / ("train" if i < 6 else "validation") / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    return root


def test_the_commands_of_the_documentation(own_images, tmp_path):
    """With a narrow network of torchvision's, and a few steps."""
    widths = (8, 8, 8, 8, 8, 16, 16)
    params = weight_files.random_params(widths, classes=5, towers=1)
    weight_files.torch_legacy(tmp_path / "a.pth", params)
    write_native(load_weights(tmp_path / "a.pth"), tmp_path / "torchvision.safetensors")
    (tmp_path / "IMAGES").symlink_to(own_images)
    for name, source in (("cat.jpg", "bird/6.png"), ("dog.jpg", "bird/7.png")):
        Image.open(own_images / "validation" / source).save(tmp_path / name)
    less = {
        "alexnet_jax.prepare": ("--workers=1",),
        "alexnet_jax.main": (
            "--config.num_train_steps=2", "--config.eval_every=2", "--config.batch_size=8", "--config.loader_workers=1",
        ),
    }  # fmt: skip
    blocks = [b for b in SHELL if b.needs == "a folder of images and a file of weights"]
    commands = [words for block in blocks for words in commands_of(block.text)]
    modules = [words[2].removeprefix("alexnet_jax.") for words in commands]
    assert modules == ["prepare", "main", "evaluate", "predict", "main"]
    output = ""
    for words in commands:
        command = [sys.executable, *words[1:], *less.get(words[2], ())]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        output += done.stdout
    assert "fc8 is reinitialized: config.init has 5 classes, and flowers_256/1.0.0 has 3" in output
    assert "frozen     conv1\nrates      fc8 × 10" in output
    assert "linear probe on fc7 of the center crops: 27 images" in output
    assert json.loads((tmp_path / "runs/flowers/evaluation.json").read_text())["examples"] == 9
    assert all(output.count(name) >= 2 for name in ("airplane", "automobile", "bird"))  # of two predictions
    first, probe = (load_weights(tmp_path / path) for path in ("torchvision.safetensors", "runs/probe"))
    for layer in LAYERS[:-1]:
        np.testing.assert_array_equal(probe.params[layer]["kernel"], first.params[layer]["kernel"])


def test_the_command_reports_a_foreign_file_in_one_line(synthetic, tmp_path):
    process = start_main(tmp_path / "run", f"--config.init={ROOT / 'README.md'}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and output.startswith("Error: config.init: ") and output.count("\n") == 1, output
