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
