import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax import lax
from networks import KERNELS, MAPS, SMALL, images_of, shapes, small_params

from alexnet_jax import OPS, PLAIN, AlexNet, activations, cross_entropy, sharding
from alexnet_jax.checks import check_network
from alexnet_jax.model import LAYERS, OUTPUTS


@pytest.mark.parametrize("size", [224, 227])
def test_shapes_and_parameter_count_of_the_paper(size):
    params = shapes(AlexNet(), size)
    assert tuple(params) == LAYERS
    for name, kernel in KERNELS.items():
        assert params[name]["kernel"].shape == kernel and params[name]["bias"].shape == kernel[-1:]
    assert sum(x.size for x in jax.tree.leaves(params)) == 60_965_224
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    outputs = jax.eval_shape(lambda p, x: activations(AlexNet(), p, x), params, jnp.zeros((2, size, size, 3)))
    for name, shape in MAPS.items():
        assert outputs[name].shape == (2, *shape), name


def test_initial_values_of_section_5():
    params = jax.jit(AlexNet().init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    for name in LAYERS:
        kernel = np.asarray(params[name]["kernel"])
        assert abs(kernel.std() / 0.01 - 1) < 0.02 and abs(kernel.mean()) < 2e-4, name
        one = name in ("conv2", "conv4", "conv5", "fc6", "fc7")
        np.testing.assert_array_equal(params[name]["bias"], float(one))


class ForwardTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_against_numpy(self):
        images = images_of(29, batch=2)
        params = small_params(images)
        logits = self.variant(lambda p, x: SMALL.apply({"params": p}, x))(params, images)
        expected, _ = reference.network(params, images, stem=SMALL.stem, scale=0.5)
        chex.assert_trees_all_close(logits, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("fields,exact", [
    (dict(activation="tanh"), dict(activation="tanh")),
    (dict(lrn=False), dict(use_lrn=False)),
    (dict(lrn_alpha=0.5), dict(lrn_constants=(2.0, 5, 0.5, 0.75))),
    (dict(pool_window=2), dict(pool_window=2)),
    (dict(dropout=0.2), dict(scale=0.8)),
    (dict(dropout=0.0), dict(scale=1.0)),
    (dict(towers=1), dict(towers=1)),
    (dict(towers=1, widths=(7, 5, 6, 0, 0, 0, 0)), dict(towers=1)),  # four layers
    (dict(towers=1, widths=(8, 12, 16, 0, 12, 20, 0)), dict(towers=1)),
    (dict(widths=(8, 0, 16, 8, 12, 20, 18)), {}),
    (dict(widths=(8, 12, 0, 8, 12, 20, 18)), {}),  # conv4 takes conv2's outputs of its own tower
    (dict(widths=(8, 12, 16, 0, 12, 20, 18)), {}),
    (dict(widths=(8, 12, 16, 8, 0, 0, 18)), {}),
])  # fmt: skip
def test_each_field_of_an_ablation_against_numpy(fields, exact):
    images, model = images_of(29, batch=2), SMALL.clone(**fields)
    params = small_params(images, model)
    logits = model.apply({"params": params}, images)
    expected, _ = reference.network(params, images, **{"stem": SMALL.stem, "scale": 0.5, **exact})
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())
    assert tuple(activations(model, params, images))[-1] == "fc8"


def test_no_dropout_trains_what_it_tests():
    images, model = images_of(28), SMALL.clone(dropout=0.0)
    params = small_params(images)
    train = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(train, model.apply({"params": params}, images))


@pytest.mark.parametrize("rate", [0.2, 0.5])
@pytest.mark.parametrize("variant", ["paper", "caffe"])
def test_the_scale_in_testing_follows_the_rate(rate, variant):
    images, widths = images_of(31, batch=1), (8, 12, 16, 8, 12, 20, 900)
    model = SMALL.clone(dropout=rate, variant=variant, widths=widths)
    params = small_params(images, model)
    zeros = jax.tree.map(jnp.zeros_like, params)
    params["fc7"] = {"kernel": zeros["fc7"]["kernel"], "bias": jnp.ones(900)}  # every unit of fc7 is 1,
    params["fc8"] = {"kernel": jnp.ones((900, 6)), "bias": zeros["fc8"]["bias"]}  # and the logits count them
    run = lambda **how: float(model.apply({"params": params}, images, **how)[0, 0])  # noqa: E731
    tested, trained = run(), run(train=True, rngs={"dropout": jax.random.key(0)})
    assert tested == pytest.approx(900 if variant == "caffe" else 900 * (1 - rate), rel=1e-4)
    assert trained == pytest.approx(tested, rel=0.08) and trained != tested


@pytest.mark.parametrize("widths,count", [  # counted by hand
    ((48, 128, 192, 192, 256, 4096, 4096), 59_798_312),  # the one-GPU network of section 3.2
    ((96, 256, 384, 384, 256, 4096, 4096), 62_378_344),
])  # fmt: skip
def test_parameters_of_one_tower(widths, count):
    params = shapes(AlexNet(towers=1, widths=widths), 224)
    assert params["conv2"]["kernel"].shape[2] == widths[0] and params["conv4"]["kernel"].shape[2] == widths[2]
    assert sum(x.size for x in jax.tree.leaves(params)) == count


def test_against_flax_with_grouped_convolutions_at_full_size():
    model = AlexNet(num_classes=20, widths=(96, 256, 384, 384, 256, 64, 64))
    images = jax.random.normal(jax.random.key(0), (2, 224, 224, 3)) * 60
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    outputs = jax.jit(lambda p, x: activations(model, p, x))(params, images)

    def grouped(name, x, groups):
        layer = nn.Conv(params[name]["kernel"].shape[3], params[name]["kernel"].shape[:2], padding="SAME",
                        feature_group_count=groups)  # fmt: skip
        return nn.relu(layer.apply({"params": params[name]}, x))

    for name, before, groups in (("conv2", "pool1", 2), ("conv3", "pool2", 1), ("conv4", "conv3", 2),
                                 ("conv5", "conv4", 2)):  # fmt: skip
        chex.assert_trees_all_close(outputs[name], grouped(name, outputs[before], groups), rtol=1e-4, atol=1e-4)


def test_towers_are_apart_until_conv3():
    images = images_of(40)
    params = small_params(images)
    changed = jax.tree.map(lambda x: x, params)
    for name in ("conv1", "conv2"):  # tower 0 is the first half of the output channels
        for leaf in ("kernel", "bias"):
            half = changed[name][leaf].shape[-1] // 2
            changed[name][leaf] = changed[name][leaf].at[..., :half].add(0.5)
    before, after = activations(SMALL, params, images), activations(SMALL, changed, images)
    for name in ("conv1", "norm1", "pool1", "conv2", "norm2", "pool2"):
        half = before[name].shape[-1] // 2
        np.testing.assert_array_equal(before[name][..., half:], after[name][..., half:], name)
        assert (before[name][..., :half] != after[name][..., :half]).any(), name
    assert (before["conv3"][..., 8:] != after["conv3"][..., 8:]).any()


@pytest.mark.parametrize("name", ["conv4", "conv5"])
def test_conv4_and_conv5_stay_in_their_towers(name):
    images = images_of(40)
    params = small_params(images)
    half = params["conv3"]["bias"].shape[0] // 2
    changed = jax.tree.map(lambda x: x, params)
    changed["conv3"]["bias"] = changed["conv3"]["bias"].at[:half].add(1.0)  # only tower 0 of conv3's output changes
    before, after = activations(SMALL, params, images)[name], activations(SMALL, changed, images)[name]
    half = before.shape[-1] // 2
    np.testing.assert_array_equal(before[..., half:], after[..., half:])
    assert (before[..., :half] != after[..., :half]).any()


def test_activations_end_in_the_logits():
    images = images_of(28)
    params = small_params(images)
    outputs = activations(SMALL, params, images)
    np.testing.assert_array_equal(outputs["fc8"], SMALL.apply({"params": params}, images))
    assert (outputs["fc7"] >= 0).all() and outputs["fc7"].shape == (3, 14)


def test_dropout_needs_its_key_and_changes_with_it():
    images = images_of(28)
    params = small_params(images)
    run = lambda key: SMALL.apply({"params": params}, images, train=True, rngs={"dropout": key})  # noqa: E731
    first = run(jax.random.key(0))
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    assert (first != run(jax.random.key(1))).any()
    with pytest.raises(Exception, match="dropout"):
        SMALL.apply({"params": params}, images, train=True)


def test_halved_outputs_in_testing_are_the_mean_over_masks():
    # One hidden unit's contribution is linear in its mask, so with fc6 untouched by ReLU's kink the means agree.
    images = images_of(28, batch=1)
    params = small_params(images)
    params["fc7"]["kernel"] = jnp.abs(params["fc7"]["kernel"])
    params["fc7"]["bias"] = jnp.ones_like(params["fc7"]["bias"])
    run = lambda key: SMALL.apply({"params": params}, images, train=True, rngs={"dropout": key})  # noqa: E731
    many = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 20_000))
    error = np.abs(many.mean(0) - SMALL.apply({"params": params}, images))
    assert (error < 5 * many.std(0) / np.sqrt(len(many))).all()


def test_bfloat16_activations_float32_parameters_and_logits():
    images = images_of(28)
    model = SMALL.clone(dtype=jnp.bfloat16)
    params = small_params(images)
    outputs = activations(model, params, images)
    assert outputs["conv5"].dtype == jnp.bfloat16
    logits = model.apply({"params": params}, images)
    assert logits.dtype == jnp.float32
    exact = SMALL.apply({"params": params}, images)
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("size", [28, 32])
def test_compact_network_takes_small_images(size):
    params = shapes(SMALL, size, channels=1)
    assert tuple(params) == LAYERS


@pytest.mark.parametrize("model,size,words", [
    (AlexNet(variant="alexnet2"), 224, "variant='alexnet2': expected one of paper, source2012, caffe"),
    (AlexNet(), 60, "too small"),
    (AlexNet(pool_window=9), 28, "too small.*pool_window=9"),
    (AlexNet(pool_window=0), 224, "pool_window=0"),
    (AlexNet(pool_window=1), 224, "pool_window=1: expected 2 or more"),
    (AlexNet(lrn_alpha=0.0), 224, "lrn_alpha=0.0: expected a positive number"),
    (AlexNet(stem=(3, 0, 1)), 224, r"stem=\(3, 0, 1\): expected"),
    (AlexNet(widths=(95, 256, 384, 384, 256, 4096, 4096)), 224, "even"),
    (AlexNet(kernel_std=(0.1,)), 224, "eight"),
    (AlexNet(towers=4), 224, "towers=4: expected 1 or 2"),
    (AlexNet(widths=(0, 256, 384, 384, 256, 4096, 4096)), 224, "even.*0 omits a layer after conv1"),
    (AlexNet(activation="elu"), 224, "relu, tanh"),
    (AlexNet(dropout=1.0), 224, "dropout=1.0"),
])  # fmt: skip
def test_a_wrong_field_is_named(model, size, words):
    with pytest.raises(ValueError, match=words):
        shapes(model, size)


@pytest.mark.parametrize("field,values", [
    ("num_classes", ("10", 0, -1, True, 2.0, None)), ("variant", (None, 1, ["paper"])), ("dtype", ("x", "int8", None)),
    ("param_dtype", ("x", "uint8")), ("stem", (3, (3, 1), (3, 1, 1.0), (True, 1, 1))),
    ("widths", (64, "6464646", (8,) * 6, (8.0,) * 7, ("8",) * 7)), ("towers", ("2", 2.0, True, 0)),
    ("activation", (None, ["relu"])), ("lrn", (None, 1, "yes")), ("lrn_alpha", ("x", -1.0, np.inf, np.nan, True)),
    ("pool_window", (2.5, "3", True, None)), ("dropout", ("x", None, -0.1, np.nan, True)),
    ("kernel_std", ("x", 0.1, (0.1,) * 7, (0.0,) * 8, ("x",) * 8)), ("bias", (0.0, (None,) * 8, (np.nan,) * 8)),
    ("ops", ("plain", 1)), ("data_axis", (1,)), ("tower_axis", (0,)),
])  # fmt: skip
def test_a_field_of_a_wrong_type_or_range_is_named(field, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{field}={re.escape(repr(value))}: expected "):
            check_network(AlexNet(**{field: value}))


def test_numpy_scalars_are_numbers():
    check_network(AlexNet(num_classes=np.int64(10), dropout=np.float32(0.5), widths=tuple(np.full(7, 8))))


def test_images_need_four_axes():
    with pytest.raises(ValueError, match=r"expected \[B, H, W, C\]"):
        AlexNet().init(jax.random.key(0), jnp.zeros((224, 224, 3)))


def test_a_network_of_plain_operations_under_every_transformation():
    images, model = images_of(29, batch=2), SMALL.clone(ops=PLAIN)
    params = small_params(images)
    forward = jax.jit(lambda params: model.apply({"params": params}, images))
    expected = jax.jit(lambda params: SMALL.apply({"params": params}, images))(params)
    np.testing.assert_allclose(forward(params), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    direction, g = small_params(images), np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    _, tangent = jax.jvp(forward, (params,), (direction,))
    (gradient,) = jax.vjp(forward, params)[1](g)
    products = jax.tree.map(lambda x, y: float(jnp.vdot(x, y)), gradient, direction)
    assert float(jnp.vdot(g, tangent)) == pytest.approx(sum(jax.tree.leaves(products)), rel=1e-3)

    def loss(apply, bias):
        return (apply({**params, "conv1": {**params["conv1"], "bias": bias}}) ** 2).mean()

    bias, step = params["conv1"]["bias"], 1e-2
    slope = jax.jit(jax.grad(lambda bias: loss(forward, bias)))
    hessian = jax.jit(jax.hessian(lambda bias: loss(forward, bias)))(bias)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-3 * np.abs(hessian).max())
    differences = np.stack([(slope(bias + e) - slope(bias - e)) / (2 * step) for e in step * np.eye(8)])
    np.testing.assert_allclose(hessian, differences, atol=0.05 * np.abs(hessian).max())
    recomputed = jax.jit(jax.grad(lambda bias: loss(jax.checkpoint(forward), bias)))(bias)
    np.testing.assert_allclose(recomputed, slope(bias), rtol=1e-4, atol=1e-4 * np.abs(recomputed).max())


def test_precision_and_param_dtype_reach_the_layers():
    images, model = images_of(28), SMALL.clone(precision="highest", param_dtype=jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
    program = jax.jit(lambda p: model.apply({"params": p}, images)).trace(params).lower(lowering_platforms=("cuda",))
    products = [line for line in program.as_text().splitlines() if "convolution(" in line or "dot_general" in line]
    assert len(products) >= len(LAYERS) and all("HIGHEST" in line for line in products), products


def fused_operations():
    """Operations with ReLU, LRN and pooling in one function, a composition of the others, and a list of its calls."""
    calls = []

    def relu_lrn_pool(inputs, bias, towers, *, k, n, alpha, beta, window, stride, outputs):
        x = jnp.concatenate(inputs, axis=-1)
        arrays = len(inputs), towers, outputs
        calls.append(dict(shape=x.shape, arrays=arrays, lrn=(k, n, alpha, beta), window=window, stride=stride))
        parts = [
            OPS.local_response_norm(nn.relu(part), k, n, alpha, beta) for part in jnp.split(x + bias, towers, axis=-1)
        ]
        return jnp.split(OPS.max_pool(jnp.concatenate(parts, axis=-1), window, stride), outputs, axis=-1)

    return OPS._replace(relu_lrn_pool=relu_lrn_pool), calls


def loss_logits_and_gradients(model, params, images):
    labels = jnp.arange(len(images)) % 6

    def loss(params):
        logits = model.apply({"params": params}, images)
        return cross_entropy(logits, labels), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, logits, gradients


@pytest.mark.parametrize("fields,arrays", [
    (dict(), [(1, 2, 2), (2, 2, 1)]),  # both towers of conv1 come from one convolution; conv3 gathers those of conv2
    (dict(towers=1), [(1, 1, 1), (1, 1, 1)]),
    (dict(lrn_alpha=0.05, pool_window=2), [(1, 2, 2), (2, 2, 1)]),
    (dict(towers=1, widths=(7, 0, 6, 0, 5, 9, 0)), [(1, 1, 1)]),  # without conv2
    (dict(widths=(8, 0, 16, 8, 12, 20, 18)), [(1, 2, 2)]),
])  # fmt: skip
def test_relu_lrn_and_pooling_in_one_function(fields, arrays):
    images, (ops, calls) = images_of(29, batch=2) * 20, fused_operations()
    model = SMALL.clone(**fields)
    params = small_params(images, model)
    results = loss_logits_and_gradients(model.clone(ops=ops), params, images)
    assert [call["arrays"] for call in calls] == arrays
    alpha, window = model.lrn_alpha or 1e-4, model.pool_window
    for call in calls:
        assert (call["lrn"], call["window"], call["stride"]) == ((2.0, 5, alpha, 0.75), window, 2)
    expected = loss_logits_and_gradients(model.clone(ops=OPS), params, images)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max()), results, expected
    )
    exact, _ = reference.network(
        params, images, stem=SMALL.stem, towers=model.towers, scale=0.5, lrn_constants=(2.0, 5, alpha, 0.75),
        pool_window=window,
    )  # fmt: skip
    np.testing.assert_allclose(results[1], exact, rtol=2e-4, atol=2e-4 * np.abs(exact).max())


@pytest.mark.parametrize("fields,arrays", [
    (dict(lrn=False), [(1, 2, 2), (2, 2, 1), (2, 2, 1)]),  # conv3 and fc6 gather the towers
    (dict(variant="torchvision"), [(1, 2, 2), (2, 2, 2), (2, 2, 2)]),  # dropout of the inputs takes an array per tower
], ids=str)  # fmt: skip
def test_relu_and_pooling_in_one_function(fields, arrays):
    calls = []

    def relu_pool(inputs, bias, towers, *, window, stride, outputs):
        calls.append((len(inputs), towers, outputs))
        x = nn.relu(jnp.concatenate(inputs, axis=-1) + bias)
        return jnp.split(OPS.max_pool(x, window, stride), outputs, axis=-1)

    images, model = images_of(31, batch=2) * 20, SMALL.clone(**fields)
    params = small_params(images, model)
    results, expected = (
        loss_logits_and_gradients(model.clone(ops=ops), params, images)
        for ops in (OPS._replace(relu_pool=relu_pool), OPS)
    )
    assert calls == arrays
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max()), results, expected
    )


def test_relu_lrn_and_pooling_in_one_function_with_a_tower_on_each_device():
    images, (ops, calls) = images_of(29, batch=2) * 20, fused_operations()
    params = small_params(images)
    specs = sharding.tower_specs(params)

    def on_two_devices(ops):
        model = SMALL.clone(ops=ops, tower_axis=sharding.TOWER)

        def loss(params, images):
            logits = lax.pmean(model.apply({"params": params}, images), sharding.TOWER)
            return cross_entropy(logits, jnp.arange(2)), logits

        def gradients(params, images):
            (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params, images)
            return value, logits, gradients

        return jax.jit(jax.shard_map(
            gradients, mesh=sharding.make_mesh(1, 2), in_specs=(specs, sharding.REPLICATED),
            out_specs=(sharding.REPLICATED, sharding.REPLICATED, specs),
        ))(params, images)  # fmt: skip

    results = on_two_devices(ops)
    half = [((1, 1, 1), 4), ((1, 1, 1), 6)]  # of 8 and of 12 channels
    assert [(call["arrays"], call["shape"][-1]) for call in calls] == half
    for expected in (on_two_devices(OPS), loss_logits_and_gradients(SMALL.clone(ops=OPS), params, images)):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.abs(y).max()), results, expected
        )


@pytest.mark.parametrize("fields", [
    dict(activation="tanh"), dict(lrn=False), dict(variant="caffe"), dict(variant="source2012"),
], ids=str)  # fmt: skip
def test_networks_that_compute_relu_lrn_and_pooling_one_by_one(fields):
    images, (ops, calls) = images_of(31, batch=2), fused_operations()
    model = SMALL.clone(**fields)
    params = small_params(images, model)
    logits = model.clone(ops=ops).apply({"params": params}, images)
    assert not calls
    np.testing.assert_array_equal(logits, model.clone(ops=OPS).apply({"params": params}, images))


def test_activations_have_every_name_with_fused_operations():
    images, (ops, calls) = images_of(29, batch=2), fused_operations()
    params = small_params(images)
    outputs = activations(SMALL.clone(ops=ops), params, images)
    assert tuple(outputs) == OUTPUTS and not calls
    jax.tree.map(np.testing.assert_array_equal, outputs, activations(SMALL.clone(ops=OPS), params, images))
