"""Files of weights: written and read back, bit for bit, and refused in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alexnet_jax import AlexNet, Stem
from alexnet_jax.preprocess import Preprocess
from alexnet_jax.weights import Source, Weights, WeightsError, read_native, write_native


def small_weights(**fields):
    model = AlexNet(num_classes=3, stem=Stem(3, 1, 1), widths=(4, 4, 4, 4, 4, 8, 8), dtype=jnp.dtype("bfloat16"))
    preprocess = Preprocess(
        mean=np.full((32, 32, 3), 100.5, np.float32), pad=0, crop=28, resize=0, flip=True,
        lighting=(np.ones(3, np.float32), np.eye(3, dtype=np.float32)), scale=0.5,
    )  # fmt: skip
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    values = dict(class_names=("a", "ä", "c"), dataset="cifar10", source=Source("torch", "a.pth", "ab" * 32))
    return Weights(model, jax.tree.map(np.asarray, params), preprocess, **{**values, **fields})


def test_a_file_is_read_back_bit_for_bit(tmp_path):
    weights = small_weights()
    write_native(weights, tmp_path / "a.safetensors")
    for _ in range(8):
        write_native(weights, tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    other = read_native(tmp_path / "a.safetensors")
    jax.tree.map(np.testing.assert_array_equal, (other.params, other.preprocess), (weights.params, weights.preprocess))
    assert jax.tree.structure(other.preprocess) == jax.tree.structure(weights.preprocess)
    for name in ("model", "class_names", "dataset", "test_split", "resizing", "ten_crop", "source"):
        assert getattr(other, name) == getattr(weights, name), name
    assert hash(other.model) == hash(weights.model)


@pytest.mark.parametrize("change,words", [
    (lambda t: t.pop("fc8.bias"), r"fc8.bias is missing; expected \[3\]"),
    (lambda t: t.update({"fc9.bias": np.zeros(3)}), "fc9.bias: this network has no such array"),
    (lambda t: t.update({"fc8.bias": np.zeros(4)}), r"fc8.bias is \[4\]; expected \[3\]"),
    (lambda t: t["conv1.bias"].fill(np.nan), "conv1.bias holds values that are not finite"),
    (lambda t: t.pop("preprocess.mean"), "its description is corrupt"),
])  # fmt: skip
def test_other_arrays_are_one_line(tmp_path, change, words):
    path = tmp_path / "a.safetensors"
    write_native(small_weights(), path)
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(WeightsError, match=words) as error:
        read_native(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
