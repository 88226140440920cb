"""A working directory against a second run and on a file system without locks; which file an error names."""

import errno
import fcntl
import json
import logging

import pytest
from runners import tiny_config

from alexnet_jax import train
from alexnet_jax.config import as_json
from alexnet_jax.train import train_and_evaluate
from alexnet_jax.workdir import WorkdirError, claimed


@pytest.mark.parametrize("learning_rate,same", [(0.02, True), (0.05, False)])
def test_what_another_run_wrote_during_the_set_up_is_neither_resumed_nor_overwritten(
    synthetic, tmp_path, monkeypatch, learning_rate, same
):
    first = tiny_config(learning_rate=0.02, num_train_steps=2)
    set_up, files = train.setup, {}

    def slow_setup(config, mean):
        monkeypatch.setattr(train, "setup", set_up)
        files["result"] = train_and_evaluate(first, tmp_path)  # from start to end
        files["before"] = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
        return set_up(config, mean)

    monkeypatch.setattr(train, "setup", slow_setup)
    second = tiny_config(learning_rate=learning_rate, num_train_steps=2)
    if same:
        assert train_and_evaluate(second, tmp_path) == files["result"]
        (changed,) = {p.name for p, time in files["before"].items() if p.stat().st_mtime_ns != time} or {"config.json"}
        assert changed == "config.json"
    else:
        with pytest.raises(WorkdirError, match="learning_rate: 0.02 in the workdir, 0.05 given"):
            train_and_evaluate(second, tmp_path)
        assert all(p.stat().st_mtime_ns == time for p, time in files["before"].items())
    assert json.loads((tmp_path / "config.json").read_text())["learning_rate"] == 0.02


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    def flock(file, operation):
        raise OSError(number, "not here")

    monkeypatch.setattr(fcntl, "flock", flock)
    config = as_json(tiny_config())
    with caplog.at_level(logging.WARNING), claimed(tmp_path / "run", config):
        assert json.loads((tmp_path / "run" / "config.json").read_text()) == config
    assert f"{tmp_path / 'run'} is on a file system without locks" in caplog.text


@pytest.mark.parametrize("error,words,advice", [
    (lambda folder: OSError(errno.EMFILE, "Too many open files", "/data/shard"), "/data/shard", "ulimit -n"),
    (lambda folder: PermissionError(errno.EACCES, "Permission denied", "/data/shard"), "/data/shard", "repair that"),
    (lambda folder: OSError(errno.ENOSPC, "No space left", str(folder / "metrics.jsonl")), "--workdir=", "free some"),
    (lambda folder: OSError(errno.ENOSPC, "No space left"), "--workdir=", "free some space"),
])  # fmt: skip
def test_an_error_of_the_system_names_its_own_file(tmp_path, error, words, advice):
    with pytest.raises(WorkdirError, match=advice) as raised, claimed(tmp_path, as_json(tiny_config())):
        raise error(tmp_path)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert ("--workdir" in str(raised.value)) == (words == "--workdir=")
