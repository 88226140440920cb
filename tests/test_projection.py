"""The projection of layouts onto more devices, against sums by hand."""

import json
import subprocess
import sys

import pytest
from runners import ROOT

from experiments import projection


def record(layout, data, tower, received, minimum):
    mesh = {"data": data, "tower": tower}
    return dict(
        layout=layout, mesh=mesh, batch=32, flops=1e9, received_bytes=received, minimum_bytes=minimum, collectives=[]
    )


def test_data_parallel_sends_two_copies_of_the_gradients():
    rows = projection.project([record("data", 8, 1, 300, 200)], link=1e9, compute=1e12, batch=512, devices=(2, 64))
    gradients = 4 * 60_965_224
    for row, count in zip(rows, (2, 64), strict=True):
        assert row["compute_s"] == pytest.approx(1e9 * 8 / 32 * 512 / count / 1e12)
        # The measured program moved half as much again as it had to; 8 bytes are the loss and the error.
        assert row["communicate_s"] == pytest.approx(1.5 * 2 * (count - 1) / count * gradients / 1e9, rel=1e-6)


def test_a_layout_stops_where_the_devices_no_longer_pay():
    records = [record("one_device", 1, 1, 0, 0), record("tower", 1, 2, 1, 1), record("data", 8, 1, 1, 1)]
    rows = projection.project(records, link=1e9, compute=1e12, batch=4096)
    at = {(r["layout"], r["devices"]): r["step_s"] for r in rows}
    assert at["one_device", 1] and at["tower", 2] and not at["tower", 64]
    assert projection.stops_at(rows, "tower") == "1"  # 1 GB of activations at 1 GB/s: longer than one device computes
    fast = projection.project(records, link=1e11, compute=1e12, batch=4096)
    assert projection.stops_at(fast, "tower") == "2"  # and has no more devices
    assert at["data", 512] > 0.9 * at["data", 64] and projection.stops_at(rows, "data") == "64"
    assert "| data | — |" in projection.table(rows)
    slow = projection.project(records, link=1e6, compute=1e12, batch=4096)  # one device is faster than any two
    assert projection.stops_at(slow, "data") == projection.stops_at(slow, "one_device") == "1"


@pytest.mark.parametrize("content,flags,words", [
    (None, ["--link=0"], "--link=0"),
    (None, ["--link=nan"], "--link=nan"),
    (None, ["--batch=100"], "8 devices do not divide it"),
    (None, ["--batch=0"], "--batch=0: expected at least 1"),
    ("[]", [], "expected what experiments.sharding writes"),
    ("{]", [], "sharding.json"),
])  # fmt: skip
def test_bad_flags_are_one_line_and_write_nothing(tmp_path, content, flags, words):
    records = [record("data", 8, 1, 300, 200)]
    (tmp_path / "sharding.json").write_text(json.dumps(records) if content is None else content)
    command = [sys.executable, "-m", "experiments.projection", f"--records={tmp_path}/sharding.json"]
    done = subprocess.run([*command, f"--workdir={tmp_path}", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["sharding.json"]
