"""Figure 1, overfitting and the time to converge: what they conclude from records whose answer is known."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runners import CIFAR10, ROOT
from scipy import stats

from alexnet_jax.train import DivergedError
from experiments import dropout_time, overfitting, relu_vs_tanh, study
from experiments.claims import rows

PNG = b"\x89PNG"


def stored(records):
    """Records as experiments/results has them."""
    return json.loads(json.dumps(records))


def row_of(module, findings, key):
    """A claim's row if it were the only one: measured, n, power, verdict."""
    claim = next(claim for claim in module.CLAIMS if claim.key == key)
    return rows([(claim, findings[key])])[0][2:]


def test_epochs_to_an_error():
    curve = [(0.5, 0.9), (1.0, 0.5), (1.5, 0.3), (2.0, 0.4), (2.5, 0.1)]
    assert relu_vs_tanh.epochs_to(0.5, curve) == pytest.approx(1.0)
    assert relu_vs_tanh.epochs_to(0.4, curve) == pytest.approx(1.25)
    assert relu_vs_tanh.epochs_to(0.95, curve) == 0.5 and relu_vs_tanh.epochs_to(0.05, curve) == np.inf


def test_the_error_of_an_epoch_is_its_mean():
    curve = [(0.5, 0.8), (1.0, 0.6), (1.5, 0.5), (2.0, 0.3)]
    assert relu_vs_tanh.by_epoch(curve) == [(1, pytest.approx(0.7)), (2, pytest.approx(0.4))]


def line(epochs_to_quarter, epochs):
    """A curve that falls straight from 100 % to 25 % error."""
    return {"curve": [(e, max(0.0, 1 - 0.75 * e / epochs_to_quarter)) for e in range(1, epochs + 1)]}


def of_start(relu, tanh):
    return {
        "rates": {"relu": 0.1, "tanh": 0.01},
        "relu": [line(x, 10) for x in relu], "tanh": [line(x, 40) for x in tanh],
    }  # fmt: skip


@pytest.mark.parametrize("relu,tanh,words,verdict", [
    ((3.0, 3.3, 2.7), (18.0, 18.6, 17.4),
     ("6.02 at 30 %, 6.02 at 25 %", "ReLU 3.0 ± 0.3 epochs", "tanh 18.0 ± 0.6 epochs", "6.02 times (5.09 to 7.11)"),
     "holds"),
    ((3.0, 4.0, 3.5), (4.0, 3.0, 3.5), ("1.00 at 50 %", "1.00 times"), "smaller than stated"),
    ((6.0, 6.3, 5.7), (3.0, 3.0, 3.1), ("0.51 at 25 %",), "contradicted"),
    ((4.0, 4.0, 4.4), (50.0, 50.0, 50.0), ("12.11 at 40 %", "over 9.69 at 25 %", "tanh over 40 epochs, "), "holds"),
    ((4.0, 4.0, 4.4), (50.0, 20.0, 20.0), ("over 6.10 at 25 %", "tanh over 40 epochs in 1 of 3 runs"), "holds"),
    ((20.0, 3.0, 3.0), (18.0, 18.0, 18.0), ("ReLU over 10 epochs in 1 of 3 runs", ": under "),
     "not decided"),
    ((20.0, 20.0, 20.0), (50.0, 50.0, 50.0), ("– at 25 %",), "not measured"),
])  # fmt: skip
def test_relu_against_tanh(relu, tanh, words, verdict, tmp_path):
    records = stored({"paper": of_start(relu, tanh), "unit": of_start(relu, tanh)})
    measured, *_, actual = row_of(relu_vs_tanh, relu_vs_tanh.judge(records), "paper")
    assert actual == verdict and all(word in measured for word in words), measured
    relu_vs_tanh.plot(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == PNG


def test_runs_that_do_not_reach_the_error_bound_the_ratio():
    records = of_start((8.0, 8.1, 8.2), (50.0, 50.0, 50.0))
    assert relu_vs_tanh.judge_start(records).comparison.bound == 1  # 40 epochs and more, against 8 to 8.2
    for record in records["tanh"]:
        record["curve"] = record["curve"][:7]
    assert relu_vs_tanh.judge_start(records).comparison.p == 1.0  # 7 epochs and more
    records = of_start((20.0, 20.0, 20.0), (8.0, 8.1, 8.2))
    comparison = relu_vs_tanh.judge_start(records).comparison
    assert comparison.bound == -1 and comparison.p < 0.01  # 8 to 8.2 epochs, against 10 and more


def test_a_rate_that_diverges_with_a_later_seed_is_replaced(monkeypatch):
    def train(study, arm, config, seed):
        if arm == "paper-relu-0.003" and seed == 1:
            raise DivergedError("step 7: the loss is nan")
        return {"seed": seed, "curve": line(4.0, 10)["curve"] if "0.003" in arm else line(8.0, 10)["curve"]}

    monkeypatch.setattr(study.Study, "train", train)
    records = relu_vs_tanh.run(study.Study(Path("unused"), study.QUICK, "quick", 3, ""))
    assert records["paper"]["rates"]["relu"] == 0.0003 and records["unit"]["rates"]["relu"] == 0.003
    assert [run["seed"] for run in records["paper"]["relu"]] == [0, 1, 2]


def test_the_ratio_is_that_of_the_paired_t_test():
    relu, tanh = (3.0, 3.6, 2.7, 3.2), (18.0, 18.6, 14.4, 20.0)
    actual = relu_vs_tanh.judge_start(of_start(relu, tanh)).comparison
    expected = stats.ttest_rel(np.log(tanh), np.log(relu))
    assert actual.p == pytest.approx(expected.pvalue, rel=1e-6)
    interval = (actual.difference - actual.noise, actual.difference + actual.noise)
    np.testing.assert_allclose(interval, expected.confidence_interval(0.95))


def test_each_network_of_figure_1_has_its_own_epochs():
    full = study.Study(Path("unused"), relu_vs_tanh.BUDGETS["full"], "full", 2, "")
    quick = study.Study(Path("unused"), study.QUICK, "quick", 2, "")
    for (start, activation), epochs in relu_vs_tanh.EPOCHS.items():
        for of, expected in ((full, epochs), (quick, study.QUICK.epochs)):
            config = relu_vs_tanh.config(of, start, activation, 0.01)
            assert config.num_epochs == expected and config.drop_at_epochs == () and config.activation == activation


def overfitting_records(noise, effects, seeds=5):
    """Records whose errors are sums of effects (gap, test error), by factor, of the seed and of noise, in percent."""
    random, forms = np.random.default_rng(0), {}
    of_seed = random.normal(0, 3, seeds)
    for form in overfitting.FORMS:
        gap = 20 + sum(effects[factor][0] * getattr(form, factor) for factor in effects)
        test = 50 + sum(effects[factor][1] * getattr(form, factor) for factor in effects)
        tests = test + of_seed + random.normal(0, noise, seeds)
        trains = tests - gap - random.normal(0, noise, seeds)
        forms[str(form)] = [
            dict(test_top1_error=a / 100, train_top1_error=b / 100, curve=[(1, 0.9), (10, b / 100)],
                 validation=[0.6, a / 100])
            for a, b in zip(tests, trains, strict=True)
        ]  # fmt: skip
    return stored({"epochs": 10, "forms": forms})


EFFECTS = {"dropout": (-6.0, -3.0), "augmentation": (-12.0, -5.0), "pooling": (2.0, 0.0)}


def test_main_effects_without_noise_are_the_differences():
    records = overfitting_records(0.0, EFFECTS)
    for i, values in enumerate((overfitting.gaps(records), overfitting.errors(records))):
        for factor, effect in EFFECTS.items():
            assert overfitting.main_effect(values, factor).difference == pytest.approx(effect[i])


def test_the_verdicts_on_overfitting(tmp_path):
    records = overfitting_records(0.5, EFFECTS)
    findings = overfitting.judge(records)
    assert set(findings) == {claim.key for claim in overfitting.CLAIMS}
    for key, verdict in (("dropout_gap", "holds"), ("dropout_error", "holds"), ("augmentation_gap", "holds"),
                         ("augmentation_error", "holds"), ("pooling_gap", "contradicted")):  # fmt: skip
        measured, n, power, actual = row_of(overfitting, findings, key)
        assert (actual, n) == (verdict, "5"), measured
        factor, measure = key.split("_")
        expected = EFFECTS[factor][measure == "error"]  # without an interaction it is the same in the whole network
        values = overfitting.errors(records) if measure == "error" else overfitting.gaps(records)
        assert overfitting.effect_in_the_whole(values, factor).difference == pytest.approx(expected, abs=1.5)
        assert float(power.split()[0]) > 0.9
    none = overfitting.judge(overfitting_records(2.0, dict.fromkeys(EFFECTS, (0.0, 0.0))))
    assert row_of(overfitting, none, "pooling_gap")[-1] in ("not decided", "smaller than stated")
    overfitting.plot(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == PNG


def test_a_main_effect_agrees_with_the_analysis_of_variance():
    """The squared t of a contrast is the F of one degree of freedom, of form + seed + noise fitted by least squares."""
    values = overfitting.errors(overfitting_records(1.0, EFFECTS))
    names, seeds = list(values), 5
    y = np.array([values[name][seed] for name in names for seed in range(seeds)])
    form = np.repeat(np.eye(len(names)), seeds, axis=0)
    seed = np.tile(np.eye(seeds), (len(names), 1))
    whole = np.hstack([form, seed])
    coefficients, _, rank, _ = np.linalg.lstsq(whole, y, rcond=None)
    degrees = len(y) - rank
    residual = np.sum((y - whole @ coefficients) ** 2)
    sign = np.repeat([1.0 if form.dropout else -1.0 for form in overfitting.FORMS], seeds)
    f = (sign @ y) ** 2 / len(y) / (residual / degrees)
    effect = overfitting.main_effect(values, "dropout")
    assert effect.degrees == degrees == 28
    assert effect.p == pytest.approx(stats.f.sf(f, 1, degrees))


def test_the_forms_are_crossed():
    assert len({str(form) for form in overfitting.FORMS}) == len({form.arm for form in overfitting.FORMS}) == 8
    for factor in ("dropout", "augmentation", "pooling"):
        assert sum(getattr(form, factor) for form in overfitting.FORMS) == 4


def converging(time, epochs=24, lowest=0.3):
    """A validation error, four per epoch, that falls straight until an epoch and rises slowly after it."""
    middles = (np.arange(4 * epochs) + 1) / 4
    return np.where(middles < time, lowest + 0.04 * (time - middles), lowest + 0.001 * (middles - time)).tolist()


def test_time_to_converge():
    epochs = ((np.arange(40) + 1) / 4).tolist()
    falling = [1 - 0.01 * i for i in range(40)]  # 1 point per validation
    time, late = dropout_time.time_to_converge(epochs, falling)
    # The last running mean is centered 1.5 validations before the end, and one validation earlier is within a point.
    assert late and time == pytest.approx(10 - 1.5 / 4 - 1 / 4)
    one_outlier = [0.5] * 40
    one_outlier[3] = 0.47  # the running mean falls by 0.75 points
    assert dropout_time.time_to_converge(epochs, one_outlier) == (pytest.approx(2.5 / 4), False)
    time, late = dropout_time.time_to_converge(epochs, converging(5.0, 10))
    assert not late and time == pytest.approx(4.75, abs=0.26)  # 4 points per epoch, so a quarter before the minimum


@pytest.mark.parametrize("with_dropout,without,verdict", [
    ((12.0, 13.0, 14.0), (6.0, 7.0, 7.0), "holds"),
    ((6.0, 7.0, 8.0), (8.0, 7.0, 6.0), "not decided"),
    ((5.0, 6.0, 5.0), (12.0, 13.0, 12.0), "contradicted"),
])  # fmt: skip
def test_the_verdict_on_the_time_to_converge(with_dropout, without, verdict, tmp_path):
    runs = {"dropout": with_dropout, "no dropout": without}
    records = stored({
        "epochs": ((np.arange(96) + 1) / 4).tolist(),
        **{form: [{"validation": converging(time)} for time in times] for form, times in runs.items()},
    })  # fmt: skip
    findings = dropout_time.judge(records)
    times = {
        form: [dropout_time.time_to_converge(records["epochs"], run["validation"])[0] for run in records[form]]
        for form in runs
    }
    expected = stats.ttest_rel(*(np.log(times[form]) for form in ("dropout", "no dropout")))
    assert findings["dropout_time"].comparison.p == pytest.approx(expected.pvalue)
    assert findings["dropout_time"].comparison.difference == pytest.approx(
        np.mean([math.log(a / b) for a, b in zip(*times.values(), strict=True)])
    )
    assert row_of(dropout_time, findings, "dropout_time")[-1] == verdict
    dropout_time.plot(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == PNG


def test_runs_that_still_improve_bound_the_time():
    epochs = ((np.arange(40) + 1) / 4).tolist()
    falling = {"validation": [1 - 0.01 * i for i in range(40)]}
    flat = {"validation": converging(5.0, 10)}
    records = {"epochs": epochs, "dropout": [falling, flat], "no dropout": [flat, flat]}
    finding = dropout_time.judge(records)["dropout_time"]
    assert "a lower bound in 1 of 2 runs" in finding.text and finding.text.count("lower bound") == 1
    assert finding.comparison.bound == 1
    swapped = dropout_time.judge(records | {"dropout": [flat, flat], "no dropout": [falling, flat]})
    assert swapped["dropout_time"].comparison.bound == -1
    neither = dropout_time.judge(records | {"no dropout": [falling, falling]})
    assert row_of(dropout_time, neither, "dropout_time")[-1] == "not measured"


def experiment(name, *flags):
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.mark.skipif(not CIFAR10.exists(), reason="no prepared CIFAR-10 in $ALEXNET_TEST_DATA")
def test_it_runs_resumes_and_reports(tmp_path):
    flags = ["dropout_time", f"--workdir={tmp_path}", "--quick", "--seeds=2", f"--data_dir={CIFAR10}"]
    done = experiment(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no-dropout, seed 1: 256 images, 2 epochs" in done.stdout and "| claim | the paper |" in done.stdout
    result = tmp_path / "quick" / "dropout_time.json"
    first = json.loads(result.read_text())["records"]
    assert first["epochs"] == [0.25 * (i + 1) for i in range(8)]
    assert [len(run["validation"]) for form in dropout_time.FORMS for run in first[form]] == [8] * 4
    assert result.with_suffix(".png").read_bytes()[:4] == PNG
    result.unlink()
    again = experiment(*flags)
    assert again.returncode == 0 and "step " not in again.stdout
    assert json.loads(result.read_text())["records"] == first


def test_what_cannot_run_is_one_line(tmp_path):
    done = experiment("overfitting", f"--workdir={tmp_path}", "--seeds=1")
    assert done.returncode == 1 and done.stderr == "Error: --seeds=1: expected at least 2; one run has no spread\n"
