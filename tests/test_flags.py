"""The value of --config: a name of the package, or a path."""

import pytest
from runners import ROOT

from alexnet_jax.flags import with_config_file

CONFIGS = ROOT / "alexnet_jax" / "configs"


@pytest.mark.parametrize("given,expected", [
    (["--config=cifar10"], [f"--config={CONFIGS}/cifar10.py"]),
    (["-config", "cifar10", "--config.seed=1"], ["-config", f"{CONFIGS}/cifar10.py", "--config.seed=1"]),
    (["--config=imagenet2012:caffe"], [f"--config={CONFIGS}/imagenet2012.py:caffe"]),
    (["--config=./cifar10"], ["--config=./cifar10"]),
    (["--config=my_config.py:a"], ["--config=my_config.py:a"]),
    (["--config=default"], ["--config=default"]),
    (["--workdir", "cifar10", "--config"], ["--workdir", "cifar10", "--config"]),
])  # fmt: skip
def test_a_name_is_a_file_of_the_package_and_a_path_stays(given, expected):
    assert with_config_file(given) == expected
