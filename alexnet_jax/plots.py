"""Figures of a run as PNG files: filters, predictions, retrieval, feature maps, confusion and curves.

They are drawn without pyplot, whose backend and open figures belong to the user.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from alexnet_jax.runtime.files import read_json_lines, replaced

OTHER_CLASS = "#D55E00"  # of Okabe and Ito's palette, which color-blind readers tell from black

_text = matplotlib.rc_context({"text.usetex": False})  # names are text, also if the user's matplotlibrc sets LaTeX


def tile(kernels: np.ndarray, columns: int, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Return kernels or feature maps [h, w, C, N] as one RGB image in 0 to 1 on a blue background.

    Args:
      kernels: C is 3, or the mean over C is shown in gray.
      columns: the number of kernels in a row.
      limits: the values shown as black and white; None: the minimum and maximum of each kernel.
    """
    h, w, channels, n = kernels.shape
    low, high = limits or (kernels.min(axis=(0, 1, 2)), kernels.max(axis=(0, 1, 2)))
    kernels = np.clip((kernels - low) / np.maximum(high - low, 1e-12), 0, 1)
    kernels = kernels if channels == 3 else kernels.mean(axis=2, keepdims=True)
    rows = -(-n // columns)
    image = np.full((rows * (h + 1) + 1, columns * (w + 1) + 1, 3), (0.2, 0.4, 0.8))
    for i in range(n):
        top, left = (i // columns) * (h + 1) + 1, (i % columns) * (w + 1) + 1
        image[top : top + h, left : left + w] = kernels[..., i]
    return image


@_text
def plot_filters(kernel: np.ndarray, path: Path, towers: int = 2) -> None:
    """Plot the first-layer kernels [h, w, C, N], tower 0 above tower 1, as in figure 3, on a blue background."""
    parts = np.split(np.asarray(kernel), towers, axis=-1)
    part = parts[0].shape[-1]
    columns = next((n for n in range(16, 7, -1) if part % n == 0), min(part, 16))  # full rows, if there are such
    height = towers * (8 * -(-part // columns) / columns + 0.35)  # inches: square kernels and a title a tower
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(towers, 1, squeeze=False)
    for tower, (axis, kernels) in enumerate(zip(axes[:, 0], parts, strict=True)):
        axis.imshow(tile(kernels, columns), interpolation="nearest")
        axis.set_title(f"conv1, tower {tower}" if towers > 1 else "conv1", fontsize=10)
        axis.axis("off")
    _save(figure, path)


@_text
def plot_predictions(
    images: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    path: Path,
    titles: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    columns: int = 4,
) -> None:
    """Plot images [N, H, W, C] above bars of their five most probable classes, as the left half of figure 4.

    Args:
      probabilities: [N, K] of the classes `names`.
      titles: the title of each image; None: the name of its class.
      labels: the correct classes, whose bars are red; None: no bar is.
    """
    titles = titles or [names[label] for label in labels]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.4 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2, 1] * rows)
    for axis in axes.flat:
        axis.axis("off")
    for i, image in enumerate(images):
        above, below = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        _show(above, image, titles[i])
        _bars(below, probabilities[i], names, None if labels is None else labels[i])
    _save(figure, path)


@_text
def plot_retrieval(
    queries: tuple[np.ndarray, np.ndarray],
    probabilities: np.ndarray,
    train: tuple[np.ndarray, np.ndarray],
    neighbors: np.ndarray,
    names: Sequence[str],
    path: Path,
    pixel_neighbors: np.ndarray | None = None,
) -> None:
    """Plot figure 4: test images, their five most probable classes, and their nearest training images.

    The titles of training images of another class are orange.

    Args:
      queries, train: images [N, H, W, C] and labels [N] of each; as many queries are shown as `neighbors` has rows.
      probabilities: [Q, K] of the classes `names`.
      neighbors: positions in `train` [Q, M], as `run.nearest` returns them for the activations of fc7.
      pixel_neighbors: the same for the pixels, [Q, P], shown to the right; None: they are not shown.
    """
    (images, labels), (rows, count) = queries, neighbors.shape
    groups = {"nearest in fc7": neighbors}
    widths, gap = [1, 1.6] + [1] * count, 0.25  # in images
    if pixel_neighbors is not None:
        groups["nearest in pixels"] = pixel_neighbors
        widths += [gap] + [1] * pixel_neighbors.shape[1]
    side = 0.7  # inches of an image
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure = Figure(figsize=(side * sum(widths), (side + 0.2) * rows + 0.3), layout=layout)
    grid = figure.add_gridspec(rows + 1, len(widths), width_ratios=widths, height_ratios=[0.12] + [1] * rows)

    def header(first: int, last: int, text: str) -> None:
        axis = figure.add_subplot(grid[0, first:last])
        axis.axis("off")
        axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, weight="bold")

    header(0, 1, "test image")
    header(1, 2, "five most likely")
    for row in range(rows):
        _show(figure.add_subplot(grid[row + 1, 0]), images[row], names[labels[row]], size=7)
        _bars(figure.add_subplot(grid[row + 1, 1]), probabilities[row], names, labels[row], size=6.5)
    column = 2
    for text, positions in groups.items():
        header(column, column + positions.shape[1], text)
        for row, i in np.ndindex(*positions.shape):
            image, label = (x[positions[row, i]] for x in train)
            color = "black" if label == labels[row] else OTHER_CLASS
            _show(figure.add_subplot(grid[row + 1, column + i]), image, names[label], color, size=7)
        column += positions.shape[1] + 1
    _save(figure, path)


@_text
def plot_images(images: Sequence[np.ndarray], titles: Sequence[str], path: Path, columns: int = 6) -> None:
    """Plot images [H, W, C], with pixels of 0 to 255, or maps [H, W], each scaled to its own range, in a grid."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2 * columns, 2.25 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        _show(axis, np.asarray(image), title)
    _save(figure, path)


@_text
def plot_maps(
    outputs: Mapping[str, Any],
    path: Path,
    count: int = 8,
    towers: int = 2,
    limits: tuple[float, float] | None = None,
    image: np.ndarray | None = None,
) -> None:
    """Plot the first feature maps of every layer on one image, one row per layer, the towers side by side.

    Args:
      outputs: as `alexnet_jax.activations` returns them, of one image; layers without maps are skipped.
      count: maps of each tower.
      limits: the values shown as black and white in all maps; None: the minimum and maximum of each map.
      image: uint8 [H, W, C], shown to the left of the maps.
    """
    layers = {name: np.asarray(x[0], np.float32) for name, x in outputs.items() if x.ndim == 4}
    margin, width = 0.0 if image is None else 1.7, 7.4 / towers  # inches: the image, the maps of a tower
    height = len(layers) * (width / count + 0.08) + 0.3
    figure = Figure(figsize=(margin + 0.6 + width * towers, height), layout="constrained")
    maps: Any = figure
    if image is not None:
        panels: Any = figure.subfigures(1, 2, width_ratios=[margin, figure.get_figwidth() - margin])
        left, maps = panels
        _show(left.subplots(), image, "image")
    axes = maps.subplots(len(layers), towers, squeeze=False)
    for (name, x), row_axes in zip(layers.items(), axes, strict=True):
        scale = max(1, round(64 / x.shape[0]))  # small maps are enlarged, so that all rows have the same size
        for tower, (axis, part) in enumerate(zip(row_axes, np.split(x, towers, axis=-1), strict=True)):
            part = part[:, :, None, :count].repeat(scale, axis=0).repeat(scale, axis=1)
            axis.imshow(tile(part, count, limits), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if not tower:
                label = f"{name}\n{x.shape[0]}×{x.shape[1]}"
                axis.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    if towers > 1:
        for tower, axis in enumerate(axes[0]):
            axis.set_title(f"tower {tower}", fontsize=10)
    _save(figure, path)


def _show(axis: Axes, image: np.ndarray, title: str, color: str = "black", size: float = 9) -> None:
    image = np.asarray(image)
    if image.ndim == 3 and image.dtype != np.uint8:
        image = np.clip(image, 0, 255).astype(np.uint8)
    low, high = (0, 255) if image.ndim == 3 else (None, None)
    image = image[..., 0] if image.shape[-1] == 1 else image
    axis.imshow(image, cmap="gray", interpolation="nearest", vmin=low, vmax=high)
    short = title if len(title) <= 24 else f"{title[:10]}…{title[-13:]}"
    axis.set_title(short, fontsize=size, color=color, parse_math=False, pad=2 * size / 3)
    axis.axis("off")


def _bars(axis: Axes, probabilities: np.ndarray, names: Sequence[str], label: int | None, size: float = 8) -> None:
    """Show the five most probable classes and their probabilities, the largest on top; the correct one is red."""
    top = np.argsort(-probabilities)[:5]
    axis.axis("on")
    axis.barh(range(len(top)), probabilities[top], color=["salmon" if i == label else "lightblue" for i in top])
    axis.spines[:].set_linewidth(0.5)
    for position, i in enumerate(top):
        axis.text(0.02, position, names[i], va="center", fontsize=size, parse_math=False)
        axis.text(0.98, position, f"{probabilities[i]:.2f}", va="center", ha="right", fontsize=size)
    axis.set(xlim=(0, 1), ylim=(len(top) - 0.4, -0.6), xticks=[], yticks=[])


@_text
def plot_confusion(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Plot confusion[label, prediction], counts: shares of each label by color, counts as numbers where they fit."""
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    few = len(names) <= 20
    figure = Figure(figsize=(7.5, 6.5) if few else (10, 9), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the label's images", shrink=0.8)
    axis.set(xlabel="prediction", ylabel="label")
    if few:
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
        axis.set_yticks(range(len(names)), names, parse_math=False)
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                color = "white" if share[i, j] > 0.5 else "black"
                axis.text(j, i, count, ha="center", va="center", fontsize=8, color=color)
    _save(figure, path)


@_text
def plot_curves(metrics: Path, path: Path) -> None:
    """Plot loss, error and learning rate against the step, from `metrics.jsonl`."""
    lines = read_json_lines(metrics)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
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


def _save(figure: Figure, path: Path) -> None:
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
