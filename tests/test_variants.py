"""Every row in which the paper, its 2012 source, Caffe's replica and torchvision's network differ, against the code.

The figures are written from the publications, not from the table in the code.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from networks import (
    KERNELS,
    MAPS,
    SMALL,
    TORCHVISION_KERNELS,
    TORCHVISION_MAPS,
    images_of,
    shapes,
    small_params,
)

from alexnet_jax import OPS, AlexNet, Stem, activations, paper_sgd, sharding
from alexnet_jax.config import ConfigError, check_config
from alexnet_jax.configs import fashion_mnist, imagenet2012
from alexnet_jax.model import LAYERS
from alexnet_jax.preprocess import Preprocess, fit
from alexnet_jax.variants import VARIANTS as VARIANT_TABLE

VARIANTS = ("paper", "source2012", "caffe", "torchvision")
each_variant = pytest.mark.parametrize("variant", VARIANTS)
STEM = Stem(5, 2, 0)  # on 36×36 images conv1 adds one row and column of padding


@each_variant
def test_order_lrn_rounding_and_scale_of_dropout_against_numpy(variant):
    network = SMALL.clone(stem=STEM, variant=variant)
    images = images_of(36, batch=2) * 300  # large enough for each normalization to matter
    params = small_params(images, network)
    tested = network.apply({"params": params}, images)

    def numpy_variant(variant, scale):
        return reference.network(params, images, variant=variant, stem=STEM, scale=scale)[0]

    scale = {"paper": 0.5, "source2012": 0.5, "caffe": 1.0, "torchvision": 1.0}[variant]
    exact = numpy_variant(variant, scale)
    np.testing.assert_allclose(tested, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    rate = 0.25 if variant == "torchvision" else 0.5
    network = network.clone(dropout=rate, ops=OPS._replace(dropout=lambda key, x, *rest: x))  # only its scale is left
    trained = network.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
    exact = numpy_variant(variant, {"paper": 1, "source2012": 1, "caffe": 2, "torchvision": 4 / 3}[variant])
    np.testing.assert_allclose(trained, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    for other in set(VARIANTS) - {variant}:
        assert np.abs(numpy_variant(other, scale) - tested).max() > 0.01 * np.abs(tested).max()


@pytest.mark.parametrize("variant,size,kernels,maps,count", [
    ("paper", 224, KERNELS, MAPS, 60_965_224),
    ("source2012", 224, KERNELS, MAPS, 60_965_224),
    ("caffe", 227, KERNELS, MAPS, 60_965_224),
    ("torchvision", 224, TORCHVISION_KERNELS, TORCHVISION_MAPS, 61_100_840),
])  # fmt: skip
def test_shapes_and_parameters(variant, size, kernels, maps, count):
    network = AlexNet(variant=variant)
    assert imagenet2012.get_config(variant).image_size == size
    params = shapes(network, size)
    assert {name: params[name]["kernel"].shape for name in LAYERS} == kernels
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    outputs = jax.eval_shape(lambda p, x: activations(network, p, x), params, jnp.zeros((2, size, size, 3)))
    assert {name: outputs[name].shape for name in maps} == {name: (2, *shape) for name, shape in maps.items()}


def test_a_config_and_a_network_of_a_variant_have_the_same_fields():
    for variant in VARIANTS:
        config, network = imagenet2012.get_config(variant), AlexNet(variant=variant)
        assert (network.stem, network.widths, network.towers) == (config.stem, config.widths, config.towers)
    widths = (8, 8, 8, 8, 8, 8, 8)
    mine = AlexNet(variant="torchvision", stem=Stem(3, 1, 1), widths=widths, towers=2)
    assert (mine.stem, mine.widths, mine.towers) == ((3, 1, 1), widths, 2)
    assert AlexNet() == AlexNet(stem=Stem(11, 4, 0), widths=(96, 256, 384, 384, 256, 4096, 4096), towers=2)


def test_caffe_rounds_down():
    fc6 = shapes(AlexNet(variant="caffe"), 224)["fc6"]["kernel"]
    assert fc6.shape[0] == 5 * 5 * 256  # 54, 26, 12 and 5 pixels


@each_variant
def test_initial_values(variant):
    widths = (*VARIANT_TABLE[variant].widths[:5], 128, 128)
    network = AlexNet(variant=variant, widths=widths)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 227, 227, 3)))["params"]
    for name in LAYERS:
        std = {("source2012", "conv3"): 0.03, ("source2012", "conv4"): 0.03, ("source2012", "conv5"): 0.03,
               ("caffe", "fc6"): 0.005, ("caffe", "fc7"): 0.005}.get((variant, name), 0.01)  # fmt: skip
        if variant == "torchvision":  # of a uniform distribution over ±1/√fan-in, at full size
            fan_in = {"fc7": 4096, "fc8": 4096}.get(name, np.prod(params[name]["kernel"].shape[:-1]))
            std = fan_in**-0.5 / 3**0.5
        assert np.asarray(params[name]["kernel"]).std() == pytest.approx(std, rel=0.02), name
        if variant == "torchvision":
            assert not np.asarray(params[name]["bias"]).any()
            continue
        one = 0.1 if variant == "caffe" else 1.0
        bias = one if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0
        np.testing.assert_array_equal(params[name]["bias"], np.float32(bias))


@each_variant
def test_update(variant):
    rng = np.random.default_rng(0)
    draw = lambda: {"conv1": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}}  # noqa: E731
    config = imagenet2012.get_config(variant)
    w, optimizer = draw(), paper_sgd(bias_rate=config.bias_rate, bias_decay=config.bias_decay)
    params = jax.tree.map(jnp.float32, w)
    state, v = optimizer.init(params), jax.tree.map(np.zeros_like, w)
    for e in (0.1, 0.1, 0.01):
        g = draw()
        updates, state = optimizer.update(jax.tree.map(jnp.float32, g), state, params, learning_rate=e)
        params = jax.tree.map(jnp.add, params, updates)
        of_bias = dict(rate=e) if variant in ("paper", "torchvision") else dict(rate=2 * e, decay=0)
        for leaf, how in (("kernel", dict(rate=e)), ("bias", of_bias)):
            w["conv1"][leaf], v["conv1"][leaf] = reference.sgd(*(of["conv1"][leaf] for of in (w, v, g)), **how)
    jax.tree.map(lambda x, exact: np.testing.assert_allclose(x, exact, rtol=1e-5, atol=1e-6), params, w)


@pytest.mark.parametrize("variant,batch,drops,patience,lighting,ten_crop", [
    ("paper", 128, (), 3, True, True),
    ("source2012", 128, (25, 51, 79), 0, True, True),
    ("caffe", 256, (20, 40, 60, 80), 0, False, False),
    ("torchvision", 256, (30, 60), 0, False, False),
])  # fmt: skip
def test_config_of_each_variant(variant, batch, drops, patience, lighting, ten_crop):
    c = imagenet2012.get_config(variant)
    check_config(c)
    assert (c.batch_size, c.drop_at_epochs, c.plateau_patience) == (batch, drops, patience)
    assert (c.lighting, c.ten_crop, c.flip, c.variant) == (lighting, ten_crop, True, variant)
    decay = 1e-4 if variant == "torchvision" else 5e-4
    assert (c.learning_rate, c.momentum, c.weight_decay, c.num_epochs) == (0.01, 0.9, decay, 90)
    scale = 1 / 255 / np.mean((0.229, 0.224, 0.225)) if variant == "torchvision" else 1
    assert c.input_scale == pytest.approx(scale, rel=1e-3)
    if variant == "caffe":
        assert round(1_281_167 / batch * drops[0], -4) == 100_000


def positions_and_flips(variant, count, first=0):
    """Of each training image: its crop's row, its column, and whether it is flipped."""
    image = 100 * np.arange(12)[:, None] + np.arange(12)
    images = np.broadcast_to(image[None, :, :, None], (count, 12, 12, 1)).astype(np.float32)
    config = imagenet2012.get_config(variant)
    preprocess = Preprocess(
        np.zeros((12, 12, 1)), 0, 8, 0, True, None, 1.0, crop_group=config.crop_group,
        crop_last_position=config.crop_last_position,
    )  # fmt: skip
    x = np.asarray(jax.jit(preprocess.train)(jax.random.key(3), images, first))
    corner = np.minimum(x[:, 0, 0, 0], x[:, 0, -1, 0]).astype(int)
    return np.stack([corner // 100, corner % 100, x[:, 0, 0, 0] > x[:, 0, 1, 0]], axis=1)


@each_variant
def test_crops_and_flips(variant):
    draws = positions_and_flips(variant, 6400)
    positions = 4 if variant == "paper" else 5  # of 8×8 in 12×12: the paper counts 32² of 224×224 in 256×256
    for column, values in enumerate((positions, positions, 2)):
        assert set(draws[:, column]) == set(range(values))
    chunks = draws.reshape(200, 32, 3)
    together = (chunks == chunks[:, :1]).all((1, 2))
    assert together.all() if variant == "source2012" else not together.any()
    if variant == "source2012":
        assert len(np.unique(chunks[:, 0], axis=0)) > 40  # of 50
    np.testing.assert_array_equal(positions_and_flips(variant, 80, first=48), draws[48:128])  # on another device


@pytest.mark.parametrize("variant", ["paper", "source2012"])
def test_pca_lighting(variant):
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(3, 3)) * 20
    images = np.clip(rng.normal(size=(4000, 4, 4, 3)) @ mixing + 120, 0, 255).astype(np.uint8)
    config = imagenet2012.get_config(variant)
    preprocess = fit(
        images, 0, 4, 0, False, True, lighting_exponent=config.lighting_exponent,
        lighting_divisor=config.lighting_divisor,
    )  # fmt: skip
    x = np.asarray(jax.jit(preprocess.train)(jax.random.key(0), images), np.float64)
    centered = images - images.mean(0)
    covariance = np.cov(images.reshape(-1, 3).T.astype(np.float64))
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    divisor = 1.0 if variant == "paper" else 1.1
    shift = x * divisor - centered
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-3)
    unit = eigenvalues / 255**2  # of pixels in 0 to 1
    expected = 255 * 0.1 * (unit if variant == "paper" else np.sqrt(unit))
    np.testing.assert_allclose((shift[:, 0, 0] @ eigenvectors).std(0), expected, rtol=0.05)
    np.testing.assert_allclose(preprocess.center_crop(images), centered, atol=1e-3)  # testing is not touched


@pytest.mark.parametrize("variant", ["source2012", "torchvision"])
def test_on_two_devices(variant):
    images, network = images_of(40), SMALL.clone(variant=variant)
    params = small_params(images, network)
    split = network.clone(tower_axis=sharding.TOWER)
    forward = jax.shard_map(
        lambda p, x: lax.pmean(split.apply({"params": p}, x), sharding.TOWER), mesh=sharding.make_mesh(1, 2),
        in_specs=(sharding.tower_specs(params), sharding.REPLICATED), out_specs=sharding.REPLICATED,
    )  # fmt: skip
    exact = network.apply({"params": params}, images)
    np.testing.assert_allclose(forward(params, images), exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def test_caffe_needs_both_towers_on_one_device():
    config = fashion_mnist.get_config()
    config.variant, config.mesh.tower = "caffe", 2
    with pytest.raises(ConfigError, match="config.variant='caffe'.*two devices"):
        check_config(config)
    network = SMALL.clone(variant="caffe", tower_axis="tower")
    look = jax.vmap(network.init, in_axes=(None, None), axis_name="tower", axis_size=2)
    with pytest.raises(ValueError, match="both towers"):
        jax.eval_shape(look, jax.random.key(0), images_of(40))


def test_an_unknown_operation_of_a_variant_is_refused(monkeypatch):
    monkeypatch.setitem(VARIANT_TABLE, "mine", VARIANT_TABLE["paper"]._replace(conv1="relu foo pool"))
    with pytest.raises(ValueError, match="conv1='relu foo pool': unknown operation 'foo'; expected some of"):
        SMALL.clone(variant="mine").init(jax.random.key(0), images_of(36))
