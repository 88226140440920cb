"""torchvision's five real convolutions, which a package of the registry has, on photographs; large downloads."""

import jax
import numpy as np
import pytest
import reference
import weight_files
from downloads import LARGE

from alexnet_jax import activations
from alexnet_jax.weights import load_weights

pytestmark = LARGE

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_real_convolutions_equal_float64(convolutions, photographs, tmp_path):
    assert convolutions[0][0][0, 0, 0, 0] == pytest.approx(0.11864, abs=1e-5)
    params = weight_files.random_params((64, 192, 384, 256, 256, 2, 2), towers=1)  # the small fully connected layers
    params |= {f"conv{i}": dict(zip(("kernel", "bias"), pair, strict=True)) for i, pair in enumerate(convolutions, 1)}
    weight_files.torch_legacy(tmp_path / "a.pth", params)
    weights = load_weights(tmp_path / "a.pth")
    photographs = np.stack([x[20:276, 100:356] for x in photographs.values()])
    inputs = weights.preprocess.center_crop(photographs)
    found = jax.jit(activations, static_argnums=0)(weights.model, weights.params, inputs)

    x = (photographs[:, 16:240, 16:240] / 255 - MEAN) / DEVIATION
    for i, (kernel, bias) in enumerate(convolutions, 1):
        pad = 2 if i < 3 else 1
        edges = ((2, 1),) * 2 if i == 1 else ((pad, pad),) * 2  # conv1's output is rounded down: one row is not read
        x = reference.relu(reference.conv(x, kernel, 4 if i == 1 else 1, edges) + bias.astype(np.float64))
        assert x.max() > 1
        np.testing.assert_allclose(found[f"conv{i}"], x, rtol=1e-5, atol=1e-5 * x.max(), err_msg=f"conv{i}")
        if i in (1, 2):
            x = reference.max_pool(x)
