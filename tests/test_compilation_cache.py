"""The second start finds its programs, and computes the same with them: real processes."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from runners import ROOT, TINY, run_main, saved_state

# Without the settings of these tests.
USERS = {name: value for name, value in os.environ.items() if "CACHE" not in name}


def entries(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_the_second_start_compiles_nothing_and_ends_the_same(synthetic, tmp_path):
    def run(workdir):
        flags = (*TINY, "--config.num_train_steps=10", f"--compile_cache={tmp_path}/programs")
        code, output = run_main(workdir, *flags, env=USERS)
        assert code == 0, output
        return saved_state(workdir, 10)

    compiled = run(tmp_path / "first")
    programs = entries(tmp_path / "programs")
    assert any(name.startswith("jit_train_step-") for name in programs)
    second = run(tmp_path / "second")
    assert entries(tmp_path / "programs") == programs  # each program that is compiled is written there
    for path, leaf in compiled.items():
        np.testing.assert_array_equal(second[path], leaf, path)


COMPILE = """
import sys, jax
from alexnet_jax.runtime.compilation_cache import use_compilation_cache
use_compilation_cache(eval(sys.argv[1]))
print(jax.jit(lambda x: x + 1)(1))
"""


@pytest.mark.parametrize("folder,environment,written", [
    (None, {}, "xdg/alexnet_jax"),
    (None, {"JAX_COMPILATION_CACHE_DIR": "{}/jax"}, "jax"),
    ("{}/flag", {"JAX_COMPILATION_CACHE_DIR": "{}/jax"}, "flag"),
    ("", {"JAX_COMPILATION_CACHE_DIR": "{}/jax"}, None),
    ("{}/file/cache", {"JAX_COMPILATION_CACHE_DIR": "{}/jax"}, None),
])  # fmt: skip
def test_where_programs_are_kept(tmp_path, folder, environment, written):
    (tmp_path / "file").write_text("")
    environment = {**environment, "XDG_CACHE_HOME": "{}/xdg"}
    environment = {name: value.format(tmp_path) for name, value in environment.items()}
    command = [sys.executable, "-c", COMPILE, repr(folder and folder.format(tmp_path))]
    done = subprocess.run(command, cwd=ROOT, env=USERS | environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2\n", done.stderr
    assert {str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("jit_*-cache")} == ({written} - {None})
    if folder == "{}/file/cache":
        warning = f"--compile_cache={tmp_path}/file/cache: Not a directory; programs are not cached\n"
        assert done.stderr == warning
    else:
        assert not done.stderr


def test_an_entry_that_is_torn_or_cannot_be_written_is_replaced_with_one_line(tmp_path):
    def sizes():
        return {path.name: path.stat().st_size for path in (tmp_path / "programs").iterdir()}

    def compile_it(**popen):
        command = [sys.executable, "-c", COMPILE, repr(f"{tmp_path}/programs")]
        done = subprocess.run(command, cwd=ROOT, env=USERS, capture_output=True, text=True, timeout=120, **popen)
        assert done.stdout == "2\n", done.stderr
        return done.stderr

    assert compile_it() == ""
    sound = sizes()
    (entry,) = (tmp_path / "programs").glob("jit__lambda*")
    os.truncate(entry, entry.stat().st_size // 2)
    warning = compile_it()
    assert warning.startswith(f"Warning: a compiled program in {tmp_path}/programs cannot be read (")
    assert warning.count("\n") == 1 and "jit__lambda is compiled again" in warning
    assert sizes() == pytest.approx(sound, rel=0.1)
    before = entries(tmp_path / "programs")
    assert compile_it() == "" and entries(tmp_path / "programs") == before
    entry.unlink()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # noqa: E731
    warning = compile_it(preexec_fn=limit)  # as on a full disk, which leaves a part of the file
    assert "cannot be written (" in warning and warning.count("\n") == 1 and not entry.exists()


def test_a_user_without_a_home_directory_is_warned(tmp_path):
    unknown_uid = "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid\n"
    environment = {name: value for name, value in USERS.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", unknown_uid + COMPILE, "None"], cwd=tmp_path, capture_output=True, text=True,
        timeout=120, env={**environment, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "2\n" and not list(tmp_path.iterdir())
    assert done.stderr == "--compile_cache=~/.cache/alexnet_jax: no home directory; programs are not cached\n"
