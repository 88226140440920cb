"""The README and the docs: Python examples are executed; commands, config fields, paths and links must exist.

`<!-- needs: SOMETHING -->` directly above a block marks a block that is not run here; its modules, flags and fields are
checked. `test_doc_commands.py` and `test_imagenet.py` run the commands on less data.
"""

import doctest
import functools
import importlib.util
import re
import subprocess
import sys
import tomllib

import ml_collections
import pytest
from pages import BLOCKS, PAGES, SHELL, commands_of
from runners import ROOT, SYNTHETIC, run_main

from alexnet_jax.configs import default
from alexnet_jax.flags import config_file

A_RUN = "a run in runs/"
PROGRAMS = {"pip", "pytest", "ruff", "python", "python3", "source", ".ci/run"}
PYTHON = [block for block in BLOCKS if block.language == "python" and block.needs != A_RUN]
TAKES_OTHER_FLAGS = {"alexnet_jax.prepare_beam", "apache_beam.runners.worker.worker_pool_main"}  # Beam's


def inline_code(page):
    """What stands between backticks in a page's text."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", prose)


@functools.cache
def help_of(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.stdout + done.stderr


def config_fields(config=None, prefix=""):
    for name, value in (config or default.get_config()).items():
        yield prefix + name
        if isinstance(value, ml_collections.ConfigDict):
            yield from config_fields(value, f"{prefix}{name}.")


def check_command(words, where):
    """The module of `python -m` exists and has each flag; files and config fields exist."""
    if "-m" in words:
        module, *arguments = words[words.index("-m") + 1 :]
        if module not in TAKES_OTHER_FLAGS:
            assert importlib.util.find_spec(module), f"{where}: no module {module}"
            for word in arguments:
                if match := re.match(r"--([a-z_]+)(?=[= ]|$)", word):
                    assert re.search(rf"--{match[1]}\b", help_of(module)), f"{where}: {module} has no --{match[1]}"
    for word in words:
        if match := re.match(r"--config\.([a-z0-9_.]+)", word):
            assert match[1] in set(config_fields()), f"{where}: no field config.{match[1]}"
        if match := re.search(r"\b((?:alexnet_jax|tests)/[\w/]+\.py)", word):
            assert (ROOT / match[1]).exists(), f"{where}: no file {match[1]}"
        if (match := re.fullmatch(r"--config=([\w:]+)", word)) and match[1] != "NAME":
            assert config_file(match[1]) != match[1], f"{where}: no config {match[1]}"


def execute(block, names):
    if ">>>" not in block.text:
        exec(compile(block.text, str(block), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(block.text, names, str(block), str(block.page), block.line)
    report = []
    failed, tried = doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
    names.update(test.globs)
    assert tried and not failed, "".join(report)


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}), ids=lambda page: page.name)
def test_python_examples(page):
    names = {}  # what the blocks of a page have defined so far
    for block in PYTHON:
        if block.page == page and block.needs:
            compile(block.text, str(block), "exec")
        elif block.page == page:
            execute(block, names)


def test_examples_of_a_run(synthetic, tmp_path, monkeypatch):
    flags = "--config.train_split=train[:500] --config.validation_split=train[500:600] --config.test_split=test[:100]"
    flags += " --config.widths=8,16,16,16,16,32,32 --config.num_train_steps=2 --config.eval_every=2"
    code, output = run_main(tmp_path / "runs", *SYNTHETIC, *flags.split())
    assert code == 0, output
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in BLOCKS if block.needs == A_RUN]
    assert blocks
    for block in blocks:
        execute(block, {})


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_of_shell_blocks(block):
    for words in commands_of(block.text):
        check_command(words, block)
        assert block.needs or words[0] in PROGRAMS, f"{block}: {words[0]}: mark the block with what it needs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_fields_in_the_text(page):
    fields = {*config_fields(), "json"}
    for code in inline_code(page):
        if code.startswith(("python -m ", "pytest ")):
            check_command(code.split(), page.name)
        if code.startswith("alexnet-"):
            scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("scripts", {})
            assert code in scripts, f"{page.name}: no command {code}"
        for field in re.findall(r"(?:^|--)config\.([a-z0-9_.]+)", code):
            assert field in fields, f"{page.name}: no field config.{field}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_the_text(page):
    for code in inline_code(page):
        if re.fullmatch(r"(alexnet_jax|experiments|tests|docs)/[\w/.]*", code):
            assert (ROOT / code).exists(), f"{page.name}: no {code}"


def anchors_of(page):
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), f"{page.name}: no {target}"
            assert not anchor or anchor in anchors_of(other), f"{page.name}: no {target}"


def test_every_public_name_has_an_example():
    import alexnet_jax

    text = (ROOT / "docs" / "api.md").read_text()
    table = set(re.findall(r"`([\w.]+)`", text.split("```")[0]))
    examples = "".join(block.text for block in BLOCKS if block.page.name == "api.md")
    for name in alexnet_jax.__all__:
        assert name in table and len(re.findall(rf"\b{name}\b", examples)) > 1, name


def test_the_readme_is_one_page_and_has_the_commands_of_ci():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 160
    patterns = re.findall(r"readme_command '([^']+)'", (ROOT / ".ci" / "run").read_text())
    assert patterns
    for pattern in patterns:
        assert any(re.match(rf"pip install .*{pattern}", line) for line in lines), pattern


def test_the_tests_of_the_workflow_exist():
    named = re.findall(r"tests/\w+\.py", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert named and all((ROOT / name).exists() for name in named), named
