"""The second start finds its programs, and computes the same with them: real processes."""

import os

import numpy as np
import pytest
from conftest import TINY, run_main, saved_state

SHORT = (*TINY, "--config.num_train_steps=10", "--config.mesh.data=1", "--config.mesh.cpu_devices=1")


def entries(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A user's, with a cache folder of its own and none of these tests' settings: (variables, that folder)."""
    home = tmp_path_factory.mktemp("cache")
    kept = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    return {**kept, "XDG_CACHE_HOME": str(home)}, home / "alexnet_jax"


def test_the_second_start_compiles_nothing_and_ends_the_same(fashion_mnist, environment, tmp_path):
    variables, cache = environment
    code, output = run_main(tmp_path / "first", *SHORT, env=variables)
    assert code == 0, output
    programs = entries(cache)
    assert any(name.startswith("jit_train_step-") for name in programs)
    code, output = run_main(tmp_path / "second", *SHORT, env=variables)
    assert code == 0, output
    assert entries(cache) == programs  # each program that is compiled is written there
    ours, theirs = saved_state(tmp_path / "second", 10), saved_state(tmp_path / "first", 10)
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf, path)


def test_the_flag_moves_it_and_stops_it(fashion_mnist, environment, tmp_path):
    variables, _ = environment
    variables = {**variables, "XDG_CACHE_HOME": f"{tmp_path}/user", "JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/jax"}
    code, output = run_main(tmp_path / "stopped", *SHORT, "--compile_cache=", env=variables)
    assert code == 0 and not (tmp_path / "user").exists() and not (tmp_path / "jax").exists(), output
    code, output = run_main(tmp_path / "moved", *SHORT, f"--compile_cache={tmp_path}/here", env=variables)
    assert code == 0 and entries(tmp_path / "here") and not (tmp_path / "jax").exists(), output


def test_a_folder_that_cannot_be_written_is_one_line_of_warning(fashion_mnist, environment, tmp_path):
    (tmp_path / "file").write_text("")
    code, output = run_main(tmp_path / "run", *SHORT, f"--compile_cache={tmp_path}/file/cache", env=environment[0])
    warnings = [line for line in output.splitlines() if "cache" in line]
    assert code == 0 and len(warnings) == 1 and "Not a directory; programs are compiled anew" in warnings[0], output
