"""Configs that cannot work."""

import pytest
from runners import tiny_config

from alexnet_jax.config import ConfigError, check_data
from alexnet_jax.data import DataError
from alexnet_jax.flags import without_none
from alexnet_jax.train import train_and_evaluate


@pytest.mark.parametrize("fields,words", [
    (dict(batch_size=0), "config.batch_size=0: expected"),
    (dict(batch_size=1001), "config.batch_size=1001: expected at most 1,000, the examples of the training split"),
    (dict(image_size=40), "config.image_size=40.*28×28"),
    (dict(image_size=12), "config.image_size=12.*too small"),
    (dict(lighting=True), "config.lighting=True.*three"),
    (dict(variant="resnet"), "config.variant='resnet'.*paper"),
    (dict(widths=(7, 8, 8, 8, 8, 8, 8)), "config.widths=.*even"),
    (dict(widths=(0, 8, 8, 8, 8, 8, 8)), "config.widths=.*even"),
    (dict(widths=(0, 8, 8, 8, 8, 8, 8), towers=1), "config.widths=.*omits a layer after conv1"),
    (dict(towers=3), "config.towers=3: expected 1 or 2"),
    (dict(towers=1, mesh=dict(tower=2)), "config.towers=1: expected 2 on two devices"),
    (dict(activation="sigmoid"), "config.activation='sigmoid': expected one of relu, tanh"),
    (dict(lrn_alpha=-1.0), "config.lrn_alpha=-1.0: expected"),
    (dict(pool_window=1), "config.pool_window=1: expected 2 or more"),
    (dict(dropout=1.0), "config.dropout=1.0: expected a rate"),
    (dict(kernel_std=(0.1, 0.1)), "config.kernel_std=.*eight"),
    (dict(stem=(5, 0, 2)), "config.stem=.*stride"),
    (dict(dtype="float16"), "config.dtype='float16'.*bfloat16"),
    (dict(learning_rate=-1.0), "config.learning_rate=-1.0"),
    (dict(mesh=dict(tower=3)), "config.mesh.tower=3.*1 or 2"),
    (dict(mesh=dict(data=8, tower=2)), "config.mesh of data=8, tower=2 does not fit .* CPU"),
    (dict(batch_size=51, mesh=dict(data=2)), "config.batch_size=51: the mesh splits a batch into 2 parts"),
    (dict(dataset="fashion"), "config.dataset='fashion'"),
    (dict(test_split="exam"), "split 'exam'"),
])  # fmt: skip
def test_a_config_that_cannot_work_is_one_line(synthetic, tmp_path, fields, words):
    with pytest.raises((ConfigError, DataError), match=words) as error:
        train_and_evaluate(tiny_config(**fields), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_data_set_of_one_class_is_refused():
    with pytest.raises(ConfigError, match="config.dataset='synthetic': it has 1 class; expected at least 2"):
        check_data(tiny_config(), (28, 28, 1), 1200, 1)


def test_none_returns_a_field_to_the_variants_value():
    argv = ["main", "--config.bias=None", "--config.seed=3", "-config.lrn_alpha=None", "--config.batch_size=None"]
    assert without_none(argv) == (["main", "--config.seed=3", "--config.batch_size=None"], ["bias", "lrn_alpha"])
