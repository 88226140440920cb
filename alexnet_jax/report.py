"""What a run shows and leaves behind: tables, the progress bar, metrics and pictures."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A plain-text table, numbers to the right."""
    cells = [[str(x) for x in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]
    line = lambda row: "  ".join(  # noqa: E731
        c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
    ).rstrip()
    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *map(line, cells[1:])])


def layer_table(outputs: Mapping[str, Any], params: Mapping[str, Any]) -> str:
    """The layers in order: output shape for one image, kernel shape, number of parameters."""
    rows = []
    for name, out in outputs.items():
        shape = "×".join(map(str, out.shape[1:]))
        if name in params:
            kernel = "×".join(map(str, params[name]["kernel"].shape))
            rows.append((name, shape, kernel, f"{sum(x.size for x in jax.tree.leaves(params[name])):,}"))
        else:
            rows.append((name, shape, "", ""))
    rows.append(("total", "", "", f"{sum(x.size for x in jax.tree.leaves(params)):,}"))
    return table(rows, ("layer", "output", "kernel", "parameters"))


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line each time the postfix changes. Process 0 alone shows it."""

    def __init__(self, total: int, start: int):
        self._silent = jax.process_index() > 0
        self._terminal = sys.stdout.isatty() and not self._silent
        self._total = total
        self._bar = tqdm(
            total=total, initial=start, file=sys.stdout, disable=not self._terminal, dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )  # fmt: skip

    def advance(self) -> None:
        self._bar.update()

    def show(self, step: int, seconds_left: float, **values: str) -> None:
        """Shows values of the last steps, as text."""
        text = "  ".join(f"{k.replace('_', ' ')} {v}" for k, v in values.items())
        left = tqdm.format_interval(seconds_left)
        if self._terminal:
            self._bar.set_postfix_str(f"{text}  {left} left", refresh=False)
        elif not self._silent:
            print(f"step {step}/{self._total}  {text}  time left {left}", flush=True)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._terminal:
            self._bar.write(text, file=sys.stdout)
        elif not self._silent:
            print(text, flush=True)

    def close(self) -> None:
        self._bar.close()


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Metrics:
    """`metrics.jsonl`, one object a line with its step, and the same values as TensorBoard events; from process 0."""

    def __init__(self, workdir: Path, step: int):
        """Opens both; what an interrupted run wrote after `step` is dropped, since it will be written again."""
        self._first = jax.process_index() == 0
        if not self._first:
            return
        from tensorboardX.event_file_writer import EventsWriter  # a second to import
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self.path = workdir / "metrics.jsonl"
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except ValueError:  # the last line of a run that was killed
                    continue
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  (open for as long as the run)
        (workdir / "tensorboard").mkdir(exist_ok=True)
        # Without the thread of tensorboardX's SummaryWriter, in which a full disk ends no run.
        self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
        self._event, self._scalar = Event, scalar
        if step:  # TensorBoard drops what the file before holds from here on
            self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, **values: float) -> None:
        """Raises OSError if the disk is full."""
        if not self._first:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            event = self._event(step=step, wall_time=time.time(), summary=self._scalar(name, value))
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        if self._first:
            for file in (self._file, self._events):
                with contextlib.suppress(OSError):  # which `write` has raised
                    file.close()


def tile(kernels: np.ndarray, columns: int, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Kernels or maps [h, w, C, N] as one RGB picture in 0 to 1, on a blue ground; C is 3, or their mean is grey.

    Args:
      limits: what black and white stand for; None: the least and the largest value of each one.
    """
    h, w, channels, n = kernels.shape
    low, high = limits or (kernels.min(axis=(0, 1, 2)), kernels.max(axis=(0, 1, 2)))
    kernels = np.clip((kernels - low) / np.maximum(high - low, 1e-12), 0, 1)
    kernels = kernels if channels == 3 else kernels.mean(axis=2, keepdims=True)
    rows = -(-n // columns)
    picture = np.full((rows * (h + 1) + 1, columns * (w + 1) + 1, 3), (0.2, 0.4, 0.8))
    for i in range(n):
        top, left = (i // columns) * (h + 1) + 1, (i % columns) * (w + 1) + 1
        picture[top : top + h, left : left + w] = kernels[..., i]
    return picture


def plot_filters(kernel: np.ndarray, path: Path, towers: int = 2) -> None:
    """The first-layer kernels [h, w, C, N], tower 0 above tower 1, as in figure 3, on a blue ground."""
    parts = np.split(np.asarray(kernel), towers, axis=-1)
    part = parts[0].shape[-1]
    columns = min(part, 16)
    height = towers * (8 * -(-part // columns) / columns + 0.35)  # inches: square kernels and a title a tower
    figure, axes = plt.subplots(towers, 1, figsize=(8, height), layout="constrained", squeeze=False)
    for tower, (axis, kernels) in enumerate(zip(axes[:, 0], parts, strict=True)):
        axis.imshow(tile(kernels, columns), interpolation="nearest")
        axis.set_title(f"conv1, tower {tower}", fontsize=10)
        axis.axis("off")
    _save(figure, path)


def plot_predictions(
    images: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    path: Path,
    titles: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    columns: int = 4,
) -> None:
    """Images [N, H, W, C] above bars of their five likeliest classes, as the left half of figure 4.

    Args:
      probabilities: [N, K] of the classes `names`.
      titles: what stands above each image; None: the name of its class.
      labels: the right classes, whose bars are red, where they are known.
    """
    titles = titles or [names[label] for label in labels]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    shape = dict(figsize=(2.4 * columns, 3.6 * rows), layout="constrained", squeeze=False, height_ratios=[2, 1] * rows)
    figure, axes = plt.subplots(2 * rows, columns, **shape)
    for axis in axes.flat:
        axis.axis("off")
    for i, image in enumerate(images):
        above, below = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        _show(above, image, titles[i])
        _bars(below, probabilities[i], names, None if labels is None else labels[i])
    _save(figure, path)


def plot_retrieval(
    queries: tuple[np.ndarray, np.ndarray],
    probabilities: np.ndarray,
    train: tuple[np.ndarray, np.ndarray],
    found: np.ndarray,
    names: Sequence[str],
    path: Path,
) -> None:
    """Figure 4: test images, their five likeliest classes, and training images near them; red: of another class.

    Args:
      queries, train: images [N, H, W, C] and labels [N] of each; as many queries are shown as `found` has rows.
      probabilities: [Q, K] of the classes `names`.
      found: places in `train` [Q, M], as `run.nearest` gives them.
    """
    (images, labels), (rows, count) = queries, found.shape
    shape = dict(figsize=(1.3 * count + 3.6, 1.45 * rows), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(rows, count + 2, width_ratios=[1, 1.4] + [1] * count, **shape)
    for row, of_row in enumerate(axes):
        _show(of_row[0], images[row], names[labels[row]])
        _bars(of_row[1], probabilities[row], names, labels[row])
        for axis, place in zip(of_row[2:], found[row], strict=True):
            image, label = train[0][place], train[1][place]
            _show(axis, image, names[label], "black" if label == labels[row] else "tab:red")
    _save(figure, path)


def plot_images(images: Sequence[np.ndarray], titles: Sequence[str], path: Path, columns: int = 6) -> None:
    """Images [H, W, C], with pixels of 0 to 255, or maps [H, W], each scaled to its own range, side by side."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    shape = dict(figsize=(2 * columns, 2.25 * rows), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(rows, columns, **shape)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        _show(axis, np.asarray(image), title)
    _save(figure, path)


def plot_maps(
    outputs: Mapping[str, Any],
    path: Path,
    count: int = 8,
    towers: int = 2,
    limits: tuple[float, float] | None = None,
) -> None:
    """The first maps of every layer's output on one image, a row a layer, the towers side by side.

    Args:
      outputs: as `alexnet_jax.activations` gives them, of one image; layers without maps are left out.
      count: maps of each tower.
      limits: what black and white stand for in all maps; None: the least and the largest value of each one.
    """
    layers = {name: np.asarray(x[0], np.float32) for name, x in outputs.items() if x.ndim == 4}
    figure, axes = plt.subplots(len(layers), towers, figsize=(8, 0.62 * len(layers) + 0.3), layout="constrained",
                                squeeze=False)  # fmt: skip
    for (name, maps), of_row in zip(layers.items(), axes, strict=True):
        for tower, (axis, part) in enumerate(zip(of_row, np.split(maps, towers, axis=-1), strict=True)):
            axis.imshow(tile(part[:, :, None, :count], count, limits), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if not tower:
                label = f"{name}\n{maps.shape[0]}×{maps.shape[1]}"
                axis.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    for tower, axis in enumerate(axes[0]):
        axis.set_title(f"tower {tower}", fontsize=10)
    _save(figure, path)


def _show(axis, image: np.ndarray, title: str, color: str = "black") -> None:
    image = np.asarray(image)
    if image.ndim == 3 and image.dtype != np.uint8:
        image = np.clip(image, 0, 255).astype(np.uint8)
    limits = dict(vmin=0, vmax=255) if image.ndim == 3 else {}
    axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", interpolation="nearest", **limits)
    short = title if len(title) <= 24 else f"{title[:10]}…{title[-13:]}"
    axis.set_title(short, fontsize=9, color=color, parse_math=False)
    axis.axis("off")


def _bars(axis, probabilities: np.ndarray, names: Sequence[str], label: int | None) -> None:
    """The five likeliest classes, the likeliest on top; the right one is red."""
    top = np.argsort(-probabilities)[:5]
    axis.axis("on")
    axis.barh(range(len(top)), probabilities[top], color=["salmon" if i == label else "lightblue" for i in top])
    for place, i in enumerate(top):
        axis.text(0.02, place, names[i], va="center", fontsize=8, parse_math=False)
    axis.set(xlim=(0, 1), ylim=(len(top) - 0.4, -0.6), xticks=[], yticks=[])


def plot_confusion(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """confusion[label, prediction] as counts: shares of each label by colour, counts as numbers where they fit."""
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    few = len(names) <= 20
    figure, axis = plt.subplots(figsize=(7.5, 6.5) if few else (10, 9), layout="constrained")
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the label's images", shrink=0.8)
    axis.set(xlabel="prediction", ylabel="label")
    if few:
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(names)), names)
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                color = "white" if share[i, j] > 0.5 else "black"
                axis.text(j, i, count, ha="center", va="center", fontsize=8, color=color)
    _save(figure, path)


def plot_curves(metrics: Path, path: Path) -> None:
    """Loss, error and learning rate against the step, from `metrics.jsonl`."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, title, names in (
        (axes[0], "loss", ("train_loss", "validation_loss")),
        (axes[1], "top-1 error, %", ("train_error", "validation_top1_error")),
        (axes[2], "learning rate", ("learning_rate",)),
    ):
        for name in names:
            points = [(x["step"], x[name]) for x in lines if name in x]
            if points:
                steps, values = np.array(points).T
                values = values * 100 if "error" in name else values
                marker = "o" if name.startswith("validation") or len(points) <= 10 else ""
                axis.plot(steps, values, label=name.split("_")[0], marker=marker, markersize=3)
        axis.set(xlabel="step", title=title)
        axis.locator_params(axis="x", nbins=5, integer=True)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[1].legend()
    axes[2].set_yscale("log")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)
