"""LPIPS: against float64, and against the authors' package on the real weights."""

import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import weight_files
from downloads import LARGE, download

from alexnet_jax import load_lpips_heads, load_weights, lpips
from alexnet_jax.weights import WeightsError

WIDTHS = (8, 12, 16, 8, 12, 2, 2)
HEADS = tuple(f"lin{i}.model.1.weight" for i in range(5))
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Random (kernel, bias) of five convolutions, their parameters as read from torchvision's format, and heads."""
    params = weight_files.random_params(WIDTHS, towers=1)
    path = tmp_path_factory.mktemp("network") / "alexnet.pth"
    weight_files.torch_legacy(path, params)
    convolutions = [tuple(params[f"conv{i}"].values()) for i in range(1, 6)]
    heads = [np.random.default_rng(i).random(width, np.float32) for i, width in enumerate(WIDTHS[:5])]
    return convolutions, load_weights(path).params, heads


def pair(*shape):
    rng = np.random.default_rng(1)
    a = rng.uniform(-1, 1, shape).astype(np.float32)
    return a, np.clip(a + rng.normal(0, 0.3, shape), -1, 1).astype(np.float32)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("height,width", [(31, 31), (33, 50), (64, 64), (90, 75)])
def test_it_equals_float64(network, height, width, spatial):
    convolutions, params, heads = network
    a, b = pair(2, height, width, 3)
    found = lpips(params, heads, a, b, spatial=spatial)
    expected = reference.lpips(convolutions, heads, a, b, spatial)
    assert found.dtype == jnp.float32 and found.shape == ((2, height, width) if spatial else (2,))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    assert expected.max() > 0.05


def test_convolutions_alone_suffice_and_any_leading_axes_are_taken(network):
    _, params, heads = network
    params = {layer: params[layer] for layer in ("conv1", "conv2", "conv3", "conv4", "conv5")}
    a, b = pair(2, 3, 40, 36, 3)
    found = jax.jit(lambda *args: lpips(params, heads, *args))(a, b)
    assert found.shape == (2, 3)
    close = dict(rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[1, 2], lpips(params, heads, a[1, 2], b[1, 2]), **close)
    by_vmap = jax.vmap(jax.vmap(lambda x, y: lpips(params, heads, x, y, spatial=True)))(a, b)
    np.testing.assert_allclose(by_vmap, lpips(params, heads, a, b, spatial=True), **close)
    np.testing.assert_allclose(lpips(params, heads, b, a), found, **close)
    half = lpips(params, heads, jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16))
    assert half.dtype == jnp.float32 and np.abs(half / found - 1).max() < 0.02


def test_the_gradient_equals_finite_differences_in_float64(network):
    convolutions, params, heads = network
    a, b = pair(1, 48, 40, 3)
    gradient = np.asarray(jax.grad(lambda x: lpips(params, heads, x, b).sum())(a), np.float64)
    direction = np.random.default_rng(2).normal(size=a.shape) + 2 * np.sign(gradient)
    step = 1e-6
    ends = [reference.lpips(convolutions, heads, a + sign * step * direction, b)[0] for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-3)
    _, forward = jax.jvp(lambda x: lpips(params, heads, x, b)[0], (a,), (direction.astype(np.float32),))
    assert float(forward) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("spatial", [False, True])
def test_equal_images_have_no_distance_and_a_finite_gradient(network, spatial):
    _, params, heads = network
    dead = {layer: {"kernel": p["kernel"], "bias": -abs(p["bias"])} for layer, p in params.items()}
    color = (np.array([123.675, 116.28, 103.53]) / 127.5 - 1).astype(np.float32)  # every unit is 0 in `dead`
    for p, a in ((params, pair(2, 40, 40, 3)[0]), (dead, np.broadcast_to(color, (2, 40, 40, 3)))):
        value, gradients = jax.value_and_grad(lambda p, x, y: lpips(p, heads, x, y, spatial).sum(), (0, 1, 2))(p, a, a)
        assert abs(value) < 1e-6
        for gradient in jax.tree.leaves(gradients):
            assert np.isfinite(gradient).all() and np.abs(gradient).max() < 1e-5


@pytest.mark.parametrize("a,b,words", [
    (np.zeros((1, 40, 40, 3)), np.zeros((1, 40, 41, 3)), r"\(1, 40, 40, 3\) and \(1, 40, 41, 3\); expected the same"),
    (np.zeros((1, 40, 40, 3)), np.zeros((40, 40, 3)), "expected the same shape"),
    (np.zeros((1, 40, 40, 1)), np.zeros((1, 40, 40, 1)), r"expected \[..., H, W, 3\], RGB"),
    (np.zeros((1, 3, 40, 40)), np.zeros((1, 3, 40, 40)), r"expected \[..., H, W, 3\], RGB"),
    (np.zeros((40, 3)), np.zeros((40, 3)), r"expected \[..., H, W, 3\], RGB"),
    (np.zeros((1, 30, 40, 3)), np.zeros((1, 30, 40, 3)), "of 30×40; expected at least 31×31"),
    (np.zeros((1, 40, 40, 3), np.uint8), np.zeros((1, 40, 40, 3)), "images of uint8; expected floats from −1 to 1"),
    (np.zeros((1, 40, 40, 3)), np.zeros((1, 40, 40, 3), int), "images / 127.5 − 1"),
])  # fmt: skip
def test_images_of_other_shapes_and_types(network, a, b, words):
    for call in (lpips, jax.jit(lpips)):
        with pytest.raises(ValueError, match=words) as error:
            call(network[1], network[2], a, b)
        assert "\n" not in str(error.value)


def test_parameters_and_heads_of_other_networks(network):
    _, params, heads = network
    a, b = pair(1, 40, 40, 3)
    with pytest.raises(ValueError, match="no conv4; expected conv1 to conv5"):
        lpips({layer: p for layer, p in params.items() if layer != "conv4"}, heads, a, b)
    with pytest.raises(
        ValueError, match=r"kernel of conv2 is \(5, 5, 2, 4\); expected \(5, 5, 4, …\), as in the variant"
    ):
        lpips(weight_files.random_params(), heads, a, b)  # with two towers
    with pytest.raises(ValueError, match="parameters of the type tuple; expected a dict, as weights.params"):
        lpips((params,), heads, a, b)
    with pytest.raises(ValueError, match="heads='alex.pth'; expected arrays: load_lpips_heads"):
        lpips(params, "alex.pth", a, b)
    with pytest.raises(ValueError, match="heads of the type NoneType; expected five arrays"):
        lpips(params, None, a, b)
    with pytest.raises(ValueError, match=r"heads\[0\] is of the type list; expected an array"):
        lpips(params, [head.tolist() for head in heads], a, b)
    for wrong in ({"kernel": params["conv1"]["kernel"]}, params["conv1"]["kernel"]):
        with pytest.raises(ValueError, match='conv1 are no dict of "kernel" and "bias"'):
            lpips(params | {"conv1": wrong}, heads, a, b)
    with pytest.raises(ValueError, match="a is of the type list; expected an array"):
        lpips(params, heads, a.tolist(), b)
    for wrong in (heads[:4], heads[::-1], [head[None] for head in heads]):
        with pytest.raises(ValueError, match="heads of the shapes .*; expected"):
            lpips(params, wrong, a, b)


def heads_of(widths=(64, 192, 384, 256, 256)):
    return {key: RNG.random((1, width, 1, 1), np.float32) for key, width in zip(HEADS, widths, strict=True)}


@pytest.mark.parametrize("write", [weight_files.torch_legacy, weight_files.torch_zip])
def test_heads_from_a_file(tmp_path, write):
    arrays = heads_of()
    other = {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}  # as in a state dict of the package's network
    write(tmp_path / "alex.pth", other | arrays, keys=dict)
    for found, expected in zip(load_lpips_heads(str(tmp_path / "alex.pth")), arrays.values(), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected.reshape(-1))


@pytest.mark.parametrize("write,words", [
    (lambda path: None, "No such file"),
    (lambda path: path.mkdir(), "not a file; expected alex.pth of the package lpips"),
    (lambda path: path.write_bytes(b""), "not a file of torch.save"),
    (lambda path: path.write_text("heads"), "not the heads of LPIPS .not a file of torch.save.*; expected alex.pth"),
    (lambda path: weight_files.torch_zip(path, weight_files.random_params(towers=1)),
     "not the heads of LPIPS: lin0.model.1.weight is missing; expected alex.pth"),
    (lambda path: weight_files.torch_legacy(path, heads_of((64, 128, 256, 512, 512)), keys=dict),
     "lin1.model.1.weight is 1×128×1×1; expected 1×192×1×1"),
    (lambda path: weight_files.torch_legacy(path, heads_of() | {HEADS[3]: np.full((1, 256, 1, 1), np.nan, np.float32)},
                                            keys=dict), "not finite"),
    (lambda path: weight_files.torch_zip(path, heads_of(), wrap=lambda tensors: list(tensors.values()), keys=dict),
     "no dict"),
    (lambda path: weight_files.torch_zip(path, heads_of(), keys=dict, wrap=lambda x: x | {HEADS[2]: "text"}),
     "other values than tensors"),
    (lambda path: (weight_files.torch_legacy(path, heads_of(), keys=dict), path.write_bytes(path.read_bytes()[:-9])),
     "truncated"),
    (lambda path: weight_files.torch_zip(path, heads_of(), keys=dict, wrap=lambda x: os.system), "names posix.system"),
])  # fmt: skip
def test_foreign_and_corrupt_files_of_heads(tmp_path, write, words):
    path = tmp_path / "alex.pth"
    write(path)
    with pytest.raises(WeightsError, match=words) as error:
        load_lpips_heads(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")


# The package `lpips` 0.1.4 with torch 2.14.1, in float64 (its float32 differs by at most 5e-7): the distance, and
# of the map the first pixel, that at (H // 2, W // 2), the last one, and the maximum.
PACKAGE = [
    ("astronaut", 64, 64, "noise", 0.6717409, (0.4881041, 1.0077285, 0.1718884, 1.1273110)),
    ("astronaut", 64, 64, "blur", 0.1867309, (0.1048926, 0.3032681, 0.1112992, 0.3072647)),
    ("astronaut", 64, 64, "shift", 0.2867109, (0.3838232, 0.2015696, 0.1752882, 0.5974361)),
    ("astronaut", 64, 64, "dark", 0.2259609, (0.1891802, 0.2713375, 0.0861071, 0.3592119)),
    ("astronaut", 64, 64, "other", 0.8877892, (0.6549060, 1.2635048, 0.4972154, 1.2666992)),
    ("chelsea", 97, 131, "noise", 0.3993019, (0.3492355, 0.4025133, 0.2953551, 1.0100198)),
    ("chelsea", 97, 131, "blur", 0.3367215, (0.1942290, 0.5342875, 0.1158107, 0.6329626)),
    ("chelsea", 97, 131, "shift", 0.1133159, (0.2182004, 0.0796572, 0.0354364, 0.2562380)),
    ("chelsea", 97, 131, "dark", 0.0725118, (0.1047273, 0.0455529, 0.0495931, 0.1272758)),
    ("chelsea", 97, 131, "other", 0.6154452, (0.5293831, 0.6421700, 0.3749836, 0.9122109)),
    ("coffee", 224, 224, "noise", 0.4936041, (0.1653423, 0.3719713, 0.2921951, 1.1174031)),
    ("coffee", 224, 224, "blur", 0.2017121, (0.1226150, 0.1466813, 0.0621357, 0.5606776)),
    ("coffee", 224, 224, "shift", 0.1249452, (0.2637275, 0.0909726, 0.0467966, 0.5911047)),
    ("coffee", 224, 224, "dark", 0.0949858, (0.0603766, 0.0757856, 0.0565653, 0.2485366)),
    ("coffee", 224, 224, "other", 0.7421664, (0.6328588, 0.6835043, 0.5051554, 1.1784727)),
    ("astronaut", 256, 256, "noise", 0.3573778, (0.4389259, 0.1375010, 0.1934240, 1.1593879)),
    ("astronaut", 256, 256, "blur", 0.2755850, (0.1077162, 0.3202787, 0.1110346, 0.5958421)),
    ("astronaut", 256, 256, "shift", 0.1328022, (0.4453994, 0.0871323, 0.0522128, 0.6851987)),
    ("astronaut", 256, 256, "dark", 0.1314880, (0.1695522, 0.0814012, 0.1976258, 0.4478891)),
    ("astronaut", 256, 256, "other", 0.7438284, (0.6328588, 0.6704569, 0.5019688, 1.1752679)),
    ("chelsea", 31, 45, "noise", 0.1603506, (0.1514686, 0.1641594, 0.1303648, 0.2166438)),
    ("chelsea", 31, 45, "blur", 0.1578516, (0.1150101, 0.2106353, 0.1414524, 0.2383841)),
    ("chelsea", 31, 45, "shift", 0.0324767, (0.0240095, 0.0518208, 0.0250573, 0.0580139)),
    ("chelsea", 31, 45, "dark", 0.0897878, (0.0950346, 0.1024254, 0.0932356, 0.1178573)),
    ("chelsea", 31, 45, "other", 0.3255078, (0.3585569, 0.3462464, 0.2892694, 0.4012388)),
]  # fmt: skip


def blurred(image):
    height, width, _ = image.shape
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
    return sum(padded[i : i + height, j : j + width] for i in range(5) for j in range(5)) // 25


CHANGES = {
    "noise": lambda x: np.clip(x + np.random.RandomState(0).randint(-40, 41, x.shape), 0, 255),
    "blur": blurred,
    "shift": lambda x: np.roll(x, (3, 5), (0, 1)),
    "dark": lambda x: x // 2,
}


@pytest.fixture(scope="module")
def real_network(convolutions, tmp_path_factory):
    """torchvision's convolutions and the heads of the package, and those of torchmetrics."""
    params = weight_files.random_params((64, 192, 384, 256, 256, 2, 2), towers=1)  # the small fully connected layers
    params |= {f"conv{i}": dict(zip(("kernel", "bias"), pair, strict=True)) for i, pair in enumerate(convolutions, 1)}
    path = tmp_path_factory.mktemp("network") / "alexnet.pth"
    weight_files.torch_zip(path, params)
    heads = {}
    for package, file in (
        ("lpips==0.1.4", "lpips/weights/v0.1/alex.pth"),
        ("torchmetrics>=1.8,<2", "torchmetrics/functional/image/lpips_models/alex.pth"),
    ):
        folder = tmp_path_factory.mktemp("heads")
        with zipfile.ZipFile(download(folder, "--only-binary=:all:", package)) as wheel:
            heads[package[:5]] = load_lpips_heads(wheel.extract(file, folder))
            if package.startswith("lpips"):
                old = wheel.extract("lpips/weights/v0.0/alex.pth", folder)
    return load_weights(path).params, heads, old


@LARGE
def test_it_equals_the_package_on_the_real_weights(real_network, photographs):
    params, heads, _ = real_network

    def crop(name, height, width):
        return photographs[name][20 : 20 + height, 100 : 100 + width].astype(int)

    for name, height, width, change, distance, of_map in PACKAGE:
        image = crop(name, height, width)
        other = "astronaut" if name == "coffee" else "coffee"
        changed = crop(other, height, width) if change == "other" else CHANGES[change](image)
        a, b = (np.float32(x / 127.5 - 1) for x in (image, changed))
        case = f"{name}, {height}×{width}, {change}"
        assert float(lpips(params, heads["lpips"], a, b)) == pytest.approx(distance, abs=1e-5), case
        found = lpips(params, heads["lpips"], a, b, spatial=True)
        values = found[0, 0], found[height // 2, width // 2], found[-1, -1], found.max()
        np.testing.assert_allclose(values, of_map, rtol=0, atol=1e-5, err_msg=case)


@LARGE
def test_the_files_of_heads_that_packages_have(real_network):
    _, heads, old = real_network
    for of_lpips, of_torchmetrics in zip(heads["lpips"], heads["torch"], strict=True):
        np.testing.assert_array_equal(of_lpips, of_torchmetrics)
    with pytest.raises(WeightsError, match="heads of version 0.0; expected alex.pth"):
        load_lpips_heads(old)
