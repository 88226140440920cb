"""A command that re-executes itself, and the pages that the system gives it then."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from runners import ROOT

from alexnet_jax.runtime.huge_pages import TUNABLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux alone")
CODE = """
import os, sys
from alexnet_jax.runtime import huge_pages
huge_pages.PACKAGES, huge_pages.COMMAND = ("probe", "package"), "probe-command"
huge_pages.use_huge_pages()
memory = bytearray(b"x") * (256 << 20)
huge = open("/proc/self/smaps_rollup").read().split("AnonHugePages:")[1].split()[0]
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), 1024 * int(huge), *sys.argv[1:])
"""


@pytest.fixture
def run(tmp_path):
    """A program that re-executes itself as the training command does, started in one way or another."""
    (tmp_path / "probe.py").write_text(CODE)
    (tmp_path / "probe-command").write_text(CODE)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(CODE)
    (tmp_path / "script.py").write_text("import runpy\nrunpy.run_module('probe', run_name='__main__', alter_sys=True)")

    def start(*command, code="", **variables):
        environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, *command, "one argument", "--two"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with subprocess.Popen(command, cwd=tmp_path, env=environment | variables, **pipes) as process:
            output = process.communicate(code)[0]
        assert process.returncode == 0
        pid, tunables, huge, *arguments = output.splitlines()[0].split(maxsplit=3)
        assert int(pid) == process.pid and arguments == ["one argument --two"]
        return tunables, int(huge)

    return start


def test_memory_is_allocated_in_huge_pages(run):
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        pytest.skip("this C library has no huge pages")
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system gives no huge pages")
    tunables, huge = run("-m", "probe")
    assert tunables == TUNABLE and huge > 128 << 20


def test_the_users_setting_is_kept(run):
    tunables, huge = run("-m", "probe", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert tunables == "glibc.malloc.hugetlb=0"


@pytest.mark.parametrize("command", [
    ("-m", "probe"), ("-X", "dev", "-m", "probe"), ("-m", "package"), ("probe-command",)
])  # fmt: skip
def test_the_command_is_re_executed(run, command):
    assert run(*command)[0] == TUNABLE


@pytest.mark.parametrize("command,code", [
    (("script.py",), ""),
    (("-",), "import runpy; runpy.run_module('probe', run_name='__main__')"),
    (("-c", "import probe"), ""),
    (("-m", "pdb", "-c", "continue", "-c", "quit", "-m", "probe"), ""),
    (("-m", "runpy", "probe"), ""),
])  # fmt: skip
def test_another_program_that_runs_the_command_is_left_as_it_is(run, command, code):
    assert run(*command, code=code)[0] == "None"
