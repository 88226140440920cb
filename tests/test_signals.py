"""Signals while a function of C++ runs, which Python does not interrupt."""

import signal
import subprocess
import sys

import pytest
from runners import ROOT

# A key derivation of a minute stands for a compilation.
SCRIPT = """
import hashlib, os, threading, time
from alexnet_jax.runtime.signals import collected_signals, exit_while_blocked, raised_signals

def compilation(iterations):
    threading.Timer(0.5, os.write, (1, b"started\\n")).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", iterations)

exit_while_blocked(0.2, lambda number: os._exit(40 + number))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("block,code", [
    ("with raised_signals(): compilation(200_000_000)", 40),
    ("with collected_signals():\n  with raised_signals(): compilation(200_000_000)", 40),
    ("with collected_signals() as received:\n  compilation(3_000_000)\n  time.sleep(1); os._exit(received[0])", 0),
    ("with raised_signals():\n  with collected_signals() as received:\n    compilation(3_000_000)\n    time.sleep(1)\n"
     "    os._exit(received[0])", 0),
])  # fmt: skip
def test_a_blocked_process_exits_unless_something_is_unsaved(number, block, code):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + block], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    assert process.wait(timeout=30) == code + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("block", ["compilation(200_000_000)", "compilation(1); time.sleep(60)"])
def test_a_command_exits_at_a_signal_even_if_the_exit_of_the_interpreter_would_crash(tmp_path, number, block):
    command = (
        "import atexit, tempfile\nfrom alexnet_jax.runtime.signals import exit_at_signals\natexit.register(os.abort)\n"
        f"exit_at_signals()\nwith tempfile.TemporaryDirectory(dir={str(tmp_path)!r}): {block}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number and not process.stderr.read()
    assert "sleep" not in block or not list(tmp_path.iterdir())
