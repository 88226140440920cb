"""Importing the package changes nothing of the user's process."""

import subprocess
import sys

import synthetic_data
from runners import ROOT

CODE = """
import logging, os, pkgutil, signal, sys, warnings
import matplotlib
before = (matplotlib.get_backend(auto_select=False), [*sys.warnoptions], [*warnings.filters], sys.unraisablehook,
          signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
import alexnet_jax
from absl.flags import FLAGS
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert "alexnet_jax.weights" not in sys.modules and "cv2" not in sys.modules
assert callable(alexnet_jax.load_weights) and "alexnet_jax.weights" in sys.modules
for module in pkgutil.walk_packages(alexnet_jax.__path__, "alexnet_jax."):
    if not module.name.endswith("beam"):
        __import__(module.name)
assert not xla_bridge.backends_are_initialized()
assert before[0] == matplotlib.get_backend(auto_select=False)
assert before[1] == sys.warnoptions and before[3] == sys.unraisablehook
assert before[4:] == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
assert logging.root.handlers == [] and logging.root.level == logging.WARNING
assert not FLAGS.is_parsed() and "workdir" not in FLAGS
assert "matplotlib.pyplot" not in sys.modules and "tensorflow" not in sys.modules
from alexnet_jax import data
data.load(data.open_builder("synthetic", sys.argv[1]), "test[:10]")
assert "tensorflow" not in sys.modules
assert logging.root.handlers == []
from alexnet_jax.sharding import make_mesh
os.environ.pop("PJRT_NPROC", None)  # of the tests
make_mesh(cpu_devices=2)
assert "PJRT_NPROC" not in os.environ
"""


def test_importing_every_module_changes_nothing_and_needs_no_tensorflow(synthetic):
    command = [sys.executable, "-c", CODE, synthetic_data.DATA_DIR]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
