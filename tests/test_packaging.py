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
    names_of_tests = {
        "chex",
        "scipy",
        "protobuf",
        "onnxruntime",
        "pytest",
        "pytest-xdist",
        "ruff",
        "mypy",
        "import-linter",
    }
    assert names == names_of_tests


def test_each_command_is_a_function():
    commands = ("train", "evaluate", "predict", "convert", "export", "features", "prepare")
    assert set(PROJECT["scripts"]) == {f"alexnet-{name}" for name in commands}
    for path in PROJECT["scripts"].values():
        module, name = path.split(":")
        assert callable(getattr(importlib.import_module(module), name))
