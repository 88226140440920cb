"""The flags --config=NAME, --config=FILE and --config.FIELD=VALUE, and their errors in one line."""

import difflib
import functools
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from alexnet_jax.configs import default
from alexnet_jax.errors import one_line

CONFIGS = Path(__file__).parent / "configs"
FLAG_ERRORS = (
    flags.Error,
    AttributeError,
    ImportError,
    KeyError,
    NameError,
    TypeError,
    ValueError,
    OSError,
    SyntaxError,
)
_TYPES = {
    int: "a whole number", float: "a number", bool: "True or False", str: "text", tuple: "values separated by commas"
}  # fmt: skip


def without_none(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the command line without flags `--config.FIELD=None`, and these fields: absl has no None for a field.

    Only fields that are None in the default config are taken out; the others keep their error.
    """
    optional = [name for name, value in default.get_config().items() if value is None]
    pattern = re.compile(rf"--?config\.({'|'.join(optional)})=None")
    fields = [match.group(1) for argument in argv if (match := pattern.fullmatch(argument))]
    return [argument for argument in argv if not pattern.fullmatch(argument)], fields


def config_names() -> list[str]:
    """Return the names of the package's configs, which `--config` takes."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in ("__init__", "default"))


def config_file(value: str) -> str:
    """Return the file of a value of `--config`: of NAME or NAME:VARIANT that of the package, otherwise the value."""
    name, *variant = value.split(":")
    return ":".join([str(CONFIGS / f"{name}.py"), *variant]) if name in config_names() else value


def with_config_file(argv: Sequence[str]) -> list[str]:
    """Return the command line with the file of `--config`, as `config_file` names it."""
    argv = list(argv)
    for i, argument in enumerate(argv):
        if match := re.fullmatch(r"(--?config)=(.*)", argument):
            argv[i] = f"{match[1]}={config_file(match[2])}"
        elif argument in ("--config", "-config") and i + 1 < len(argv):
            argv[i + 1] = config_file(argv[i + 1])
    return argv


def flag_error(error: Exception, argv: Sequence[str]) -> str:
    """Return the text of an error of absl or ml_collections on one line, with what was expected.

    Args:
      error: one of `FLAG_ERRORS`.
      argv: the command line that raised it, as it was given.
    """
    if isinstance(error, AttributeError | KeyError):
        return _unknown_field_error(error, argv)
    message = one_line(error, 1000)
    if message.startswith("flag --workdir=None"):
        return "--workdir is missing: expected the run's working directory, as in --workdir runs/"
    if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", message):
        name, text = match.groups()
        *parents, field = name.split(".")
        config = functools.reduce(getattr, parents, default.get_config())
        if (field_type := config.get_type(field)) not in _TYPES:
            fields = ", ".join(f"config.{name}.{k}" for k in config[field])
            return f"config.{name}={text!r}: expected its fields, {fields}"
        return f"config.{name}={text!r}: expected {_TYPES[field_type]}"
    if match := re.match(r"Found (--config\.[\w.]+)=", message):
        return f"{match[1]} is before --config; give --config first, then its fields"
    value = _config_value(argv)
    path = config_file(value)
    if isinstance(error, ImportError | NameError):
        return f"--config={value}: {message}"
    if message.startswith(("flag --config=", "Configuration is not available")):
        reason = re.split(r"Error: |path\]: |failure to load: ", message)[-1]  # the last line of a traceback
        reason = reason.removeprefix(path).lstrip().removeprefix(f"{Path(path).name}: ")
        reason = re.sub(r"^\[Errno \d+\] ", "", reason).removesuffix(f": {path!r}")
        return f"--config={value}: {reason} (expected a file or one of {', '.join(config_names())})"
    return message


def _config_value(argv: Sequence[str]) -> str:
    """Return the value of the flag --config, "" if there is none."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.fullmatch(r"--?config(=(.*))?", argument):
            return match[2] if match[1] else following
    return ""


def _unknown_field_error(error: Exception, argv: Sequence[str]) -> str:
    config = default.get_config()
    fields = sorted({*config, *(f"mesh.{name}" for name in config.mesh)} - {"mesh"})
    names = [name for name in re.findall(r"--config\.([\w.]+)", " ".join(argv)) if name not in fields]
    if not names:
        reason = one_line(error).removeprefix("module 'config_config' ")
        return f"--config={_config_value(argv)}: {reason}; expected a Python file with a function get_config"
    parent, _, field = names[0].rpartition(".")
    names_by_field = {name.rpartition(".")[2]: name for name in fields if parent in ("", name.rpartition(".")[0])}
    names_by_field = names_by_field or {name: name for name in fields}
    if similar := difflib.get_close_matches(field, names_by_field, n=1):
        return f"config.{names[0]}: no such field. Did you mean config.{names_by_field[similar[0]]}?"
    return f"config.{names[0]}: no such field. The fields are {', '.join(names_by_field.values())}"
