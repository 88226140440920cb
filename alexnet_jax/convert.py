"""Convert a file of weights: python -m alexnet_jax.convert IN OUT.safetensors

IN is AlexNet in a format of torch, Caffe, ONNX, NumPy or MatConvNet, or a run's workdir. OUT has the parameters, the
network's description, the mean image and the class names, and is read wherever a workdir is.
"""

import argparse
import logging
import sys
from pathlib import Path

from alexnet_jax.errors import UserError, one_line
from alexnet_jax.runtime.files import user_path
from alexnet_jax.runtime.output import command_name, escape_output, escaped
from alexnet_jax.summary import layer_summary
from alexnet_jax.weights import Weights, load_weights, write_native

SHOWN = 3  # class names


def description(weights: Weights) -> str:
    """Return a text of what a file of weights holds: format, layers, image preparation, classes, source."""
    model, preprocess, source = weights.model, weights.preprocess, weights.source
    names = weights.class_names
    classes = "no names" if names is None else ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)
    height, width, channels = preprocess.mean.shape
    return "\n".join(
        (
            f"recognized: {source.format or 'alexnet_jax'}, variant {model.variant}, {model.towers} tower"
            + "s" * (model.towers > 1),
            layer_summary(model, preprocess.image_shape),
            f"images: {height}×{width}×{channels}, resized as {weights.resizing!r}, crop {preprocess.crop}",
            f"classes: {model.num_classes} ({classes})",
            f"source: {escaped(source.file)}" + f", SHA-256 {source.sha256}" * bool(source.sha256),
        )
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog=command_name("alexnet_jax.convert"), description=__doc__.splitlines()[0])
    parser.add_argument("input", metavar="IN", help="a file of weights, or a run's workdir")
    parser.add_argument("out", metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--mean", help="Caffe's imagenet_mean.binaryproto, for a file of Caffe's network")
    flags = parser.parse_args()
    escape_output()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        out = user_path(flags.out, "OUT")
        check_out(out)
        weights = load_weights(flags.input, flags.mean)
        print(description(weights))
        write_native(weights, out)
    except UserError as error:
        sys.exit(f"Error: {escaped(str(error))}")
    except OSError as error:
        sys.exit(f"Error: {escaped(str(out))} cannot be written: {one_line(error)}")
    print(f"Written to {escaped(str(out))}")


def check_out(out: Path) -> None:
    """Raise UserError unless a .safetensors file can be written there."""
    if out.suffix != ".safetensors" or not out.parent.is_dir() or out.is_dir():
        raise UserError(f"{out}: expected a .safetensors file in an existing folder")


if __name__ == "__main__":
    main()
