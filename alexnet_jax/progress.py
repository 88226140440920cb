"""The progress bar of a command."""

import sys

import jax
from tqdm import tqdm


def title(name: str) -> str:
    """Return the name of a value as a person reads it: `images_per_s` is images/s, `top1` top-1."""
    return name.replace("_per_", "/").replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line each time values are shown. Only process 0 shows it."""

    def __init__(self, total: int, start: int):
        """Show steps of a total, `start` of which are done."""
        self._silent = jax.process_index() > 0
        self._terminal = sys.stdout.isatty() and not self._silent
        self._total = total
        self._bar = tqdm(
            total=total, initial=start, file=sys.stdout, disable=not self._terminal, dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )  # fmt: skip

    def advance(self, steps: int = 1) -> None:
        """Count some steps."""
        self._bar.update(steps)

    def show(self, step: int, seconds_left: float, **values: str) -> None:
        """Show values of the last steps, as text."""
        text = "  ".join(f"{title(k)} {v}" for k, v in values.items())
        left = tqdm.format_interval(seconds_left)
        if self._terminal:
            self._bar.set_postfix_str(f"{text}  {left} left", refresh=False)
        elif not self._silent:
            print(f"step {step}/{self._total}  {text}  time left {left}", flush=True)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if self._terminal:
            self._bar.write(text, file=sys.stdout)
        elif not self._silent:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
