"""The notebook: it runs from top to bottom, and is committed with its outputs."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import weight_files
from runners import ROOT
from synthetic_data import DATA_DIR

from alexnet_jax.configs import cifar10
from alexnet_jax.export import export
from alexnet_jax.weights import load_weights

NOTEBOOK = ROOT / "experiments" / "explore.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]
TEXT = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
PICTURES = {"lighting", "maps", "maximized", "neighbors", "photo", "pooling", "predictions", "saliency", "ten_crop"}
REAL = {"real_filters", "real_maps", "real_maximized"}


def less(source):
    """The same on fewer images."""
    for many, few in {"train[:10000]": "train[:200]", "train[:5000]": "train[:200]", "test[:500]": "test[:60]"}.items():
        source = source.replace(many, few)
    return source.replace("(163, 163, 3)", "(115, 115, 3)")


def execute(sources, names):
    for source in sources:
        exec(compile(less(source), str(NOTEBOOK), "exec"), names)
        plt.close("all")


@pytest.fixture
def in_a_folder(synthetic_rgb, tmp_path, monkeypatch):
    """An empty current folder, and data of the shape of CIFAR-10 in its place."""
    original = cifar10.get_config

    def get_config():
        config = original()
        config.dataset, config.data_dir = "synthetic_rgb", str(DATA_DIR)
        config.train_split, config.validation_split, config.test_split = "train[:200]", "train[200:300]", "test[:60]"
        return config

    monkeypatch.setattr(cifar10, "get_config", get_config)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPLORE_STEPS", "20")
    monkeypatch.setenv("EXPLORE_WEIGHTS", "torchvision.pth")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # as if it was not installed
    with matplotlib.rc_context({"backend": "agg"}):
        yield


def test_the_notebook_from_top_to_bottom(in_a_folder, monkeypatch, capsys):
    names = {"__name__": "__main__"}
    execute(SOURCES, names)
    assert names["run"].step == 20 and names["result"]["steps"] == 20
    influence = names["influence"]
    assert influence["pool2"] == 0 and influence["conv3"] > 0
    assert {p.stem for p in Path("explored").glob("*.png")} == PICTURES
    assert sorted(names["gathering"]) == ["conv3", "fc6", "fc7", "fc8", "fc8"]
    out = capsys.readouterr().out
    assert "torchvision.pth is not here" in out and "no change: conv1, norm1, pool1, conv2, norm2, pool2\n" in out
    np.testing.assert_array_equal(names["windows"][:8, :8], 1)  # of 2×2, the last

    # Some of the real file, and the run as a file of weights.
    params = weight_files.random_params((64, 8, 8, 8, 256, 2, 2), towers=1)
    weight_files.torch_legacy(Path("torchvision.pth"), params)
    export(load_weights("explored/run"), Path("explored/network.safetensors"))
    opening = next(source for source in SOURCES if 'open_run(FOLDER / "run")' in source)
    parts = ("tower_influence(", "real", "ipywidgets")
    others = [source for source in SOURCES if any(part in source for part in parts)]
    drawn = []
    sliders = SimpleNamespace(
        FloatSlider=lambda value, **options: value,
        FloatLogSlider=lambda value, **options: value,
        interact=lambda draw, **values: drawn.append((draw(**values), len(plt.gcf().axes))),
    )
    monkeypatch.setitem(sys.modules, "ipywidgets", sliders)
    file = f'open_run(FOLDER / "network.safetensors", {str(DATA_DIR)!r})'
    execute([opening.replace('open_run(FOLDER / "run")', file), *others], names)
    assert names["run"].step is None and names["influence"] == influence
    assert {p.stem for p in Path("explored").glob("*.png")} == PICTURES | REAL
    assert drawn == [(None, 1), (None, 1)]


def test_the_first_cell_installs_from_the_address_of_the_badge(tmp_path, monkeypatch, capsys):
    (repository,) = re.findall(r'^REPOSITORY = "([\w.-]+/[\w.-]+)"', SOURCES[0], re.M)
    badge = re.findall(r"https://colab.research.google.com/github/([\w.-]+/[\w.-]+)/blob/main/(\S+\.ipynb)\)", TEXT)
    assert badge == [(repository, "experiments/explore.ipynb")]
    calls = []

    def run(command, **options):
        calls.append(command)
        return type("Done", (), {"returncode": len(calls) - 1})

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    exec(SOURCES[0], {})  # installed, as far as this process is concerned
    assert not calls
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(SOURCES[0], {})
    assert calls == [[sys.executable, "-m", "pip", "install", "--quiet", f"git+https://github.com/{repository}"]]
    with pytest.raises(SystemExit, match="Set REPOSITORY"):
        exec(SOURCES[0], {})
    monkeypatch.chdir(ROOT / "experiments")
    exec(SOURCES[0], {})
    assert sys.path[0] == str(ROOT) and len(calls) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "alexnet_jax is that of the checkout"


def test_the_notebook_is_committed_with_its_outputs():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))  # once, from top to bottom
    pictures = 0
    for cell in CODE:
        assert cell["outputs"], "".join(cell["source"])
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data", "execute_result")
            assert output.get("name", "stdout") == "stdout", output
            pictures += not {"image/png", "image/jpeg"}.isdisjoint(output.get("data", {}))
        text = "".join("".join(output.get("text", [])) for output in cell["outputs"])
        assert not re.search(r"/home/|/tmp/|/work/|/root/|Warning|Traceback|left out", text), text
    assert pictures >= 18
    assert NOTEBOOK.stat().st_size < 1 << 20


def test_every_question_has_an_answer_that_is_folded():
    questions = TEXT.count("**Question.**")
    assert questions >= 12
    assert questions == TEXT.count("<details><summary>Answer</summary>\n\n") == TEXT.count("\n\n</details>")


def test_the_cells_are_short():
    assert max(len(source.splitlines()) for source in SOURCES) <= 40
    assert all(len(line) <= 120 for source in SOURCES for line in source.splitlines())
