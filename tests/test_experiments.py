"""The experiments: what they conclude from records whose answer is known, and that they run, resume and report."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weight_files
from runners import CIFAR10, ROOT

from alexnet_jax import VARIANTS, activations, data
from alexnet_jax.config import as_json, check_config, check_data
from alexnet_jax.data import Examples
from alexnet_jax.data.in_memory import load
from alexnet_jax.errors import UserError
from alexnet_jax.setup import build_model
from alexnet_jax.workdir import WorkdirError
from experiments import ablations, finetuning, remarks, study, summary

STUDY = study.Study(Path("unused"), study.QUICK, "quick", 2, "")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(lrn=False, dropout=0.0),
        dict(towers=1, widths=(32, 32, 64, 0, 0, 0, 0), stem=(5, 1, 2), activation="tanh"),
    ],
)
def test_every_network_starts_at_the_same_scale(fields):
    config = STUDY.config(**fields)
    config.kernel_std = study.kernel_std(config)
    check_config(config)
    model = build_model(config, 10)
    images = jax.random.normal(jax.random.key(1), (50, 23, 23, 3))

    @jax.jit
    def logits(key):
        params = model.init(key, images)["params"]
        return model.apply({"params": params}, images, train=True, rngs={"dropout": key})

    actual = np.mean([np.mean(logits(jax.random.key(seed)) ** 2) for seed in range(20)])
    assert 0.5 < actual < 2


def test_a_network_changes_only_its_fields():
    common = as_json(STUDY.config())
    for network, fields in ablations.NETWORKS.items():
        config = as_json(STUDY.config(**fields))
        differing = {k for k in common if config[k] != common[k]}
        assert differing == set(fields), network
    for name in VARIANTS:  # each is a network for these images
        config = STUDY.config(variant=name)
        check_config(config)
        check_data(config, (32, 32, 3), 1000, 10)


def test_both_pool_windows_make_the_same_maps():
    shapes = []
    for window in (2, 3):
        model = build_model(STUDY.config(pool_window=window), 10)
        image = jnp.zeros((1, 23, 23, 3))
        params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        outputs = jax.eval_shape(lambda p, x, model=model: activations(model, p, x), params, image)
        shapes.append({name: x.shape for name, x in outputs.items()})
    assert shapes[0] == shapes[1] and shapes[0]["pool5"][1] == 2


def test_the_table_comes_from_the_results(tmp_path):
    empty = summary.table(tmp_path)
    assert empty.count("not run yet") == sum(len(module.CLAIMS) for module in summary.MODULES)
    runs = [{"test_top1_error": 0.4, "train_top1_error": 0.3, "curve": [(1, 0.5)]}] * 5
    runs = runs[:4] + [{"test_top1_error": 0.41, "train_top1_error": 0.3, "curve": [(1, 0.5)]}]
    others = [{"test_top1_error": 0.5 + i / 500, "train_top1_error": 0.3, "curve": [(1, 0.5)]} for i in range(5)]
    records = {network: others for network in remarks.NETWORKS} | {ablations.FULL: runs}
    document = {"budget": "reduced", "of_budget": "5 images, 1 epochs", "seeds": 5, "device": "a CPU", "date": "today",
                "seconds": 60, "jax": "1.2", "commit": "abc", "records": records}  # fmt: skip
    (tmp_path / "remarks.json").write_text(json.dumps(document))
    text = summary.table(tmp_path)
    row = next(row for row in text.splitlines() if "40.2 ± 0.4 % with, 50.4 ± 0.3 without: −10.20" in row)
    assert "| 5 | 0." in row and " for −1 | holds |" in row and "(results/remarks.png)" in row
    assert "`python -m experiments.remarks --workdir DIR --budget=reduced --seeds=5`: " in text
    assert "reduced budget (5 images, 1 epochs), 5 seeds, a CPU, JAX 1.2, commit abc, 1 min, today" in text


def test_the_readme_holds_the_table_of_the_results():
    assert summary.table() in (ROOT / "experiments" / "README.md").read_text()


def experiment(name, *flags):
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("seeds,parts", [(2, ["lrn", "pooling", "lighting", "towers", "averages"]), (10, ["lrn"])])
def test_few_seeds_and_parts_are_no_result(tmp_path, seeds, parts):
    networks = {name: [{"test_top1_error": 0.4 + i / 100} for i in range(seeds)] for name in ablations.NETWORKS}
    records = {"parts": parts, "networks": networks, "averaged": {}}
    (tmp_path / "ablations.json").write_text(json.dumps({"budget": "reduced", "seeds": seeds, "records": records}))
    with pytest.raises(UserError, match="ablations.json: expected 10 seeds or more and all claims"):
        summary.collect(tmp_path, tmp_path)


def test_a_corrupt_run_is_named(tmp_path):
    folder = tmp_path / "quick" / "arm" / "seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    with pytest.raises(WorkdirError, match="arm/seed0/config.json is corrupt; delete"):
        study.Study(tmp_path, study.QUICK, "quick", 2, "").train("arm", STUDY.config(), 0)


@pytest.mark.skipif(not CIFAR10.exists(), reason="no prepared CIFAR-10 in $ALEXNET_TEST_DATA")
def test_it_runs_resumes_and_reports(tmp_path):
    flags = ["filters", f"--workdir={tmp_path}", "--quick", "--seeds=2", f"--data_dir={CIFAR10}"]
    done = experiment(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("seed 1", "step ", "| claim | the paper | measured | n | power | verdict |", "Written to"):
        assert word in done.stdout
    quick = tmp_path / "quick"
    first = json.loads((quick / "filters.json").read_text())
    assert [r["seed"] for r in first["records"]["runs"]] == [0, 1] and "cores" in first["device"]
    assert (quick / "filters.png").read_bytes()[:4] == b"\x89PNG"
    assert summary.collect(tmp_path, tmp_path) == summary.collect(quick, tmp_path) == []  # a quick run is no result
    (quick / "filters.json").unlink()
    again = experiment(*flags)
    assert again.returncode == 0 and "step " not in again.stdout
    second = json.loads((quick / "filters.json").read_text())
    assert second["records"] == first["records"] and {"commit", "jax"} <= set(second)


@pytest.mark.parametrize("name,flags,words", [
    ("retrieval", ["--seeds=1"], "--seeds=1: expected at least 2"),
    ("ablations", ["--only=pooling,speed"], "--only: unknown part 'speed'"),
    ("filters", ["--data_dir=/dev/null/sets", "--quick"], "config.data_dir"),
])  # fmt: skip
def test_what_cannot_run_is_one_line(tmp_path, name, flags, words):
    done = experiment(name, f"--workdir={tmp_path}", *flags)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "raised", [UserError("config.lrn=3: expected True or False"), OSError(28, "No space left", "x")]
)
def test_an_error_names_its_own_cause(tmp_path, monkeypatch, raised):
    def run(study):
        raise raised

    module = SimpleNamespace(
        __spec__=SimpleNamespace(name="experiments.fails"), __doc__="Fails.", BUDGETS={}, SEEDS=2, run=run
    )
    monkeypatch.setattr(sys, "argv", ["fails", f"--workdir={tmp_path}", "--quick"])
    with pytest.raises(SystemExit) as stop:
        study.main(module)
    assert stop.value.code == f"Error: {raised}"


def test_a_workdir_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").touch()
    done = experiment("filters", f"--workdir={tmp_path}/file", "--quick")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"--workdir={tmp_path}/file" in done.stderr and "expected a folder to write to" in done.stderr


def test_the_help_of_summary():
    done = experiment("summary", "--help")
    assert done.returncode == 0 and "Write the table of experiments/README.md" in done.stdout


def test_the_convolutions_of_both_files_are_the_same_network(tmp_path):
    params = weight_files.random_params((4, 4, 6, 4, 4, 2, 2), towers=1)
    weight_files.torch_legacy(tmp_path / "a.pth", params)
    layers = {
        f"Conv_{i}": dict(zip(("kernel", "bias"), params[f"conv{i + 1}"].values(), strict=True)) for i in range(5)
    }
    (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps({"AlexNet_0": layers}, protocol=4))
    weights, others = (finetuning.convolutions(tmp_path / name) for name in ("a.pth", "alexnet.ckpt"))
    assert weights.model == others.model and weights.model.widths == (4, 4, 6, 4, 4, 0, 0)
    for layer, arrays in weights.params.items():
        for name, x in arrays.items():
            np.testing.assert_array_equal(others.params[layer][name], x)
    weight_files.caffe(tmp_path / "a.caffemodel", weight_files.random_params())
    with pytest.raises(UserError, match="expected torchvision's alexnet"):
        finetuning.convolutions(tmp_path / "a.caffemodel")


def test_a_subset_has_as_many_images_of_each_class_and_none_twice(tmp_path):
    random = np.random.default_rng(0)
    train = Examples(random.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8), random.permutation(np.arange(200) % 10))
    names = [finetuning.write_subset(tmp_path, train, Examples(*(x[:20] for x in train)), seed, 5) for seed in (0, 1)]
    first, second = (data.open_builder(name, str(tmp_path)) for name in names)
    train_set, validation = (load(first, split) for split in ("train", "validation"))
    assert np.bincount(train_set.labels).tolist() == np.bincount(validation.labels).tolist() == [5] * 10
    images = {x.tobytes() for x in (*train_set.images, *validation.images)}
    assert len(images) == 100 and images <= {x.tobytes() for x in train.images}
    assert len(load(first, "test").labels) == 20
    assert images != {x.tobytes() for x in load(second, "train").images}


def test_fine_tuning_is_compared_with_scratch_in_pairs():
    errors = {"probe": (0.5, 0.6, 0.7), "finetuned": (0.4, 0.5, 0.6), "scratch": (0.6, 0.7, 0.8)}
    records = {
        form: [dict(test_top1_error=e, seconds=2.0, device="CPU", validation=[(1, 0.5)], steps=1) for e in values]
        for form, values in errors.items()
    }
    document, text = finetuning.report(records, quick=False)
    assert document["seeds"] == 3 and document["seconds"] == 18
    np.testing.assert_allclose(document["test_error_percent"]["probe"], [60, 10])
    difference = document["paired_difference_from_scratch"]["finetuned"]
    np.testing.assert_allclose([difference["difference"], difference["noise"]], [-20, 0], atol=1e-9)
    assert "| 60.0 ± 10.0 % | −10.00 ± 0.00 |" in text
