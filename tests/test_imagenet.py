"""ImageNet from its two archives to the test errors: the real parts, by the commands of docs/imagenet.md."""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from runners import PHOTOGRAPHS, ROOT, assert_same_state

from alexnet_jax.data.images import to_square

pytestmark = pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason="no photographs in $ALEXNET_TEST_DATA")
BUILDER = ("tensorflow", "apache_beam", "mlcroissant")
needs_builder = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, BUILDER)), reason='TFDS\'s builder needs pip install -e ".[tfds]"'
)
# Two of the names that TFDS's builder repairs: a CMYK image, and a PNG that is called JPEG.
CMYK, PNG = "n02077923_14822.JPEG", "n02105855_2933.JPEG"
# The classes of the first three validation images.
FIRST_LABELS = ["n01751748", "n09193705", "n02105855"]


def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def encoded(path, mode, file_format):
    file = io.BytesIO()
    with Image.open(path) as image:
        image.convert(mode).save(file, file_format)
    return file.getvalue()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """ILSVRC2012's two archives with 40 images to train, each in the archive of its class, and 10 to validate."""
    folder = tmp_path_factory.mktemp("archives")
    photographs = {path.name[:9]: path for path in sorted(PHOTOGRAPHS.iterdir())}
    chosen = sorted({*list(photographs)[::5], CMYK[:9], PNG[:9]})[:40]
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as archive:
        for synset in chosen:
            path, inner = photographs[synset], io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as of_class:
                if synset == CMYK[:9]:
                    add(of_class, CMYK, encoded(path, "CMYK", "JPEG"))
                elif synset == PNG[:9]:
                    add(of_class, PNG, encoded(path, "RGB", "PNG"))
                else:
                    add(of_class, f"{synset}_1.JPEG", path.read_bytes())
            add(archive, f"{synset}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for number, synset in list(enumerate(chosen[:10], 1))[::-1]:  # not in the order of their names
            add(archive, f"ILSVRC2012_val_{number:08}.JPEG", photographs[synset].read_bytes())
    return folder


def documented(word, **paths):
    """The arguments of the command in docs/imagenet.md that begins with `word`, its capital letters filled in."""
    lines = (ROOT / "docs" / "imagenet.md").read_text().replace("\\\n", "")
    line = re.search(rf"^{word}.*$", lines, re.M).group()
    program, *arguments = re.sub("[A-Z]{3,}", lambda m: str(paths.get(m.group(), m.group())), line).split()
    return [{"python": sys.executable}.get(program, str(Path(sys.executable).with_name(program))), *arguments]


def run(command, **environment):
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_builder
def test_from_the_archives_to_the_test_errors(archives, tmp_path):
    paths = {"ARCHIVES": archives, "DATA": tmp_path / "data", "RUN": tmp_path / "run"}
    run(documented("tfds build", **paths))
    built = tfds.builder("imagenet2012", data_dir=tmp_path / "data")
    assert built.info.features["label"].num_classes == 1000

    (tmp_path / "forbidden" / "tensorflow").mkdir(parents=True)
    (tmp_path / "forbidden" / "tensorflow" / "__init__.py").write_text("raise SystemExit('imports TensorFlow')")
    without = {"PYTHONPATH": str(tmp_path / "forbidden")}
    output = run(documented("python -m alexnet_jax.prepare", **paths), **without)
    assert "0 files could not be decoded" in output
    prepared = tfds.builder("imagenet2012_256", data_dir=tmp_path / "data")
    names = prepared.info.features["label"].names
    examples = {x["file_name"].decode(): x for split in ("train", "validation") for x in prepared.as_data_source(split)}
    assert len(examples) == 50
    for name, example in examples.items():
        if not name.startswith("ILSVRC"):
            assert names[example["label"]] == name[:9]
    for number, synset in enumerate(FIRST_LABELS, 1):
        assert names[examples[f"ILSVRC2012_val_{number:08}.JPEG"]["label"]] == synset
    for name in (CMYK, PNG):
        original = to_square(next(PHOTOGRAPHS.glob(f"{name[:9]}*")).read_bytes())
        assert np.abs(examples[name]["image"].astype(int) - original).mean() < 6, name

    train = documented("python -m alexnet_jax.main .*--config=imagenet2012 ", **paths)
    train += ["--config.widths=8,16,16,16,16,32,32", "--config.batch_size=8", "--config.num_train_steps=30"]
    train += ["--config.eval_every=10", "--config.log_every=1"]
    process = subprocess.Popen(
        train, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **without}
    )
    for line in process.stdout:
        if line.startswith("step 15/"):
            break
    process.kill()
    process.wait()
    output = run(train, **without)
    # From step 20 where the reader of its lines was late.
    assert re.search("resuming from the checkpoint of step [12]0", output) and "1000 classes" in output
    uninterrupted = [word.replace(str(paths["RUN"]), str(tmp_path / "uninterrupted")) for word in train]
    run(uninterrupted, **without)
    assert_same_state(paths["RUN"], tmp_path / "uninterrupted", 30)
    result = json.loads((paths["RUN"] / "result.json").read_text())
    assert result["test_crops"] == 10 and 0 < result["test_top5_error"] <= result["test_top1_error"]

    output = run(documented("python -m alexnet_jax.evaluate", **paths), **without)
    assert re.search("ten .*40.7 %.*18.2 %", output)  # table 2
    tested = json.loads((paths["RUN"] / "evaluation.json").read_text())
    assert tested["split"] == "validation" and tested["examples"] == 10
    assert tested["networks"] == [{"workdir": str(paths["RUN"]), "step": 30}]
    assert [tested["ten"][k] for k in ("top1_error", "top5_error")] == [
        result["test_top1_error"], result["test_top5_error"]
    ]  # fmt: skip


def test_the_full_network_memorizes_photographs(tmp_path):
    for path in sorted(PHOTOGRAPHS.iterdir())[::25]:
        file = tmp_path / "photographs" / "train" / path.name[:9] / path.name
        file.parent.mkdir(parents=True)
        file.write_bytes(path.read_bytes())
    paths = {"PHOTOGRAPHS": tmp_path / "photographs", "DATA": tmp_path / "data", "RUN": tmp_path / "run"}
    run(documented("python -m alexnet_jax.prepare --dataset photographs", **paths))
    train = documented("python -m alexnet_jax.main .*photographs_256", **paths)
    train += ["--config.batch_size=8", "--config.num_train_steps=60", "--config.learning_rate=0.003"]
    output = run([*train, "--config.warmup_steps=10"])
    assert re.search(r"fc6 .*37,752,832", output) and re.search("steps +60 of 8 images", output)
    metrics = [json.loads(line) for line in (paths["RUN"] / "metrics.jsonl").read_text().splitlines()]
    losses = [m["train_loss"] for m in metrics if "train_loss" in m]
    assert losses[0] == pytest.approx(np.log(8), rel=0.2)  # all classes alike
    last = next(m for m in reversed(metrics) if "validation_loss" in m)
    assert last["validation_loss"] < 0.5 and last["validation_top1_error"] <= 1 / 8  # on the center crop
    result = json.loads((paths["RUN"] / "result.json").read_text())
    assert result["test_crops"] == 10 and result["test_top1_error"] <= 1 / 8
    shutil.rmtree(paths["RUN"])  # a checkpoint is half a gigabyte
