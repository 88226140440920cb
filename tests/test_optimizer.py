import doctest

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from alexnet_jax import cross_entropy, learning_rate_at, paper_sgd, plateau_init, plateau_update
from alexnet_jax import optimizer as optimizer_module

RATES = [0.1, 0.1, 0.1, 0.01, 0.01, 0.001]


def problem():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in RATES]
    return params, gradients


def run(optimizer, params, gradients, **keywords):
    state = optimizer.init(params)
    for rate, g in zip(RATES, gradients, strict=True):
        extra = {"learning_rate": rate} if keywords.get("paper") else {}
        updates, state = optimizer.update(g, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params


def test_update_is_the_formula_of_section_5():
    params, gradients = problem()
    w, v = dict(params), jax.tree.map(np.zeros_like, params)
    for rate, g in zip(RATES, gradients, strict=True):
        for leaf in w:
            w[leaf], v[leaf] = reference.sgd(w[leaf], v[leaf], g[leaf], rate)
    chex.assert_trees_all_close(run(paper_sgd(), params, gradients, paper=True), w, rtol=1e-5, atol=1e-6)


def test_optax_sgd_differs_once_the_rate_drops():
    params, gradients = problem()
    schedule = lambda count: jnp.asarray(RATES)[count]  # noqa: E731
    usual = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9))
    paper = run(paper_sgd(), params, gradients, paper=True)
    assert np.abs(run(usual, params, gradients)["kernel"] - paper["kernel"]).max() > 0.05
    global_rate = [0.1] * len(RATES)  # at a constant rate the two are one
    constant = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    state, p = paper_sgd().init(params), params
    for rate, g in zip(global_rate, gradients, strict=True):
        updates, state = paper_sgd().update(g, state, p, learning_rate=rate)
        p = optax.apply_updates(p, updates)
    chex.assert_trees_all_close(run(constant, params, gradients), p, rtol=1e-5, atol=1e-6)


def test_a_schedule_alone_and_in_a_chain_is_what_the_keyword_sets():
    params, gradients = problem()
    schedule = lambda count: jnp.asarray(RATES)[count]  # noqa: E731
    expected = run(paper_sgd(), params, gradients, paper=True)
    chex.assert_trees_all_close(run(paper_sgd(schedule), params, gradients), expected, rtol=1e-6)
    chained = optax.chain(optax.clip_by_global_norm(1e3), paper_sgd(schedule))
    chex.assert_trees_all_close(run(chained, params, gradients), expected, rtol=1e-6)
    by_keyword = optax.chain(optax.identity(), paper_sgd())
    chex.assert_trees_all_close(run(by_keyword, params, gradients, paper=True), expected, rtol=1e-6)


def test_a_constant_rate_is_the_keyword_and_adds_nothing_to_the_state():
    params, gradients = problem()
    updates, state = paper_sgd(0.3).update(gradients[0], paper_sgd(0.3).init(params), params)
    expected, expected_state = paper_sgd().update(gradients[0], paper_sgd().init(params), params, learning_rate=0.3)
    chex.assert_trees_all_equal((updates, state), (expected, expected_state))
    assert jax.tree.structure(state.velocity) == jax.tree.structure(params)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(params))
    scheduled = paper_sgd(lambda count: 0.3)
    assert int(scheduled.update(gradients[0], scheduled.init(params), params)[1].count) == 1


def test_biases_have_a_rate_and_a_decay_of_their_own():
    params, gradients = problem()
    optimizer = paper_sgd(0.1, bias_rate=2.0, bias_decay=0.0)
    updates, _ = optimizer.update(gradients[0], optimizer.init(params), params)
    chex.assert_trees_all_close(updates["bias"], -0.2 * gradients[0]["bias"], rtol=1e-6)
    kernel = -0.1 * gradients[0]["kernel"] - 0.1 * 5e-4 * params["kernel"]
    chex.assert_trees_all_close(updates["kernel"], kernel, rtol=1e-5)


def test_the_doctest():
    assert doctest.testmod(optimizer_module).failed == 0


def test_weight_decay_needs_the_parameters():
    params, gradients = problem()
    with pytest.raises(ValueError, match="params"):
        paper_sgd().update(gradients[0], paper_sgd().init(params), learning_rate=0.1)


def test_a_bare_array_is_updated_as_a_kernel():
    w, g = jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0])
    optimizer = paper_sgd(0.1, bias_rate=2.0)
    updates, _ = optimizer.update(g, optimizer.init(w), w)
    np.testing.assert_allclose(updates, -0.1 * 5e-4 * np.array([1.0, -2.0]) - 0.1 * np.array([3.0, 4.0]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rate", [0.1, jnp.float32(0.1)], ids=["number", "float32"])
def test_the_state_and_the_updates_keep_the_dtype_of_the_parameters(dtype, rate):
    params = {"kernel": jnp.ones(3, dtype), "bias": jnp.ones(2, dtype)}
    state = paper_sgd().init(params)
    updates, new_state = paper_sgd().update(params, state, params, learning_rate=rate)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_close(updates["bias"], jnp.full(2, -0.1 * 5e-4 - 0.1, dtype), rtol=1e-2)


@pytest.mark.parametrize("arguments,words", [
    ({"momentum": 1.5}, "momentum=1.5: expected a number of at least 0 and below 1"),
    ({"momentum": 1}, "momentum=1: expected"),
    ({"learning_rate": -1}, "learning_rate=-1: expected a number of at least 0, or a schedule"),
    ({"learning_rate": None}, "learning_rate=None: expected"),
    ({"learning_rate": float("nan")}, "learning_rate=nan: expected"),
    ({"weight_decay": -1e-4}, "weight_decay=-0.0001: expected"),
    ({"bias_rate": "2"}, "bias_rate='2': expected"),
    ({"bias_decay": float("inf")}, "bias_decay=inf: expected"),
])  # fmt: skip
def test_values_outside_of_their_range_are_one_line(arguments, words):
    with pytest.raises(ValueError, match="^paper_sgd: ") as error:
        paper_sgd(**arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_traced_rate_is_not_checked():
    optimizer = optax.inject_hyperparams(paper_sgd)(learning_rate=0.1)
    params = {"kernel": jnp.ones(3)}
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(params, state, params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 5e-4 - 0.1, rtol=1e-6)


class PlateauTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_drops_three_times_after_patience(self):
        update = self.variant(lambda s, e: plateau_update(s, e, patience=2))
        rate = self.variant(lambda s: learning_rate_at(jnp.int32(50), s, 0.01))
        errors = [0.9, 0.5, 0.6, 0.4, 0.4, 0.41, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
        drops = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3]
        state = plateau_init()
        for error, expected in zip(errors, drops, strict=True):
            state = update(state, jnp.float32(error))
            assert int(state.drops) == expected
            assert float(rate(state)) == pytest.approx(0.01 * 0.1**expected, rel=1e-5)
        assert float(state.best_error) == pytest.approx(0.3)

    def test_an_error_that_is_not_a_number_is_no_improvement(self):
        state = plateau_update(plateau_update(plateau_init(), jnp.float32(0.5), 3), jnp.float32(jnp.nan), 3)
        assert float(state.best_error) == 0.5 and int(state.evaluations_since_best) == 1


@pytest.mark.parametrize(
    "step,expected", [(0, 0.01), (4, 0.05), (9, 0.1), (10, 0.1), (99, 0.1), (100, 0.01), (200, 1e-3)]
)
def test_warm_up_and_fixed_drops(step, expected):
    for number in (step, jnp.int32(step)):
        rate = learning_rate_at(number, plateau_init(), 0.1, warmup_steps=10, drop_at=(100, 200))
        assert float(rate) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("plateau_drops,step,expected", [(0, 99, 0), (0, 100, 1), (1, 99, 1), (1, 100, 1), (1, 200, 2)])
def test_a_fixed_drop_comes_unless_the_plateau_was_before(plateau_drops, step, expected):
    plateau = plateau_init()._replace(drops=jnp.int32(plateau_drops))
    rate = learning_rate_at(jnp.int32(step), plateau, 0.1, drop_at=(100, 200))
    assert float(rate) == pytest.approx(0.1 * 0.1**expected, rel=1e-5)


@pytest.mark.parametrize("step,expected", [(0, 0.01), (9, 0.0955), (50, 0.075), (100, 0.005), (200, 0.0), (201, 0.0)])
def test_linear_decay_under_a_warm_up_and_a_drop(step, expected):
    rate = learning_rate_at(jnp.int32(step), plateau_init(), 0.1, warmup_steps=10, drop_at=(100,), linear_steps=200)
    assert float(rate) == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_against_float64():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(7, 5)) * 10, rng.integers(0, 5, 7)
    loss, gradient = jax.value_and_grad(cross_entropy)(logits.astype(np.float32), labels)
    assert float(loss) == pytest.approx(reference.cross_entropy(logits, labels), rel=1e-5)
    np.testing.assert_allclose(gradient, reference.cross_entropy_gradient(logits, labels), atol=1e-6)
