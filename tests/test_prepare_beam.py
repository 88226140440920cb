import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from conftest import ROOT
from test_prepare import SHARD, files_of, folder, prepared  # noqa: F401

from alexnet_jax import prepare
from alexnet_jax.prepare import PrepareError

pytest.importorskip("apache_beam", reason='Beam needs pip install -e ".[beam]"')

from apache_beam.options.pipeline_options import PipelineOptions  # noqa: E402

from alexnet_jax import prepare_beam  # noqa: E402

LOCAL = ("--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing")


@pytest.fixture(scope="module")
def by_beam(folder, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("beam")
    prepare_beam.prepare("small", str(folder), f"{out}/", shard_size=SHARD, options=PipelineOptions(LOCAL))
    return out / "small_256" / "1.0.0"


def test_the_bytes_are_those_of_one_machine(prepared, by_beam):  # noqa: F811
    assert len(files_of(by_beam)) == 10 + 5  # 8 shards to train, 2 to validate
    assert files_of(by_beam) == files_of(prepared)


def test_from_a_tfds_data_set_whose_shards_lie_otherwise(prepared, tmp_path):  # noqa: F811
    source = str(prepared.parents[1])
    ours = prepare_beam.prepare("small_256", source, str(tmp_path / "ours"), shard_size=12)
    theirs = prepare.prepare("small_256", source, tmp_path / "theirs", shard_size=12)
    assert files_of(theirs.parents[2] / "ours" / "small_256_256" / "1.0.0") == files_of(theirs)
    assert tfds.builder_from_directory(ours).info.splits["train"].num_shards == 5


def test_the_command_line(folder, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "alexnet_jax.prepare_beam", "--dataset=small", f"--data_dir={folder}"]
    done = subprocess.run(
        [*command, f"--out={tmp_path}", "--runner=DirectRunner"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "3 files could not be decoded" in done.stdout
    assert f"train with --config.dataset=small_256 --config.data_dir={tmp_path}" in done.stdout


def test_too_many_files_that_cannot_be_decoded(folder, tmp_path):  # noqa: F811
    with pytest.raises(PrepareError, match="3 files cannot be decoded, more than --max_undecodable=2;.*\n  train/a/n"):
        prepare_beam.prepare("small", str(folder), str(tmp_path), max_undecodable=2)
    made = tmp_path / "small_256" / "1.0.0"
    assert not (made / "dataset_info.json").exists()
    assert len((made / "undecodable.txt").read_text().splitlines()) == 3


def test_already_prepared_with_more_undecodable_files_than_now_allowed(folder, by_beam):  # noqa: F811
    with pytest.raises(PrepareError, match=f"3 files .*=2; repair or remove them, delete {by_beam},"):
        prepare_beam.prepare("small", str(folder), str(by_beam.parents[1]), max_undecodable=2)


def test_out_inside_a_folder_of_images(folder):  # noqa: F811
    with pytest.raises(PrepareError, match="name an --out outside of it"):
        prepare_beam.prepare("small", str(folder), str(folder / "out"))


def test_nothing_to_prepare(tmp_path):
    with pytest.raises(PrepareError, match="expected small/, a TFDS data set, or train/CLASS/IMAGE"):
        prepare_beam.prepare("small", str(tmp_path), str(tmp_path / "out"))
