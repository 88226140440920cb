import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Compiled programs are shared between the processes of one test session.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# A network of the same eight layers that trains in seconds, on a part of the real data.
TINY = (
    "--config.widths=8,16,16,16,16,32,32",
    "--config.kernel_std=0.28,0.1,0.12,0.12,0.12,0.3,0.25,0.05",
    "--config.train_split=train[:1000]",
    "--config.validation_split=train[1000:1200]",
    "--config.test_split=test[:200]",
    "--config.batch_size=50",
    "--config.num_train_steps=40",
    "--config.eval_every=10",
    "--config.log_every=5",
    "--config.warmup_steps=0",
    "--config.learning_rate=0.02",
)


def start_main(workdir, *flags, **popen):
    """`python -m alexnet_jax.main` as a user starts it, its output in a pipe."""
    command = [sys.executable, "-m", "alexnet_jax.main", "--workdir", str(workdir), *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **popen
    )


def run_main(workdir, *flags, **popen):
    """Runs it to the end: (exit code, output)."""
    process = start_main(workdir, *flags, **popen)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture(scope="session")
def fashion_mnist():
    """The real data set, prepared on first use where a user has it too."""
    from alexnet_jax import data

    return data.open_builder("fashion_mnist")
