"""Memory in huge pages: a train step allocates gigabytes, and the system spends most of its time on small pages."""

import os
import sys

TUNABLE = "glibc.malloc.hugetlb=1"  # of glibc 2.35 and later


def use_huge_pages() -> None:
    """Re-execute this process with malloc in huge pages, on Linux and unless $GLIBC_TUNABLES is set.

    glibc reads the variable only when a process starts. The process keeps its ID, and the command its arguments.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
