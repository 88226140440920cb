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
from scipy import stats

from alexnet_jax import VARIANTS, activations, data
from alexnet_jax.config import as_json, check_config, check_data
from alexnet_jax.data import Examples
from alexnet_jax.data.in_memory import load
from alexnet_jax.errors import UserError
from alexnet_jax.setup import build_model
from alexnet_jax.workdir import WorkdirError
from experiments import ablations, comparison, filters, finetuning, relu_vs_tanh, retrieval, study, summary, variants

STUDY = study.Study(Path("unused"), study.QUICK, "quick", 2, "")


def test_the_noise_is_welchs_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 5), rng.normal(1, 3, 3)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    actual = comparison.compare(a, b)
    np.testing.assert_allclose([actual.difference - actual.noise, actual.difference + actual.noise], interval)
    interval = stats.ttest_1samp(a[:3] - b, 0).confidence_interval(0.95)
    actual = comparison.compare_paired(a[:3], b)
    np.testing.assert_allclose([actual.difference - actual.noise, actual.difference + actual.noise], interval)


def test_a_verdict_needs_more_than_the_noise():
    assert comparison.compare([1, 1.1, 0.9], [2, 2.1, 1.9]).verdict(claimed=-1) == "holds"
    assert comparison.compare([1, 1.1, 0.9], [2, 2.1, 1.9]).verdict(claimed=+1) == "contradicted"
    assert comparison.compare([1, 2, 3], [2, 3, 4]).verdict(claimed=-1) == "within the noise"
    assert comparison.compare([1, 1], [1, 1]).verdict(claimed=-1) == "within the noise"
    assert comparison.compare([float("nan"), 1], [1, 1]).verdict(claimed=-1) == "within the noise"
    with pytest.raises(ValueError, match="at least two"):
        comparison.compare([1], [1, 2])


@pytest.mark.parametrize("fields", [{}, dict(lrn=False, dropout=0.0), dict(ablations.FOUR, activation="tanh")])
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


def test_epochs_to_an_error():
    curve = [(0.5, 0.9), (1.0, 0.5), (1.5, 0.3), (2.0, 0.4), (2.5, 0.1)]
    assert relu_vs_tanh.epochs_to(0.5, curve) == pytest.approx(1.0)
    assert relu_vs_tanh.epochs_to(0.4, curve) == pytest.approx(1.25)
    assert relu_vs_tanh.epochs_to(0.95, curve) == 0.5 and relu_vs_tanh.epochs_to(0.05, curve) == np.inf


def line(epochs_to_quarter, epochs=8):
    """A curve that falls straight to 25 % error."""
    return {"curve": [(e, max(0.0, 1 - 0.75 * e / epochs_to_quarter)) for e in range(1, epochs + 1)]}


@pytest.mark.parametrize("relu,tanh,words,verdict", [
    ((2.0, 2.2, 1.8), (6.0, 6.2, 5.8), ("2.0 ± 0.2", "6.0 ± 0.2", ": 3.0 times"), "holds"),
    ((3.0, 4.0, 2.0), (3.0, 2.0, 4.0), (": 1.0 times",), "within the noise"),
    ((2.0, 2.2, 1.8), (6.0, 20.0, 20.0), ("tanh over 8 epochs in 2 of 3 runs", "over 3.7 times"), "holds"),
    ((20.0, 1.0, 1.0), (6.0, 6.0, 6.0), ("not reached in 8 epochs", "ReLU 0%"), "not decided: too few epochs"),
    ((20.0, 20.0, 20.0), (4.0, 4.2, 3.8), ("ReLU over 8 epochs", "under 0.5 times"), "contradicted"),
])  # fmt: skip
def test_relu_against_tanh(relu, tanh, words, verdict, tmp_path):
    start = {"rates": {"relu": 0.1, "tanh": 0.01}, "relu": [line(x) for x in relu], "tanh": [line(x) for x in tanh]}
    records = {"budget_epochs": 8, "paper": start, "unit": start}
    actual = relu_vs_tanh.judge(records)["paper"]
    assert actual.verdict == verdict and all(word in actual.ours for word in words), actual
    relu_vs_tanh.plot(records, tmp_path / "plot.png")


def test_ablations(tmp_path):
    def runs(errors, train_errors, validation, **more):
        pairs = zip(errors, train_errors, strict=True)
        return [
            dict(test_top1_error=e, train_top1_error=t, validation=validation, curve=[(1, t)], **more) for e, t in pairs
        ]

    whole = runs((0.30, 0.31, 0.29), (0.2, 0.2, 0.2), [0.6, 0.5, 0.4, 0.3], ten_crop_top1_error=0.25)
    without = runs((0.35, 0.36, 0.34), (0.05, 0.05, 0.05), [0.5, 0.4, 0.35, 0.35])
    records = {"parts": ["dropout", "ten_crop"], ablations.FULL: whole, "no dropout": without}
    actual = ablations.judge(records)
    assert set(actual) == {"dropout", "dropout_overfitting", "dropout_slower", "ten_crop"}
    assert all(finding.verdict == "holds" for finding in actual.values())
    assert "30.0 ± 1.0 with, 35.0 ± 1.0 without (%): −5.00" in actual["dropout"].ours
    assert "10.0 ± 1.0 with, 30.0 ± 1.0 without (points)" in actual["dropout_overfitting"].ours
    assert "3.0 ± 0.0 without, 4.0 ± 0.0 with (epochs to 35.0 %)" in actual["dropout_slower"].ours
    ablations.plot(records, tmp_path / "plot.png")


def test_variants_judge():
    errors = {"paper": (0.3, 0.31, 0.32), "source2012": (0.3, 0.31, 0.33), "caffe": (0.5, 0.51, 0.52)}
    actual = variants.judge({name: [dict(test_top1_error=e) for e in of] for name, of in errors.items()})
    assert actual["source2012"].verdict == "within the noise" and actual["caffe"].verdict == "no: worse"


def test_the_table_comes_from_the_results(tmp_path):
    empty = summary.table(tmp_path)
    modules = ablations, filters, relu_vs_tanh, retrieval, variants
    assert empty.count("not run yet") == sum(len(module.CLAIMS) for module in modules)
    document = {"budget": "reduced", "of_budget": "5 images, 1 epochs", "seeds": 3, "device": "a CPU", "date": "today",
                "seconds": 60, "findings": {"retrieval": {"ours": "61.7 %", "verdict": "holds"}}}  # fmt: skip
    (tmp_path / "retrieval.json").write_text(json.dumps(document))
    text = summary.table(tmp_path)
    row = next(row for row in text.splitlines() if "61.7 %" in row)
    assert "| holds |" in row and "(results/retrieval.png)" in row
    assert "`python -m experiments.retrieval --workdir DIR --budget=reduced --seeds=3`: " in text
    assert "reduced budget (5 images, 1 epochs), 3 seeds, a CPU, 1 min, today" in text


def test_the_readme_holds_the_table_of_the_results():
    assert summary.table() in (ROOT / "experiments" / "README.md").read_text()


def experiment(name, *flags):
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.parametrize("seeds,keys", [(2, {"lrn_four_layers"}), (3, {"dropout", "dropout_slower"})])
def test_few_seeds_and_parts_are_no_result(tmp_path, seeds, keys):
    document = {"budget": "reduced", "seeds": seeds, "findings": dict.fromkeys(keys)}
    (tmp_path / "ablations.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="ablations.json: expected 3 seeds or more and all claims"):
        summary.collect(tmp_path, tmp_path)


def test_a_corrupt_run_is_named(tmp_path):
    folder = tmp_path / "quick" / "arm" / "seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    with pytest.raises(WorkdirError, match="arm/seed0/config.json is corrupt; delete"):
        study.Study(tmp_path, study.QUICK, "quick", 2, "").train("arm", STUDY.config(), 0)


def test_the_error_of_an_epoch_is_its_mean():
    curve = [(0.5, 0.8), (1.0, 0.6), (1.5, 0.5), (2.0, 0.3)]
    assert relu_vs_tanh.by_epoch(curve) == [(1, pytest.approx(0.7)), (2, pytest.approx(0.4))]


@pytest.mark.skipif(not CIFAR10.exists(), reason="no prepared CIFAR-10 in $ALEXNET_TEST_DATA")
def test_it_runs_resumes_and_reports(tmp_path):
    flags = ["filters", f"--workdir={tmp_path}", "--quick", "--seeds=2", f"--data_dir={CIFAR10}"]
    done = experiment(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("seven-by-seven, seed 1", "step ", "| claim | the paper | measured | verdict |", "Written to"):
        assert word in done.stdout
    quick = tmp_path / "quick"
    first = json.loads((quick / "filters.json").read_text())
    assert [r["seed"] for r in first["records"]["runs"]] == [0, 1] and "CPU" in first["device"]
    assert (quick / "filters.png").read_bytes()[:4] == b"\x89PNG"
    assert summary.collect(tmp_path, tmp_path) == summary.collect(quick, tmp_path) == []  # a quick run is no result
    (quick / "filters.json").unlink()
    again = experiment(*flags)
    assert again.returncode == 0 and "step " not in again.stdout
    second = json.loads((quick / "filters.json").read_text())
    assert second["records"] == first["records"] and second["findings"] == first["findings"]


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

    module = SimpleNamespace(__spec__=SimpleNamespace(name="experiments.fails"), __doc__="Fails.", BUDGETS={}, run=run)
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
