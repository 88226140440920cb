"""What pyproject.toml declares: dependencies, commands, packages."""

import importlib
import re
import tomllib

from runners import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_requirements_have_the_bounds_of_the_package_and_what_its_tests_need():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = {line.split("#")[0].strip() for line in lines} - {""}
    assert set(PROJECT["dependencies"]) < requirements
    names = {re.match(r"[\w-]+", requirement).group() for requirement in requirements - set(PROJECT["dependencies"])}
    assert names == {"chex", "scipy", "protobuf", "onnx", "pytest", "pytest-xdist", "ruff", "mypy", "import-linter"}


def test_each_command_is_a_function():
    assert set(PROJECT["scripts"]) == {
        f"alexnet-{name}" for name in ("train", "evaluate", "predict", "prepare", "convert")
    }
    for path in PROJECT["scripts"].values():
        module, name = path.split(":")
        assert callable(getattr(importlib.import_module(module), name))
