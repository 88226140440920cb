import gzip
import json
import subprocess
import sys
import time
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import local_response_norm, max_pool, ops
from alexnet_jax.ops import pooling
from experiments.on_gpu import __main__ as on_gpu
from experiments.on_gpu import correctness, speed


def test_a_quick_run_finds_all_right(tmp_path, capsys):
    assert correctness.main(["--workdir", str(tmp_path), "--quick", "--budget", "600"]) == 0
    report = json.loads((tmp_path / "correctness.json").read_text())
    assert all(record["ok"] and record["error"] <= record["tolerance"] for record in report["records"])
    names = {record["name"] for record in report["records"]}
    for name in ("network: dconv1.kernel", "LRN, norm1: dx", "max pool, plain, pool5: dx", "conv, conv2: dkernel",
                 "ReLU + LRN + pool, stage2: dx", "dropout: result on four devices", "spatial norm, norm2: dx",
                 "cross-entropy: dlogits", "SGD update: velocity", "random crop: result", "random flip: result",
                 "PCA lighting: shift", "resize: result"):  # fmt: skip
        assert name in names
    cases = {(r["dtype"], r["precision"]) for r in report["records"] if r["name"] == "network: loss"}
    assert cases == {("float32", "highest"), ("float32", "default"), ("bfloat16", "default")}
    assert report["train_step"]["temp_size_in_bytes"] > 0
    with gzip.open(tmp_path / "train_step.hlo.txt.gz", "rt") as file:
        assert file.read().startswith("HloModule")
    assert "network: loss" in capsys.readouterr().out


def wrong_pool_gradient(x, window, stride):  # shares a maximum's gradient between all that hold it
    return jnp.max(jnp.stack([tap for _, _, tap in pooling._taps(x, window, stride)]), 0)


SHAPE = (2, 9, 9, 8)


@pytest.mark.parametrize("right,wrong", [
    (correctness.lrn_checks("", local_response_norm, SHAPE),
     correctness.lrn_checks("", lambda x, k, n, alpha, beta: local_response_norm(x, k, n, 1.1 * alpha, beta), SHAPE)),
    (correctness.max_pool_checks("", max_pool, SHAPE), correctness.max_pool_checks("", wrong_pool_gradient, SHAPE)),
    (correctness.relu_lrn_pool_checks("", correctness.relu_lrn_pool, SHAPE, 2),
     correctness.relu_lrn_pool_checks("", lambda x, towers, *c: correctness.relu_lrn_pool(x, 1, *c), SHAPE, 2)),
    (correctness.dropout_checks("", ops.dropout, (64, 512)),
     correctness.dropout_checks("", lambda key, x, rate, *place: 2 * ops.dropout(key, x, rate, *place), (64, 512))),
], ids=["LRN with another alpha", "max pool's ties", "LRN across the towers", "dropout that rescales"])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_operation_fails(right, wrong, dtype):
    for checks, expected in ((right, True), (wrong, False)):
        records = [r for check in checks for r in correctness.run_case(check, dtype, "default", check.oracle)]
        assert all(record["ok"] for record in records) == expected


def failing(x, *constants):
    raise FloatingPointError("on purpose")


def run(checks, folder, budget, monkeypatch):
    monkeypatch.setattr(correctness, "train_step", lambda setting, path: {"batch": 4})
    ok = correctness.run(None, {"LRN": lambda: checks}, folder, budget)
    return ok, json.loads((folder / "correctness.json").read_text())["records"]


def test_a_check_that_raises_is_a_record_and_the_others_go_on(tmp_path, monkeypatch):
    checks = [c for operation in (failing, local_response_norm) for c in correctness.lrn_checks("", operation, SHAPE)]
    ok, records = run(checks, tmp_path, 600, monkeypatch)
    assert not ok and [record["ok"] for record in records] == [False, False, True, True, True, True]
    assert records[0]["error"] == "FloatingPointError: on purpose"


def test_what_the_budget_leaves_out_is_recorded(tmp_path, monkeypatch):
    ok, records = run(correctness.lrn_checks("LRN", local_response_norm, SHAPE), tmp_path, -1, monkeypatch)
    assert ok and records == [{"name": name, "skipped": "budget"} for name in ("LRN", "train step")]


def test_a_result_that_is_no_number_fails():
    record = partial(correctness.compare, right=np.ones(3), tolerance=1.0)
    assert not record(np.array([1, np.nan, 1]))["ok"] and record(np.ones(3)) == {
        "error": 0.0, "largest": 0.0, "tolerance": 1.0, "ok": True
    }  # fmt: skip


def test_a_step_is_stopped_at_the_end_of_its_seconds():
    for code, expected in (("import time; time.sleep(60)", "stopped at the end of its budget"), ("", "ended")):
        begin = time.monotonic()
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        assert on_gpu.finish(process, 5 if expected == "ended" else 0.5) == expected
        assert time.monotonic() - begin < 20


def test_steps_are_known_by_name(tmp_path):
    command = [sys.executable, "-m", "experiments.on_gpu", f"--workdir={tmp_path}", "--only=speed,sped"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: --only: unknown step 'sped'; expected some of correctness,")


def test_cases_are_in_the_order_of_their_worth():
    cases = [str(case) for case in speed.cases([128, 512, 2048])]
    assert cases[:4] == ["training 512", "training 2048", "training 128", "inference 512"]
    assert cases[6:] == [f"training 512, {name}" for name in speed.VARIANTS if name != "default"]
