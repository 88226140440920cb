"""Write a network for other programs: python -m alexnet_jax.export RUN_OR_FILE OUT.{safetensors,onnx,stablehlo}"""

import argparse
import sys
from pathlib import Path

from alexnet_jax.checkpoint import silence_orbax
from alexnet_jax.errors import UserError, one_line
from alexnet_jax.runtime.files import user_path
from alexnet_jax.runtime.output import command_name, escape_output
from alexnet_jax.weights import Weights, WeightsError, load_weights, write_native
from alexnet_jax.weights.to_onnx import write_onnx
from alexnet_jax.weights.to_stablehlo import write_stablehlo
from alexnet_jax.weights.to_torch import write_torch

SUFFIXES = (".safetensors", ".onnx", ".stablehlo")


def check_out(out: Path, keys: str, with_preprocessing: bool) -> None:
    """Raise WeightsError for a file that cannot be written, or flags that its format does not have."""
    if out.suffix not in SUFFIXES:
        raise WeightsError(f"{out}: expected a name that ends in {', '.join(SUFFIXES)}")
    if keys and out.suffix != ".safetensors":
        raise WeightsError(f"--keys={keys}: {out.suffix} has no keys; name a .safetensors file")
    if with_preprocessing and out.suffix == ".safetensors":
        raise WeightsError(
            "--with_preprocessing: a .safetensors file has arrays, not operations; name an .onnx or .stablehlo file"
        )
    if out.is_dir() or not out.parent.is_dir():
        raise WeightsError(f"{out}: expected a file in an existing folder")


def export(weights: Weights, out: Path, keys: str = "", with_preprocessing: bool = False) -> None:
    """Write weights in the format of a file's suffix, the complete file or nothing.

    Args:
      out: ends in one of `SUFFIXES`; an existing file is replaced.
      keys: of a .safetensors file: "torch" for those of torchvision's alexnet, "" for this project's.
      with_preprocessing: whether an .onnx or .stablehlo file takes pixels, as `write_onnx` and `write_stablehlo` say.

    Raises:
      WeightsError: as `check_out`; a network that torchvision does not have; the file cannot be written.
    """
    check_out(out, keys, with_preprocessing)
    try:
        if out.suffix == ".onnx":
            write_onnx(weights, out, with_preprocessing)
        elif out.suffix == ".stablehlo":
            write_stablehlo(weights, out, with_preprocessing)
        elif keys:
            write_torch(weights, out)
        else:
            write_native(weights, out)
    except OSError as error:
        raise WeightsError(f"{out} cannot be written: {one_line(error)}") from None


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=command_name("alexnet_jax.export"), description=__doc__.splitlines()[0])
    parser.add_argument("weights", metavar="RUN_OR_FILE", help="a run's workdir, or a file of weights")
    parser.add_argument(
        "out", metavar="OUT", help="the file to write; its suffix is its format: " + ", ".join(SUFFIXES)
    )
    parser.add_argument("--keys", choices=("torch",), default="", help="the keys and layout of torchvision's alexnet")
    parser.add_argument(
        "--with_preprocessing", action="store_true",
        help="the .onnx or .stablehlo takes uint8 pixels [B, H, W, C], and has the center crop, mean and scale inside",
    )  # fmt: skip
    flags = parser.parse_args()
    escape_output()
    silence_orbax()
    try:
        path, out = user_path(flags.weights, "RUN_OR_FILE"), user_path(flags.out, "OUT")
        check_out(out, flags.keys, flags.with_preprocessing)
        if out.exists() and path.exists() and out.samefile(path):
            raise WeightsError(f"{out} is the file that is read; name another")
        export(load_weights(path), out, flags.keys, flags.with_preprocessing)
    except (UserError, OSError) as error:
        sys.exit(f"Error: {error}")
    print(f"Written to {out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
