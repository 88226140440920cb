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
from alexnet_jax.runtime.huge_pages import use_huge_pages
use_huge_pages()
memory = bytearray(b"x") * (256 << 20)
huge = open("/proc/self/smaps_rollup").read().split("AnonHugePages:")[1].split()[0]
print(os.getpid(), os.environ["GLIBC_TUNABLES"], 1024 * int(huge), *sys.argv[1:])
"""


def run(**variables):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables
    command = [sys.executable, "-c", CODE, "one argument", "--two"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        output = process.communicate()[0]
    assert process.returncode == 0
    pid, tunables, huge, *arguments = output.split(maxsplit=3)
    assert int(pid) == process.pid and arguments == ["one argument --two\n"]
    return tunables, int(huge)


def test_memory_is_allocated_in_huge_pages():
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        pytest.skip("this C library has no huge pages")
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system gives no huge pages")
    tunables, huge = run()
    assert tunables == TUNABLE and huge > 128 << 20


def test_the_users_setting_is_kept():
    tunables, huge = run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert tunables == "glibc.malloc.hugetlb=0"
