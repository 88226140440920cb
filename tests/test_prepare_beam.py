import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from runners import ROOT, SHARD, files_of

from alexnet_jax.preparation.local import prepare
from alexnet_jax.preparation.sources import PrepareError

pytest.importorskip("apache_beam", reason='Beam needs pip install -e ".[beam]"')

from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402

from alexnet_jax.preparation import beam  # noqa: E402

LOCAL = ("--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing")


@pytest.fixture(scope="module")
def by_beam(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("beam")
    beam.prepare("small", str(image_folder), f"{out}/", shard_size=SHARD, options=PipelineOptions(LOCAL))
    return out / "small_256" / "1.0.0"


def test_the_bytes_are_those_of_one_machine(prepared, by_beam):
    assert len(files_of(by_beam)) == 10 + 5  # 8 shards to train, 2 to validate
    assert files_of(by_beam) == files_of(prepared)


def test_from_a_tfds_data_set_with_other_shard_boundaries(prepared, tmp_path):
    source = str(prepared.parents[1])
    ours = beam.prepare("small_256", source, str(tmp_path / "ours"), shard_size=12)
    theirs = prepare("small_256", source, tmp_path / "theirs", shard_size=12)
    assert files_of(theirs.parents[2] / "ours" / "small_256_256" / "1.0.0") == files_of(theirs)
    assert tfds.builder_from_directory(ours).info.splits["train"].num_shards == 5


def test_the_command_line(image_folder, tmp_path):
    command = [sys.executable, "-m", "alexnet_jax.prepare_beam", "--dataset=small", f"--data_dir={image_folder}"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}", "--runner=DirectRunner"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "3 files could not be decoded" in done.stdout
    assert f"train with --config.dataset=small_256 --config.data_dir={tmp_path}" in done.stdout


def test_too_many_files_that_cannot_be_decoded(image_folder, tmp_path):
    with pytest.raises(PrepareError, match="3 files cannot be decoded, more than --max_undecodable=2;.*\n  train/a/n"):
        beam.prepare("small", str(image_folder), str(tmp_path), max_undecodable=2)
    folder = tmp_path / "small_256" / "1.0.0"
    assert not (folder / "dataset_info.json").exists()
    assert len((folder / "undecodable.txt").read_text().splitlines()) == 3


def test_already_prepared_with_more_undecodable_files_than_now_allowed(image_folder, by_beam):
    with pytest.raises(PrepareError, match=f"3 files .*=2; repair or remove them, delete {by_beam},"):
        beam.prepare("small", str(image_folder), str(by_beam.parents[1]), max_undecodable=2)


def test_out_inside_a_folder_of_images(image_folder):
    with pytest.raises(PrepareError, match="name an --out outside of it"):
        beam.prepare("small", str(image_folder), str(image_folder / "out"))


def test_nothing_to_prepare(tmp_path):
    with pytest.raises(PrepareError, match="expected small/, a TFDS data set, or train/CLASS/IMAGE"):
        beam.prepare("small", str(tmp_path), str(tmp_path / "out"))
