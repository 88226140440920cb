"""Memory in huge pages: a train step allocates gigabytes, and most of the system's time goes into small pages."""

import os
import sys

TUNABLE = "glibc.malloc.hugetlb=1"  # of glibc 2.35 and later


def use_huge_pages() -> None:
    """Under Linux, starts this process anew with malloc in huge pages, unless $GLIBC_TUNABLES is set.

    glibc reads the variable only when a process starts. The process keeps its number, and the command its arguments.
    On two CPU cores (AMD EPYC, JAX 0.10.2, 25 November 2026) a step of the default recipe takes 23.8 ms for 25.9
    (medians of three pairs), and the paper's network trains 74 images/s for 57 (batch 64, one run each).
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = TUNABLE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
