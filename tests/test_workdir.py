"""A run's working directory: which file an error names."""

import errno

import pytest
from runners import tiny_config

from alexnet_jax.config import as_json
from alexnet_jax.workdir import WorkdirError, claimed


@pytest.mark.parametrize("error,words,advice", [
    (lambda folder: OSError(errno.EMFILE, "Too many open files", "/data/shard"), "/data/shard", "ulimit -n"),
    (lambda folder: PermissionError(errno.EACCES, "Permission denied", "/data/shard"), "/data/shard", "mend that file"),
    (lambda folder: OSError(errno.ENOSPC, "No space left", str(folder / "metrics.jsonl")), "--workdir=", "free some"),
    (lambda folder: OSError(errno.ENOSPC, "No space left"), "--workdir=", "free some space"),
])  # fmt: skip
def test_an_error_of_the_system_names_its_own_file(tmp_path, error, words, advice):
    with pytest.raises(WorkdirError, match=advice) as raised, claimed(tmp_path, as_json(tiny_config())):
        raise error(tmp_path)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert ("--workdir" in str(raised.value)) == (words == "--workdir=")
