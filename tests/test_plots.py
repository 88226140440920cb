import json

import matplotlib
import numpy as np
import pytest

from alexnet_jax import plots


@pytest.fixture
def kept(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    return figures


@pytest.mark.parametrize("count,marker", [(1, "o"), (10, "o"), (11, "")])
def test_few_points_are_marked_and_steps_are_integers(tmp_path, kept, count, marker):
    lines = [dict(step=20 + i, train_loss=2.3, train_error=0.9, learning_rate=0.01) for i in range(count)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plots.plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    for axis in kept[0].axes:
        assert [line.get_marker() for line in axis.lines] == [marker]
        ticks = axis.get_xticks()
        assert len(ticks) <= 7 and (ticks == ticks.round()).all()  # five steps between them, and one at each end


@pytest.mark.parametrize("channels", [1, 3])
def test_white_kernels_stand_out_from_the_background(tmp_path, kept, channels):
    kernel = np.ones((2, 2, channels, 3))
    kernel[0, 0] = 0  # black; the rest is white
    plots.plot_filters(kernel, tmp_path / "filters.png", towers=1)
    picture = np.asarray(kept[0].axes[0].images[0].get_array())
    assert picture.shape == (4, 10, 3)
    gray = (picture == picture[..., :1]).all(-1)  # only the background has a color
    np.testing.assert_array_equal(gray, [[0] * 10, *[[0, 1, 1] * 3 + [0]] * 2, [0] * 10])
    assert (picture[2, 1:3] == 1).all() and (picture[1, 1] == 0).all()


def test_class_names_are_text_whatever_the_users_settings_say(tmp_path):
    names = ["$1_$5", "$10-$20", r"\frac{", "50 %_a^b"]
    predictions = np.eye(4, dtype=np.float32)
    images = np.zeros((4, 8, 8, 1), np.uint8)
    with matplotlib.rc_context({"text.usetex": True}):
        plots.plot_confusion(np.eye(4, dtype=int), names, tmp_path / "confusion.png")
        plots.plot_predictions(images, predictions, names, tmp_path / "predictions.png", labels=range(4))
    for name in ("confusion", "predictions"):
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_ticks_are_the_names_character_for_character(tmp_path, kept):
    plots.plot_confusion(np.eye(2, dtype=int), ["$1_$5", "$10-$20"], tmp_path / "confusion.png")
    for labels in (kept[0].axes[0].get_xticklabels(), kept[0].axes[0].get_yticklabels()):
        assert [(text.get_text(), text.get_parse_math()) for text in labels] == [("$1_$5", False), ("$10-$20", False)]


def test_the_maps_of_the_towers_are_side_by_side(tmp_path, kept):
    maps = np.zeros((1, 3, 3, 6))
    maps[0, 1, 1] = [0, 1, 2, 0, 4, 5]  # the center, white if it is not the minimum
    outputs = {"conv4": maps, "conv5": np.zeros((1, 32, 32, 4)), "fc6": np.zeros((1, 8))}
    plots.plot_maps(outputs, tmp_path / "maps.png", count=2, image=np.full((8, 8, 3), 7, np.uint8))
    picture, *axes = kept[0].axes
    assert (np.asarray(picture.images[0].get_array()) == 7).all() and len(axes) == 4
    assert [axis.get_title() for axis in axes] == ["tower 0", "tower 1", "", ""]
    assert [axis.get_ylabel() for axis in axes] == ["conv4\n3×3", "", "conv5\n32×32", ""]
    pixels = [np.asarray(axis.images[0].get_array()) for axis in axes]
    assert pixels[0].shape[1] == pytest.approx(pixels[2].shape[1], rel=0.1)  # 3×3 is enlarged
    middle = pixels[0].shape[0] // 2
    for tower, shown in enumerate(([0, 1], [0, 1])):  # channels 0, 1 and 3, 4
        columns = [pixels[tower].shape[1] // 4, 3 * pixels[tower].shape[1] // 4]
        assert pixels[tower][middle, columns, 0].tolist() == shown


@pytest.mark.parametrize("count,rows,columns", [(48, 2, 12), (96, 3, 16), (32, 1, 16), (10, 1, 5), (44, 2, 11)])
def test_the_rows_of_filters_are_full(tmp_path, kept, count, rows, columns):
    plots.plot_filters(np.random.default_rng(0).normal(size=(3, 3, 3, count)), tmp_path / "filters.png")
    assert [np.asarray(axis.images[0].get_array()).shape for axis in kept[0].axes] == [
        (4 * rows + 1, 4 * columns + 1, 3)
    ] * 2


@pytest.mark.parametrize("pixels", [0, 2])
def test_retrieval_shows_probabilities_and_neighbors_under_their_headers(tmp_path, kept, pixels):
    random = np.random.default_rng(0)
    train = random.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8), np.arange(9) % 3
    queries = train[0][:2] // 2, train[1][:2]
    probabilities = np.array([[0.7, 0.2, 0.1], [0.05, 0.9, 0.05]])
    fc7, nearest = np.array([[3, 4, 5], [1, 7, 8]]), np.array([[8, 6], [5, 4]])
    by_pixels = nearest if pixels else None
    plots.plot_retrieval(queries, probabilities, train, fc7, ["cat", "dog", "ship"], tmp_path / "x.png", by_pixels)
    axes = kept[0].axes
    headers = [axis.texts[0].get_text() for axis in axes if axis.texts and not axis.patches]
    expected = ["test image", "five most likely", "nearest in fc7", "nearest in pixels"]
    assert headers == expected[: 4 if pixels else 3]
    bars = [[text.get_text() for text in axis.texts] for axis in axes if axis.patches]
    assert bars == [["cat", "0.70", "dog", "0.20", "ship", "0.10"], ["dog", "0.90", "cat", "0.05", "ship", "0.05"]]
    shown = [(np.asarray(axis.images[0].get_array()), axis.title) for axis in axes if axis.images]
    positions = [*fc7.ravel(), *(nearest.ravel() if pixels else [])]
    for (image, title), position in zip(shown[2:], positions, strict=True):  # after the queries
        np.testing.assert_array_equal(image, train[0][position])
        assert title.get_text() == ["cat", "dog", "ship"][position % 3]
    assert shown[2][1].get_color() == "black" and shown[3][1].get_color() == plots.OTHER_CLASS  # of query 0, a cat
