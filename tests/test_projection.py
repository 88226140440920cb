"""The projection of layouts onto more devices, against sums by hand."""

import json
import subprocess
import sys

import pytest
from runners import ROOT

from experiments import projection


def record(target, layout, data, tower, batch=1024, excess=1, **fields):
    gradients = {"kind": "all-reduce", "layer": "fc6", "axis": "data", "backward": True, "received": 1_000_000}
    theory = [gradients] * (data > 1)
    return dict(
        target=target, layout=layout, mesh={"data": data, "tower": tower}, batch=batch, config="imagenet2012",
        mode="train", dtype="bfloat16", memory={"total": 3e9}, expected=theory, name=target, operations=1, bytes=1,
        floor=1, estimated_ms=9.0, compile_s=1.0, compile_peak_bytes=1, asynchronous=[],
        **{"while": 0, "image gathers": 0, "float32 activations": 0},
        collectives=[{**c, "received": excess * c["received"]} for c in theory],
        layers=[layer("conv1", 2e6, floor=2e6, estimated_ms=8), layer("update", 3e6, floor=6e6, estimated_ms=1)],
    ) | fields  # fmt: skip


def layer(name, size, **fields):
    return {"layer": name, "pass": "forward", "operations": 1, "read": size, "written": size, "flops": 1, **fields}


def by_cell(rows):
    return {(r["chip"], r["layout"], r["devices"]): r for r in rows}


def test_a_program_for_these_devices_is_taken_as_it_is():
    (row,) = projection.project([record("v5e:2x4", "data", 8, 1)], 1024, devices=(8,), latency=1e-6)
    assert row["compiled"] and row["memory"] == 3e9 and row["compute_s"] == pytest.approx(9e-3)
    hops = 2 * 2 * (8**0.5 - 1)  # around the two sides of a torus, twice
    assert row["communicate_s"] == pytest.approx(1e6 / 100e9 + hops * 1e-6)
    assert row["epochs_s"] == pytest.approx(90 * 1_281_167 / 1024 * row["step_s"])


def test_other_devices_are_scaled():
    rows = by_cell(projection.project([record("v5e:2x4", "data", 8, 1, excess=1.5)], 4096, devices=(2, 64), latency=0))
    gradients = 4 * 60_965_224
    for devices in (2, 64):
        row = rows["v5e", "data", devices]
        assert not row["compiled"] and row["memory"] is None
        # conv1 moves twice its floor: pixels, kernel and bias, outputs for the convolution and again for the rest, and
        # pooled outputs. All parameters, gradients and momenta are updated on each device, and the gradients reduced.
        image = 2 * (224 * 224 * 3 + 2 * 55 * 55 * 96 + 27 * 27 * 96)
        conv1 = 2 * (4096 / devices * image + 2 * (11 * 11 * 3 * 96 + 96))
        update = 60_965_224 * (2 + 4 * 4 + 2 * 4)
        assert row["compute_s"] == pytest.approx((conv1 + update) / 819e9)
        # It received half as much again as it had to; 8 bytes are the loss and the error.
        received = 1.5 * 2 * (devices - 1) / devices * gradients
        link = 50e9 if devices == 2 else 100e9  # two chips have one link between them
        assert row["communicate_s"] == pytest.approx(received / link, rel=1e-6)
    (fsdp,) = projection.project([record("v5e:2x4", "fsdp", 8, 1)], 4096, devices=(64,))
    assert rows["v5e", "data", 64]["compute_s"] - fsdp["compute_s"] == pytest.approx(update * 7 / 8 / 819e9)


def test_gpus_communicate_within_a_node_and_between_nodes():
    rows = by_cell(projection.project([record("h100:8", "data", 8, 1)], 4096, devices=(8, 64), latency=1e-6))
    gradients = 4 * 60_965_224
    inside = 2 * 7 / 8 * gradients / 450e9
    latency = 8 * 2 * 7e-6  # eight layers
    assert rows["h100", "data", 8]["communicate_s"] == pytest.approx(inside + latency, rel=0.05)
    received = 2 * 63 / 64 * gradients
    between = received / 450e9 + received / 8 / 50e9 + 8 * 2 * (7 + 7) * 1e-6
    assert rows["h100", "data", 64]["communicate_s"] == pytest.approx(between, rel=0.05)


def test_a_layout_stops_where_the_devices_no_longer_pay():
    records = [record("h100", "one_device", 1, 1), record("h100:2", "tower", 1, 2), record("h100:8", "data", 8, 1)]
    rows = projection.project(records, 4096)
    assert {r["devices"] for r in rows if r["layout"] == "tower"} == {2}
    assert {r["devices"] for r in rows if r["layout"] == "data"} == {2, 8, 64, 256, 512}
    assert projection.stops_at(rows, "h100", "tower") == "2"  # it has no more devices
    steps = [r["step_s"] for r in rows if r["layout"] == "data"]
    stop = int(projection.stops_at(rows, "h100", "data"))
    last = (2, 8, 64, 256, 512).index(stop)
    assert steps[last] <= 0.9 * steps[last - 1] and steps[last + 1] > 0.9 * steps[last]
    slow = projection.project(records, 4096, latency=1.0)  # one device is faster than any two
    assert projection.stops_at(slow, "h100", "data") == projection.stops_at(slow, "h100", "one_device") == "1"
    assert "| h100 | one device | (" in projection.table(rows)


def test_the_records_of_the_project_are_projected(tmp_path):
    command = [sys.executable, "-m", "experiments.projection", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "projection.json").read_text())
    assert {"h100", "v5e"} <= {r["chip"] for r in rows} and any(r["compiled"] for r in rows)
    assert (tmp_path / "projection.png").stat().st_size > 10_000


@pytest.mark.parametrize("content,flags,words", [
    (None, ["--latency=-1"], "--latency=-1"),
    (None, ["--latency=nan"], "--latency=nan"),
    (None, ["--batch=100"], "8 devices do not divide it"),
    (None, ["--batch=0"], "--batch=0: expected at least 1"),
    ("[]", [], "no train step of imagenet2012"),
    ("[{}]", [], "expected what experiments.compiled writes"),
    ("{]", [], "compiled.json"),
])  # fmt: skip
def test_bad_flags_are_one_line_and_write_nothing(tmp_path, content, flags, words):
    text = json.dumps([record("v5e:2x4", "data", 8, 1)]) if content is None else content
    (tmp_path / "compiled.json").write_text(text)
    command = [sys.executable, "-m", "experiments.projection", f"--records={tmp_path}/compiled.json"]
    done = subprocess.run([*command, f"--workdir={tmp_path}", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["compiled.json"]
