"""The count of a compiled program's bytes, on programs small enough to count by hand."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from alexnet_jax import AlexNet
from alexnet_jax.errors import UserError
from experiments.compiled import cases, report, targets, traffic
from experiments.compiled.__main__ import read_records
from experiments.compiled.floor import Floor, floor
from experiments.sharding import collectives

LOOP = """
HloModule jit_f

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %i = s32[] get-tuple-element(%p), index=0
  %y = f32[8,16]{1,0} fusion(%x), kind=kLoop, calls=%c, metadata={op_name="jit(f)/jvp(AlexNet)/conv2/mul"}
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%i, %y)
}

ENTRY %main (a: bf16[4,4], b: f32[8,16]) -> f32[8,16] {
  %a = bf16[4,4]{1,0} parameter(0)
  %b = f32[8,16]{1,0} parameter(1)
  %start = (bf16[4,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%a), metadata={op_name="jit(f)/AlexNet/fc6"}
  %done = bf16[8,4]{1,0} all-gather-done(%start)
  %s = (s32[], f32[8,16]{1,0}) tuple(%zero, %b)
  %w = (s32[], f32[8,16]{1,0}) while(%s), condition=%k, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %g = (bf16[2,2], u8[0]) custom-call(%a, %done), custom_call_target="lib", metadata={op_name="transpose(a)/conv1"}
  ROOT %r = f32[8,16]{1,0} get-tuple-element(%w), index=1
}
"""


def test_bytes_by_operation_with_loops_and_asynchronous_operations():
    found = {op.name: op for op in traffic.operations(LOOP)}
    assert set(found) == {"start", "y", "g"}
    assert (found["y"].read, found["y"].written, found["y"].trips, found["y"].bytes) == (512, 512, 3, 3072)
    assert (found["y"].layer, found["y"].backward) == ("conv2", False)
    assert (found["g"].kind, found["g"].layer, found["g"].backward) == ("lib", "conv1", True)
    assert (found["g"].read, found["g"].written) == (32 + 64, 8)
    assert (found["start"].read, found["start"].written, found["start"].layer) == (32, 64, "fc6")
    assert found["start"].while_concurrent == 0


TPU = """
HloModule jit_g

%condition (q: (s32[], bf16[8,128])) -> pred[] {
  %q = (s32[], bf16[8,128]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  %n = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

%updated (p0: bf16[8,128], p1: bf16[64,8,128], p2: s32[]) -> bf16[8,128] {
  %p0 = bf16[8,128]{1,0} parameter(0)
  %p1 = bf16[64,8,128]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %part = bf16[1,1,128]{2,1,0} dynamic-slice(%p1, %p2, %p2, %p2), dynamic_slice_sizes={1,1,128}
  %row = bf16[1,128]{1,0} bitcast(%part)
  ROOT %update = bf16[8,128]{1,0} dynamic-update-slice(%p0, %row, %p2, %p2)
}

%body (r: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %r = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%r), index=0
  %rows = bf16[8,128]{1,0} get-tuple-element(%r), index=1
  %table = bf16[64,8,128]{2,1,0} constant({...})
  %step = bf16[8,128]{1,0} fusion(%rows, %table, %i), kind=kLoop, calls=%updated
  ROOT %next = (s32[], bf16[8,128]{1,0}) tuple(%i, %step)
}

ENTRY %main (a: f32[8,128], b: bf16[8,128]) -> bf16[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[8,128]{1,0} parameter(1)
  %c = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %between = bf16[4,4]{1,0} add(%b, %b), metadata={op_name="jit(g)/optimizer/add"}
  %d = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%c)
  %s = ((f32[8,128]{1,0:T(8,128)}), f32[2,128]{1,0:T(2,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:128]}
  %t = f32[2,128]{1,0:T(2,128)S(1)} slice-done(%s)
  %e = f32[8,128]{1,0:T(8,128)S(1)} fusion(%d), calls=%z, metadata={op_name="jit(g)/preprocess/mul"}
  %k = bf16[2,256,256,3]{3,2,1,0} gather(%b, %e), metadata={op_name="jit(g)/preprocess/gather"}
  %l = f32[2,256,256,8]{3,2,1,0} convert(%k), metadata={op_name="jit(g)/jvp(AlexNet)/fc6/jit(_threefry_fold_in)/add"}
  %w = (s32[], bf16[8,128]{1,0}) while(%tuple), condition=%condition, body=%body
  ROOT %x = bf16[8,128]{1,0} get-tuple-element(%w), index=1
}
"""


def test_bytes_on_a_tpu_whose_vector_memory_is_a_part_of_the_chip():
    found = {op.name: op for op in traffic.operations(TPU)}
    assert set(found) == {"c", "between", "s", "e", "k", "l", "step"}
    assert (found["c"].read, found["c"].written, found["c"].while_concurrent) == (4096, 0, 1)
    assert (found["s"].read, found["s"].written) == (1024, 0)
    assert found["e"].bytes == 0
    assert (found["step"].read, found["step"].written, found["step"].trips) == (4 + 256, 256, 5)
    assert [found[name].layer for name in ("between", "e", "l")] == ["update", "input", "dropout"]
    assert traffic.loops_and_gathers(TPU) == {"while": 1, "image gathers": 0, "float32 activations": 1}
    larger = TPU.replace("2,256,256,3", "8,256,256,3")  # 2^20 elements at least
    assert traffic.loops_and_gathers(larger)["image gathers"] == 1


@pytest.mark.parametrize(
    "op_name, place",
    [
        ("jit(train_step)/jvp(AlexNet)/conv2/conv_general_dilated", ("conv2", False)),
        ("jit(train_step)/transpose(jvp(AlexNet))/conv1/relu_lrn_pool_backward/pallas_call", ("conv1", True)),
        ("jit(train_step)/jvp(AlexNet)/fc7/dropout/pallas_call", ("dropout", False)),
        ("jit(train_step)/transpose(jvp(metrics))/mul", ("metrics", False)),
        ("jit(train_step)/shard_map/transpose(jvp())/psum", ("other", True)),
        ("", ("other", False)),
    ],
)
def test_the_layer_of_an_operation(op_name, place):
    assert traffic.place(op_name) == place


def test_the_floor_by_hand():
    # 33×33 pixels, 5×5 kernels: conv1 is 15×15, pool1 7×7, pool2 3×3, pool5 1×1.
    model = AlexNet(num_classes=4, stem=(5, 2, 0), widths=(8, 0, 0, 0, 0, 6, 0), towers=1, dtype=jnp.bfloat16)
    floors = floor(model, (40, 40, 3), 33, 10, 2, 1, train=True)
    images, pixels = 5, 33 * 33 * 3
    x, z, y, y2, y5 = (images * n * 2 for n in (pixels, 225 * 8, 49 * 8, 9 * 8, 8))
    kernel, flops = (5 * 5 * 3 * 8 + 8) * 2, 2 * images * 225 * 5 * 5 * 3 * 8
    assert floors["input", False] == Floor(images * pixels * 3, 0)
    assert floors["conv1", False] == Floor(x + kernel + z + (z + y), flops)
    assert floors["conv1", True] == Floor((y + 2 * z) + (x + z + kernel), flops)
    assert (floors["conv2", False].bytes, floors["conv2", True].bytes) == (y + y2, y2 + 2 * y)
    assert (floors["conv3", False].bytes, floors["conv5", False].bytes) == (0, y2 + y5)
    fc6, h = (8 * 6 + 6) * 2, images * 6 * 2
    assert floors["fc6", False] == Floor(y5 + fc6 + h, 2 * images * 8 * 6)
    assert floors["fc6", True] == Floor(3 * h + (y5 + h + fc6) + (h + fc6 + y5), 4 * images * 8 * 6)
    weights = (kernel + fc6) // 2 + 6 * 4 + 4
    assert floors["update", False] == Floor(weights * (2 + 16) + weights * 8, 0)
    inference = floor(model, (40, 40, 3), 33, 10, 2, 1, train=False)
    assert ("fc6", True) not in inference and ("update", False) not in inference


def test_the_floor_of_the_papers_network():
    floors = floor(AlexNet(dtype=jnp.bfloat16), (256, 256, 3), 224, 512, 1, 1, train=True)
    assert 6.7e9 < sum(x.bytes for x in floors.values()) < 6.9e9
    assert 2.1e12 < sum(x.flops for x in floors.values()) < 2.3e12


@pytest.mark.parametrize(
    "shape, size",
    [
        ("f32[2,3]{1,0}", 24),
        ("(bf16[4,4]{1,0}, s32[])", 36),
        ("bf16[3,3,3,96]{3,2,1,0:T(8,128)(2,1)}", 3 * 3 * 8 * 128 * 2),  # the minor axes in whole tiles
        ("f32[5,200]{0,1:T(8,128)}", 128 * 200 * 4),
        ("u8[]", 1),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert traffic.shape_bytes(shape) == size


def test_the_count_of_a_program_of_this_machine():
    x = jnp.ones((256, 128))
    text = jax.jit(lambda x: jnp.sin(x @ x.T)).lower(x).compile().as_text()
    total = sum(op.bytes for op in traffic.operations(text))
    assert 256 * 128 * 4 + 256 * 256 * 4 <= total <= 4 * (256 * 128 * 4 + 256 * 256 * 4)


@pytest.fixture
def here():
    """The CPU as a target."""
    return targets.Target("cpu", targets.Chip("CPU", 1e10, 1e11, 1e10), jax.devices()[:1])


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_case_on_this_machine(here, mode, tmp_path):
    case = cases.Case(here, "fashion_mnist", mode, 8, "float32", "one_device")
    record = cases.measure(case, tmp_path)
    assert (tmp_path / f"cpu_fashion_mnist_{mode}_8_float32_one_device.hlo.txt").stat().st_size > 1000
    assert record["bytes"] == sum(row["read"] + row["written"] for row in record["layers"])
    assert record["floor"] == sum(row["floor"] for row in record["layers"]) < record["bytes"]
    assert {"conv1", "conv5", "fc8"} <= {row["layer"] for row in record["layers"]}
    assert any(row["pass"] == "backward" for row in record["layers"]) == (mode == "train")
    assert record["memory"]["total"] > 0 and record["estimated_ms"] > 0
    text = report.markdown([record, record | {"largest_batch": 640}])
    assert "| cpu | one device |" in text and "640" in text and "estimate" in text
    report.plot([record, record], tmp_path / "compiled.png")
    assert (tmp_path / "compiled.png").stat().st_size > 10_000
    (tmp_path / "compiled.json").write_text(json.dumps([record]))
    assert list(read_records(tmp_path / "compiled.json")) == [case.name]


def test_records_that_are_not_records_are_one_line(tmp_path):
    (tmp_path / "compiled.json").write_text('[{"name": "h100"}]')
    with pytest.raises(UserError, match="expected the records of this version"):
        read_records(tmp_path / "compiled.json")


def test_the_largest_batch_is_found_by_bisection(here, monkeypatch):
    tried = []

    class Compiled:
        def __init__(self, batch):
            self.batch = batch

        def compile(self):
            tried.append(self.batch)
            if self.batch > 4000:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
            return self

    monkeypatch.setattr(cases, "build", lambda case: Compiled(case.batch))
    monkeypatch.setattr(cases, "memory_bytes", lambda compiled: {"total": compiled.batch * 1e10 / 2000})
    found = cases.largest_batch(cases.Case(here, "fashion_mnist", "train", 8, "float32", "one_device"))
    assert 0.95 * 2000 <= found <= 2000 and len(tried) < 15
    monkeypatch.setattr(cases, "memory_bytes", lambda compiled: {"total": 1e11})
    assert cases.largest_batch(cases.Case(here, "fashion_mnist", "train", 8, "float32", "one_device")) == 0


def test_an_all_reduce_of_concatenated_gradients_is_counted_by_layer():
    text = """
%joined (p0: f32[4], p1: f32[2,3], p2: f32[1]) -> f32[11] {
  %p0 = f32[4]{0} parameter(0)
  %p1 = f32[2,3]{1,0} parameter(1)
  %p2 = f32[1]{0} parameter(2)
  %flat = f32[6]{0} bitcast(%p1)
  ROOT %all = f32[11]{0} concatenate(%p0, %flat, %p2), dimensions={0}
}

ENTRY %main (a: f32[4], b: f32[2,3], loss: f32[1]) -> f32[11] {
  %a = f32[4]{0} parameter(0), metadata={op_name="transpose(jvp(AlexNet))/conv1/reduce_sum"}
  %b = f32[2,3]{1,0} parameter(1), metadata={op_name="transpose(jvp(AlexNet))/conv2/dot_general"}
  %loss = f32[1]{0} parameter(2), metadata={op_name="jvp(metrics)/fc8"}
  %c = f32[11]{0} fusion(%a, %b, %loss), kind=kLoop, calls=%joined
  ROOT %r = f32[11]{0} all-reduce(%c), replica_groups={{0,1}}, metadata={op_name="(transpose(jvp())/psum:metrics/psum)"}
}
"""
    mesh = Mesh(np.array([0, 1]).reshape(2, 1), ("data", "tower"))
    found = {(c.layer, c.axis, c.backward): c.array_bytes for c in collectives(text, mesh)}
    assert found == {("conv1", "data", True): 16, ("conv2", "data", True): 24, ("metrics", "data", False): 4}


def test_collectives_that_differ_from_the_theory():
    gather = dict(kind="all-gather", layer="conv3", axis="tower", backward=False, array_bytes=8, received=4)
    reduced = dict(kind="all-reduce", layer="conv1", axis="data", backward=True, array_bytes=100, received=100)
    record = {"expected": [gather, reduced], "collectives": [gather, reduced | {"received": 99}]}
    assert report.differing(record) == []
    record["collectives"] = [gather, reduced | {"received": 50}]
    assert [key[:2] for key in report.differing(record)] == [("all-reduce", "conv1")]
    record["collectives"] = [gather | {"received": 5}, gather | {"kind": "collective-permute"}]
    assert {key[:2] for key in report.differing(record)} == {
        ("all-gather", "conv3"), ("collective-permute", "conv3"), ("all-reduce", "conv1")
    }  # fmt: skip


@pytest.mark.parametrize(
    "config, message", [("nothing", "no such config"), ("imagenet2012:new", "expected one of paper")]
)
def test_a_config_that_does_not_exist_is_one_line(config, message):
    with pytest.raises(UserError, match=message) as error:
        cases.load_config(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", ["imagenet2012:caffe", "cifar10", "fashion_mnist_224", "imagenet2012_modern"])
def test_every_config_has_a_program(here, config):
    program = cases.build(cases.Case(here, config, "train", 8, "bfloat16", "one_device"))
    assert program.model.dtype == jnp.bfloat16 and program.stored[0] >= 28


@pytest.mark.parametrize("name", ["v9:2x2", "h100:9", "h100:x", "v5e", "v5e:2", "cpu"])
def test_an_unknown_target_is_one_line(name, tmp_path):
    with pytest.raises(targets.TargetError, match="expected h100, h100:N"):
        targets.find(name)


@pytest.mark.parametrize(
    "target, package, extra", [("h100", "jax_cuda13_plugin", "compile-gpu"), ("v5e:2x2", "libtpu", "compile-tpu")]
)
def test_a_missing_extra_is_named(target, package, extra, tmp_path):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    command = [sys.executable, "-m", "experiments.compiled", f"--workdir={tmp_path}", f"--target={target}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f'pip install -e ".[{extra}]"' in done.stderr


def _compile(workdir, *flags):
    """Return the records of the command."""
    command = [sys.executable, "-m", "experiments.compiled", f"--workdir={workdir}", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    return json.loads((workdir / "compiled.json").read_text())


needs_gpu = pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs the extra compile-gpu")
needs_tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra compile-tpu")


@needs_gpu
def test_the_train_step_for_an_h100(tmp_path):
    (record,) = _compile(tmp_path, "--target=h100", "--batch=512")
    assert record["bytes"] < min(9.0e9, 1.35 * record["floor"])
    assert record["while"] == record["float32 activations"] == 0
    found = traffic.operations((tmp_path / f"{record['name']}.hlo.txt").read_text())
    kernels = [op for op in found if "relu_lrn_pool" in op.op_name]
    assert len(kernels) == 4  # those of conv1 and conv2, forward and backward


@needs_tpu
def test_the_train_step_for_a_tpu(tmp_path):
    (record,) = _compile(tmp_path, "--target=v5e:1x1", "--batch=256")
    assert record["bytes"] < 1.6 * record["floor"]
    assert record["while"] == record["image gathers"] == record["float32 activations"] == 0


@pytest.mark.parametrize(
    "target, layout",
    [
        pytest.param("h100:2", "tower", marks=needs_gpu),
        pytest.param("h100:8", "data_tower", marks=needs_gpu),
        pytest.param("v5e:2x2", "data_tower", marks=needs_tpu),
    ],
)
def test_the_collectives_are_those_of_the_theory(target, layout, tmp_path):
    (record,) = _compile(tmp_path, f"--target={target}", f"--layout={layout}")
    assert record["collectives"] and report.differing(record) == []


@pytest.mark.parametrize("target", [pytest.param("h100:2", marks=needs_gpu), pytest.param("v5e:2x2", marks=needs_tpu)])
def test_the_layouts_of_the_partitioner_compile(target, tmp_path):
    (record,) = _compile(tmp_path, f"--target={target}", "--layout=one_weird_trick", "--batch=256")
    gathered = {(c["layer"], c["axis"]) for c in record["collectives"] if c["kind"] == "all-gather"}
    assert {("fc7", "data"), ("fc8", "data")} <= gathered
