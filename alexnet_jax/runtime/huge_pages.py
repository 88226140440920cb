"""Memory in huge pages: a train step on a CPU allocates gigabytes, which is slow in small pages."""

import os
import sys
from collections.abc import Sequence

PACKAGES, COMMAND = ("alexnet_jax", "experiments"), "alexnet-train"
TUNABLE = "glibc.malloc.hugetlb=1"  # of glibc 2.35 and later


def use_huge_pages() -> None:
    """Re-execute this process with malloc in huge pages, on Linux and unless $GLIBC_TUNABLES is set.

    glibc reads the variable only when a process starts. The process keeps its ID, and the command its arguments. It
    does nothing in a program that runs the command in its own process: with `runpy`, in a debugger or in a notebook.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and _is_command(sys.orig_argv, sys.argv[1:]):
        os.environ["GLIBC_TUNABLES"] = TUNABLE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_command(interpreter: Sequence[str], arguments: Sequence[str]) -> bool:
    """Return whether this process is `python -m` with a module of `PACKAGES`, or the console command, and nothing else.

    Args:
      interpreter: `sys.orig_argv`.
      arguments: those of the program that runs now, `sys.argv[1:]`.
    """
    first = len(interpreter) - len(arguments)
    if list(interpreter[first:]) != list(arguments):
        return False
    own = interpreter[1:first]  # the interpreter's options, and what it runs
    if [os.path.basename(x) for x in own] == [COMMAND]:
        return True
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if [i for i, x in enumerate(own) if x == "-m"] != [len(own) - 2] or own[-1].split(".")[0] not in PACKAGES:
        return False
    return spec is not None and spec.name in (own[-1], f"{own[-1]}.__main__")
