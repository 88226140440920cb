"""PyTorch in a process of its own, `torch_alexnet`, and the difference between its results and ours."""

import contextlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alexnet_jax import AlexNet, cross_entropy, paper_sgd
from alexnet_jax.errors import UserError
from alexnet_jax.train_step import create_state


class Peer:
    """A process of `torch_alexnet`.

    Args:
      python: a Python interpreter.

    Raises:
      UserError: it cannot be started.
    """

    def __init__(self, python: str):
        command = [python, str(Path(__file__).with_name("torch_alexnet.py"))]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
        except OSError as error:
            raise UserError(f"--torch-python={python}: {error.strerror}; expected a Python interpreter") from None

    def ask(self, ask: str, **what: Any) -> dict[str, Any] | None:
        """Send a request and return the answer; None if the process has ended, as it does without PyTorch."""
        try:
            self.process.stdin.write(json.dumps({"ask": ask, **what}) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline() or "null")
        except (BrokenPipeError, ValueError):  # it has ended, or is not Python
            return None

    def last_error(self) -> str:
        """Return the message of the exception that ended the process, on one line."""
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["its process has ended"]
        first = max((i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), default=-1)
        return " ".join(lines[first:])

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self.process.stdin.close()
        self.process.wait()
        self._errors.close()


def network(model: AlexNet, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the arguments of `torch_alexnet.AlexNet` for the same network."""
    return {"image": shape[0], "channels": shape[2], "classes": model.num_classes, "widths": list(model.widths)}


def differences(peer: Peer, model: AlexNet, shape: tuple[int, int, int], batch: int = 4) -> dict[str, float]:
    """Return the differences between PyTorch's logits and gradients and ours, on the same weights, without dropout.

    Args:
      shape: [H, W, C] of an image.

    Returns:
      For the logits and each parameter's gradient, the largest difference divided by the largest element.

    Raises:
      UserError: PyTorch raises an error.
    """
    random = np.random.default_rng(1)
    images = random.integers(-128, 128, (batch, *shape)).astype(np.float32)
    labels = random.integers(0, model.num_classes, batch).astype(np.int32)
    params = create_state(model, paper_sgd(), shape, 0).params

    def loss(params):
        logits = model.apply({"params": params}, images)
        return cross_entropy(logits, labels), logits

    with jax.default_matmul_precision("highest"):
        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    ours = {"logits": logits, **_by_path(gradients)}
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/in.npz", f"{folder}/out.npz"
        np.savez(source, images=images, labels=labels, **_by_path(params))
        answer = peer.ask("compute", network=network(model, shape), source=source, target=target)
        if answer is None or "error" in answer:
            raise UserError(f"PyTorch failed: {(answer or {'error': peer.last_error()})['error']}")
        theirs = np.load(target)
        return {k: float(np.abs(v - theirs[k]).max() / np.abs(v).max()) for k, v in ours.items()}


def _by_path(tree: Any) -> dict[str, np.ndarray]:
    return {f"{layer}/{name}": np.asarray(x) for layer, leaves in tree.items() for name, x in leaves.items()}
