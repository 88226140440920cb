"""Figures 3 and 4, LRN in four layers, and the time of two towers: verdicts on known records, pictures, a short run."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from runners import CIFAR10, ROOT, follow
from scipy import stats

from alexnet_jax.errors import UserError
from experiments import claims, comparison, filters, lrn_four_layers, retrieval, study, tower_time

PNG = b"\x89PNG\r\n\x1a\n"


def row(module, records):
    """The row of a module's only claim, as its own table has it."""
    findings = module.judge(records)
    return claims.rows([(claim, findings[claim.key]) for claim in module.CLAIMS])[0]


def experiment(name, *flags):
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_colorfulness_and_specialization():
    rng = np.random.default_rng(0)
    gray = rng.normal(size=(5, 5, 1, 8)).repeat(3, axis=2)
    opponent = rng.normal(size=(5, 5, 1, 8)) * np.array([1, -1, 0])[:, None]
    np.testing.assert_allclose(filters.colorfulness(gray), 0, atol=1e-9)
    np.testing.assert_allclose(filters.colorfulness(opponent), 1)
    random = filters.colorfulness(rng.normal(size=(9, 9, 3, 400)))
    assert random.mean() == pytest.approx(filters.RANDOM, abs=0.01)
    difference, chance = filters.specialization([0.1, 0.2, 0.15, 0.1, 0.12, 0.9, 0.8, 0.85, 0.95, 0.7])
    assert difference == pytest.approx(0.706) and chance == pytest.approx(2 / 252, abs=0.003)  # of 10 over 5, two
    assert filters.specialization(random[:32])[1] > 0.05
    for shift in (0.0, 0.05, 0.1, 0.2):  # the difference that is detectable depends on the kernels
        values = random[:32] + np.repeat([0.0, shift], 16)
        difference, chance = filters.specialization(values)
        assert (chance < 0.05) == (abs(difference) > filters.detectable(values))


@pytest.mark.parametrize("chances,verdict", [
    ((0.01, 0.01, 0.3), "not decided"),
    ((0.01, 0.001, 0.04), "holds"),
])  # fmt: skip
def test_the_towers_specialize_if_they_do_in_every_run(chances, verdict):
    runs = [dict(colorfulness=[0.1, 0.3, 0.8, 0.9], chance=c) for c in chances]
    actual = row(filters, {"runs": runs})
    assert actual[3:] == ("3", "", verdict)
    assert "0.20 and 0.85" in actual[2] and "p = 0.01, " in actual[2]
    finding = filters.judge({"runs": runs})["specialized"]
    assert finding.comparison.p == max(chances)  # of an intersection-union test


def test_holms_correction_includes_a_test_without_an_estimate():
    claim = claims.Claim("a", "A", "stated", 1.0)
    clear = comparison.compare_paired([1.0, 1.1, 0.9, 1.05], [0.0, 0.1, 0.0, 0.1])
    findings = [(claim, claims.Finding("x", claims.PValue(0.03, 3))), (claim, claims.Finding("y", clear))]
    assert [r[-1] for r in claims.rows(findings)] == ["holds", "holds"]  # the larger p is compared with 0.05
    unclear = comparison.compare_paired([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0])
    assert claims.rows([findings[0], (claim, claims.Finding("y", unclear))])[0][-1] == "not decided"  # 2 × 0.03


@pytest.mark.parametrize("count", [24, 16, 10])
def test_the_picture_of_the_filters_has_no_gaps(tmp_path, monkeypatch, count):
    figures = []
    monkeypatch.setattr(filters, "save_figure", lambda figure, path: figures.append(figure))
    random = np.random.default_rng(0)
    record = dict(
        seed=0, colorfulness=random.uniform(size=2 * count).tolist(), chance=0.5,
        kernels=random.normal(size=(11, 11, 3, 2 * count)).tolist(),
    )  # fmt: skip
    filters.plot({"runs": [record, dict(record, seed=1, kernels=None)]}, tmp_path / "x.png")
    first, second, dots = figures[0].subfigs[0].axes + figures[0].subfigs[1].axes
    for axes in (first, second):
        h, w, _ = np.asarray(axes.images[0].get_array()).shape
        assert (h // 12) * (w // 12) == count
    points = [line for line in dots.lines if len(line.get_xdata()) == count]
    assert len(points) == 4
    np.testing.assert_allclose(points[0].get_ydata(), record["colorfulness"][:count])
    assert [text.get_text() for text in dots.get_xticklabels()] == ["seed 0\np = 0.5", "seed 1\np = 0.5"]


def test_percentiles_of_pixel_distances():
    random = np.random.default_rng(0)
    queries, keys = (random.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8) for n in (3, 21))
    actual = retrieval.percentiles(queries, keys)
    for q, image in enumerate(queries):
        distances = [float(np.sum((image.astype(float) - key) ** 2)) for key in keys]
        for k, distance in enumerate(distances):
            assert actual[q, k] == pytest.approx(100 * sum(d < distance for d in distances) / 20)


def test_retrieval_judges_precision_and_distance():
    runs = [
        dict(precision_fc7=p, precision_pixels=0.3, pixel_percentile=d)
        for p, d in ((0.6, 20.0), (0.62, 21.0), (0.58, 22.0))
    ]
    findings = retrieval.judge({"runs": runs})
    low, high = stats.ttest_1samp([30, 32, 28], 0).confidence_interval(0.95)
    first = findings["retrieval"].comparison
    np.testing.assert_allclose([first.difference - first.noise, first.difference + first.noise], [low, high])
    second = findings["distant_pixels"].comparison
    assert second.difference == pytest.approx(16)  # above the nearest twentieth
    assert second.p == pytest.approx(stats.ttest_1samp([20, 21, 22], 5).pvalue)
    table = claims.rows([(claim, findings[claim.key]) for claim in retrieval.CLAIMS])
    assert [r[-1] for r in table] == ["holds", "holds"]
    assert "60.0 ± 2.0 %" in table[0][2] and "30.0 % in pixels" in table[0][2] and "21.0 ± 1.0" in table[1][2]
    near = [dict(r, pixel_percentile=d) for r, d in zip(runs, (1.0, 1.1, 0.9), strict=True)]
    assert (
        claims.rows([(retrieval.CLAIMS[1], retrieval.judge({"runs": near})["distant_pixels"])])[0][-1] == "contradicted"
    )


def four_layers(with_lrn, without):
    return {
        form: [dict(ten_crop_top1_error=e, curve=[(1, 0.9), (2, e)]) for e in errors]
        for form, errors in zip(lrn_four_layers.FORMS, (with_lrn, without), strict=True)
    }


def test_lrn_is_compared_in_pairs(tmp_path):
    ours, others = (0.30, 0.33, 0.31), (0.32, 0.351, 0.329)
    records = four_layers(ours, others)
    low, high = stats.ttest_rel(100 * np.array(ours), 100 * np.array(others)).confidence_interval(0.95)
    actual = lrn_four_layers.judge(records)["lrn_four_layers"].comparison
    np.testing.assert_allclose([actual.difference - actual.noise, actual.difference + actual.noise], [low, high])
    assert row(lrn_four_layers, records)[-1] == "holds"
    assert row(lrn_four_layers, four_layers(others, ours))[-1] == "contradicted"
    lrn_four_layers.plot(records, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == PNG


def rounds(towers, one_gpu):
    pairs = enumerate(zip(towers, one_gpu, strict=True))
    return {
        "batch": 128, "steps": 20, "received_bytes": 2_500_000,
        "rounds": [{"round": i, "towers_s": t, "one_gpu_s": o, "collectives_s": 0.001} for i, (t, o) in pairs],
    }  # fmt: skip


def test_the_ratio_of_times_is_paired_by_round(tmp_path):
    towers, one_gpu = (0.09, 0.18, 0.0905), (0.1, 0.2, 0.1)  # the second round was slow for both
    records = rounds(towers, one_gpu)
    actual = row(tower_time, records)
    low, high = np.exp(stats.ttest_rel(np.log(towers), np.log(one_gpu)).confidence_interval(0.95))
    mean = math.exp(np.mean(np.log(towers)) - np.mean(np.log(one_gpu)))
    assert actual[2].endswith(f"{mean:.2f} times ({low:.2f} to {high:.2f})") and actual[-1] == "holds"
    assert "90.5 ms a step" in actual[2] and "100.0 ms" in actual[2] and "2.5 MB" in actual[2] and "1.0 ms" in actual[2]
    assert row(tower_time, rounds(one_gpu, towers))[-1] == "contradicted"
    tower_time.plot(records, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == PNG


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not Linux")
def test_all_threads_share_one_core_in_the_block():
    def affinities():
        return {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}

    before = affinities()
    with tower_time.on_one_core():
        assert [len(cores) for cores in affinities()] == [1]
    assert affinities() == before


def test_one_core_is_no_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(tower_time, "available_cores", lambda: 1)
    with pytest.raises(UserError, match="there is one core; expected two, one for each tower"):
        tower_time.run(study.Study(tmp_path, study.QUICK, "quick", 2, ""))


@pytest.mark.skipif(not CIFAR10.exists(), reason="no prepared CIFAR-10 in $ALEXNET_TEST_DATA")
def test_an_interrupted_experiment_trains_only_the_missing_runs(tmp_path):
    flags = ["lrn_four_layers", f"--workdir={tmp_path}", "--quick", "--seeds=2", f"--data_dir={CIFAR10}"]
    command = [sys.executable, "-m", f"experiments.{flags[0]}", *flags[1:]]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    follow(process, "four layers without LRN, seed 1")
    process.terminate()
    rest, _ = process.communicate(timeout=100)
    assert process.returncode == 143 and "stopped by SIGTERM; run the same command to resume" in rest, rest
    assert "Traceback" not in rest
    runs = {path: path.read_bytes() for path in (tmp_path / "quick").rglob("seed*.json")}
    assert len(runs) == 3
    done = experiment(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("epoch 2 of 2: training error") == 1
    assert {path: path.read_bytes() for path in runs} == runs
    document = json.loads((tmp_path / "quick" / "lrn_four_layers.json").read_text())
    assert [[r["seed"] for r in document["records"][form]] for form in lrn_four_layers.FORMS] == [[0, 1]] * 2
    assert (tmp_path / "quick" / "lrn_four_layers.png").read_bytes()[:8] == PNG
    done = experiment(*flags)
    assert done.returncode == 0 and "epoch 2 of 2" not in done.stdout


@pytest.mark.parametrize("text,words", [
    ('{"budget": "5 images, 1 epochs", "seed": 0}', "is a run of 5 images, 1 epochs, not of 256 images"),
    ("{", "seed0.json is corrupt; delete it"),
    ('{"seed": 0}', "seed0.json is corrupt; delete it"),
])  # fmt: skip
def test_the_record_of_another_run_is_not_reused(tmp_path, text, words):
    path = tmp_path / "seed0.json"
    of = study.Study(tmp_path, study.QUICK, "quick", 2, "")
    assert lrn_four_layers.stored(path, of) is None
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        lrn_four_layers.stored(path, of)
