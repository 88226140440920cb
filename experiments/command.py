"""Shared by the commands of the experiments: the working directory, and its files."""

from pathlib import Path

from matplotlib.figure import Figure

from alexnet_jax.errors import UserError
from alexnet_jax.runtime.files import replaced


def make_workdir(path: Path) -> None:
    """Create a working directory if it does not exist; raises UserError if it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={path}: {error.strerror}; expected a folder to write to") from None


def write_text(path: Path, text: str) -> None:
    """Write a file, the complete file or nothing."""
    with replaced(path) as temporary:
        temporary.write_text(text)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, the complete file or nothing."""
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
