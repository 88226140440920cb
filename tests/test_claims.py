"""The verdicts on the paper's claims: intervals, p-values, power and judgments of records whose answer is known."""

import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runners import ROOT
from scipy import stats

from alexnet_jax.setup import build_model
from experiments import ablations, depth, remarks, study, variants
from experiments.claims import Claim, Finding, p_value, rows, verdict
from experiments.comparison import Comparison, compare_paired, contrast, holm

LOWER = Claim("key", "text", "−2 points", -2.0)
UNSTATED = Claim("key", "text", "no figure", -2.0)
EQUAL = Claim("key", "text", "none", 1.0, equal=True)


def test_two_forms_are_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 6), rng.normal(1, 1, 6)
    actual, expected = compare_paired(a, b), stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose([actual.difference - actual.noise, actual.difference + actual.noise], interval)
    assert actual.p == pytest.approx(expected.pvalue) and actual.n == 6
    for x, y in (([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match="seeds: expected two"):
            compare_paired(x, y)


def test_a_contrast_is_least_squares_with_a_term_for_each_form_and_seed():
    rng = np.random.default_rng(1)
    values = rng.normal(0, 1, (4, 5)) + 3 * rng.normal(0, 1, 5)
    weights = np.array([0.5, 0.5, -1.0, 0.0])
    form, seed = np.indices(values.shape).reshape(2, -1)
    design = np.concatenate([np.eye(4)[form], np.eye(5)[seed][:, 1:]], axis=1)
    solution, squares, rank, _ = np.linalg.lstsq(design, values.ravel(), rcond=None)
    degrees = values.size - rank
    of_forms = np.concatenate([weights, np.zeros(4)])
    error = math.sqrt(squares[0] / degrees * of_forms @ np.linalg.inv(design.T @ design) @ of_forms)
    forms = dict(zip("abcd", values.tolist(), strict=True))
    actual = contrast(forms, {"a": 0.5, "b": 0.5, "c": -1.0})
    np.testing.assert_allclose(actual, (weights @ solution[:4], error, degrees, 5, 0))


def test_the_power_is_the_share_of_simulated_experiments_that_find_the_effect():
    rng = np.random.default_rng(2)
    differences = rng.normal(-1.0, 1.2, (20_000, 8))
    t = stats.ttest_1samp(differences, 0, axis=1)
    found = np.mean((t.pvalue < 0.01) & (t.statistic < 0))
    assert Comparison(0.3, 1.2 / math.sqrt(8), 7, 8).power(-1.0, 0.01) == pytest.approx(found, abs=0.015)
    assert Comparison(0.0, 0.0, 1, 2).power(1.0) == 1.0


def test_holms_p_values():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.7, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize("claim,difference,error,expected", [
    (LOWER, -3.0, 0.1, "holds, larger than stated"),
    (LOWER, -2.1, 0.1, "holds"),
    (LOWER, -1.0, 0.1, "holds, smaller than stated"),
    (UNSTATED, -3.0, 0.1, "holds"),
    (LOWER, 3.0, 0.1, "contradicted"),
    (LOWER, -0.1, 0.1, "smaller than stated"),
    (LOWER, -1.0, 1.0, "not decided"),
    (EQUAL, 0.1, 0.1, "holds"),
    (EQUAL, -0.6, 0.1, "holds"),  # a difference, but a smaller one
    (EQUAL, 0.9, 0.2, "not decided"),
    (EQUAL, 1.3, 0.2, "not decided"),
    (EQUAL, 3.0, 0.1, "contradicted"),
    (EQUAL, -3.0, 0.1, "contradicted"),
    (EQUAL, 0.1, 0.8, "not decided"),
    (LOWER, math.nan, math.nan, "not decided"),
])  # fmt: skip
def test_verdicts(claim, difference, error, expected):
    comparison = Comparison(difference, error, 9, 10)
    assert verdict(claim, comparison, p_value(claim, comparison)) == expected


@pytest.mark.parametrize("difference,bound,p,expected", [
    (2.0, 1, 0.0, "contradicted"),  # 2 or more
    (2.0, -1, 1.0, "not decided"),  # 2 or less
    (-2.0, -1, 0.0, "holds"),
    (-2.0, 1, 1.0, "not decided"),
    (-0.1, -1, 0.37, "not decided"),  # and perhaps as large as stated
])  # fmt: skip
def test_a_bound_decides_in_its_direction_alone(difference, bound, p, expected):
    comparison = Comparison(difference, 0.1, 9, 10, bound)
    assert comparison.p == pytest.approx(p, abs=0.03)
    assert verdict(LOWER, comparison, comparison.p) == expected


def test_equality_is_tested_against_the_difference_that_it_excludes():
    rng = np.random.default_rng(3)
    values = rng.normal(0.2, 0.8, 10)
    comparison = compare_paired(values, np.zeros(10))
    assert p_value(EQUAL, comparison) == pytest.approx(stats.ttest_1samp(values, 1.0).pvalue)
    negative = comparison._replace(difference=-comparison.difference)
    assert p_value(EQUAL, negative) == pytest.approx(p_value(EQUAL, comparison))
    samples = rng.normal(0, 0.8, (20_000, 10))
    error = samples.std(axis=1, ddof=1) / math.sqrt(10)
    found = np.mean(1 - np.abs(samples.mean(axis=1)) > stats.t.ppf(1 - 0.01 / 2, 9) * error)
    power = Comparison(0.3, 0.8 / math.sqrt(10), 9, 10).power_of_equality(1.0, 0.01)
    assert power == pytest.approx(found, abs=0.015)
    assert Comparison(0.0, 0.0, 1, 2).power_of_equality(1.0) == 1.0


def test_a_verdict_depends_on_the_number_of_claims():
    finding = Finding("1 % against 2 %", Comparison(-2.0, 0.8, 9, 10))  # p = 0.034
    (row,) = rows([(LOWER, finding)])
    assert row == ("text", "−2 points", "1 % against 2 %: −2.00 ± 1.81", "10", "0.61 for −2", "holds")
    table = rows([(LOWER, finding), (EQUAL, None), (LOWER, Finding("no curve", None))])
    assert table[0][-1] == "not decided" and "for −2" in table[0][4]
    assert table[1][2:] == ("not run yet", "", "", "") and table[2][2:] == ("no curve", "", "", "not measured")


def test_a_ratio_is_printed_as_a_ratio():
    claim = Claim("key", "text", "6 times", math.log(6), ratio=True)
    ((*_, measured, n, power, decided),) = rows([(claim, Finding("a, b", Comparison(math.log(5), 0.01, 4, 5)))])
    assert measured == "a, b: 5.00 times (4.86 to 5.14)" and (n, decided) == ("5", "holds, smaller than stated")
    assert "6 times" in power


def runs(*errors, **more):
    return [{"test_top1_error": e, **{k: v[i] for k, v in more.items()}} for i, e in enumerate(errors)]


def test_ablations_and_depth(tmp_path):
    whole = runs(0.30, 0.31, 0.29, ten_crop_top1_error=(0.28, 0.29, 0.275))
    networks = {name: runs(0.36, 0.37, 0.35) for name in ablations.NETWORKS} | {ablations.FULL: whole}
    networks["one tower"] = runs(0.301, 0.311, 0.292)
    averaged = {name: {"averaged": 0.3 + i / 1000, "one": 0.32} for i, name in enumerate(networks)}
    records = {"parts": list(ablations.PARTS), "networks": networks, "averaged": averaged}
    actual = ablations.judge(records)
    assert set(actual) == {claim.key for claim in ablations.CLAIMS}
    errors = np.array([[r["test_top1_error"] for r in of] for of in networks.values()])
    noise = errors - errors.mean(0) - errors.mean(1, keepdims=True) + errors.mean()
    assert actual["lrn"].comparison.difference == pytest.approx(-6.0)
    assert actual["lrn"].comparison.error == pytest.approx(100 * math.sqrt(np.sum(noise**2) / 10 * 2 / 3))
    assert actual["groups"].comparison.difference == pytest.approx(-0.13, abs=0.01)
    assert actual["ten_crop"].text == "30.0 ± 1.0 → 28.2 ± 0.8 %" and actual["ten_crop"].comparison.n == 3
    assert actual["five_networks"].comparison.difference == pytest.approx(-1.75) and "6 networks" in (
        actual["five_networks"].text
    )
    assert set(ablations.judge(records | {"parts": ["lrn"]})) == {"lrn"}
    ablations.plot(records, tmp_path / "plot.png")
    records = {ablations.FULL: whole, **{name: runs(0.33, 0.34, 0.325) for name in depth.OMITTED}}
    actual = depth.judge(records)
    assert len(actual) == 4 and actual["no_conv3"].comparison.difference == pytest.approx(-3.17, abs=0.01)
    depth.plot(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_sizes_that_the_design_states():
    text = (ROOT / "experiments" / "README.md").read_text()
    common = study.Study(Path("unused"), study.QUICK._replace(shrink=1), "quick", 2, "")
    for network in (ablations.FULL, "one GPU"):
        model = build_model(common.config(**ablations.NETWORKS[network]), 10)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 23, 23, 3)))["params"]
        assert f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters" in text


def test_the_average_of_five_networks(monkeypatch):
    """Five networks that are wrong on one image each, never on the same: their mean is right."""
    probabilities = np.tile([[0.2, 0.8]], (10, 5, 1))
    for i in range(10):
        probabilities[i, i % 5] = [0.9, 0.1]
    run = SimpleNamespace(
        config=SimpleNamespace(test_split="test"), load=lambda split: SimpleNamespace(labels=np.ones(5, int))
    )
    study = SimpleNamespace(open=lambda record: run, test_probabilities=lambda record: probabilities[record["seed"]])
    actual = ablations._averaged_errors(study, [{"seed": i} for i in range(10)])
    assert actual == {"averaged": 0.0, "one": pytest.approx(0.2)}


def test_remarks_and_variants(tmp_path):
    curve = [[(0.5, 0.9), (1.0, e)] for e in (0.5, 0.52)]
    early = {
        "biases of 1": runs(0.5, 0.5, curve=curve),
        "biases of 0": runs(0.5, 0.5, curve=[[(0.5, 0.9), (1.0, 0.9)]] * 2),
    }
    more = dict(train_top1_error=(0.2, 0.22), validation=[[0.5, 0.3], [0.5, 0.32]], curve=curve)
    records = {
        ablations.FULL: runs(0.30, 0.31, **more),
        "no weight decay": runs(0.31, 0.32, **more | {"train_top1_error": (0.25, 0.27)}),
        "no drops": runs(0.35, 0.37, **more), **early,
    }  # fmt: skip
    actual = remarks.judge(records)
    differences = {key: finding.comparison.difference for key, finding in actual.items()}
    assert differences == pytest.approx({"weight_decay": -5.0, "biases": -19.5, "drops": -5.5})
    remarks.plot(records, tmp_path / "plot.png")
    records = {
        name: runs(*errors, validation=[[0.5, 0.4]] * 3)
        for name, errors in {"paper": (0.3, 0.31, 0.32), "source2012": (0.3, 0.31, 0.325), "caffe": (0.5, 0.51, 0.52)}
        .items()
    }  # fmt: skip
    actual = variants.judge(records)
    verdicts = {c.key: verdict(c, x := actual[c.key].comparison, p_value(c, x)) for c in variants.CLAIMS}
    assert verdicts == {"source2012": "holds", "caffe": "contradicted"}
    variants.plot(records, tmp_path / "plot.png")
