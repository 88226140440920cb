"""The count of a compiled program's bytes, on programs small enough to count by hand."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.compiled import targets, traffic

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
    actual = {op.name: op for op in traffic.operations(LOOP)}
    assert set(actual) == {"start", "y", "g"}
    assert (actual["y"].read, actual["y"].written, actual["y"].trips, actual["y"].bytes) == (512, 512, 3, 3072)
    assert (actual["y"].layer, actual["y"].backward) == ("conv2", False)
    assert (actual["g"].kind, actual["g"].layer, actual["g"].backward) == ("lib", "conv1", True)
    assert (actual["g"].read, actual["g"].written) == (32 + 64, 8)
    assert (actual["start"].read, actual["start"].layer) == (32, "fc6")


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


@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs the extra compile-gpu")
def test_the_train_step_for_an_h100(tmp_path):
    command = [sys.executable, "-m", "experiments.compiled", f"--workdir={tmp_path}", "--batch=512"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    text = (tmp_path / "h100_train_512_bfloat16_one_device.hlo.txt").read_text()
    actual = traffic.operations(text)
    assert sum(op.bytes for op in actual) < 9.0e9
    kernels = [op for op in actual if "relu_lrn_pool" in op.op_name]
    assert len(kernels) == 6  # conv1's, and one for each tower of conv2, forward and backward
