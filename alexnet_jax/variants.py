"""The differences between the published variants of the network, as data; `configs.imagenet2012` has their training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
BEFORE = ":pre"  # after the name of a layer: its output before the activation
IMAGENET_MEAN = (123.675, 116.28, 103.53)  # torchvision's, of 0 to 255, in RGB
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


class Stem(NamedTuple):
    """The first convolution: a square kernel, its stride, and the zero padding on every side."""

    kernel: int = 11
    stride: int = 4
    padding: int = 0


class Variant(NamedTuple):
    """One published variant of the network; the defaults are the paper's.

    `stem`, `widths` and `towers` are those of an `AlexNet` that does not set them. `conv1` … `conv5` list what follows
    each convolution, in order: `relu` (the activation, whichever it is), `lrn`, `contrast_norm` (the spatial
    normalization of the original code) and `pool`.
    """

    stem: Stem = Stem()
    widths: tuple[int, ...] = (96, 256, 384, 384, 256, 4096, 4096)  # conv1 … conv5, fc6, fc7
    towers: int = 2
    ceil_mode: bool = True  # conv1's output size is rounded up: zeros are added at the right and bottom edge
    conv1: str = "relu lrn pool"
    conv2: str = "relu lrn pool"
    conv3: str = "relu"
    conv4: str = "relu"
    conv5: str = "relu pool"
    lrn: tuple[float, int, float, float] = (2.0, 5, 1e-4, 0.75)  # k, n, α, β (section 3.3)
    lrn_across_towers: bool = False
    contrast_norm: tuple[int, float, float, float] = (5, 0.001, 0.75, 1.0)  # size, scale, power, minDiv
    inverted_dropout: bool = False  # True: outputs are scaled up in training; False: down in testing (section 4.2)
    dropout_on_inputs: bool = False  # of fc6 and fc7, or on their outputs
    # conv1 … fc8: the initial kernels are N(0, std²), the biases constant (section 5).
    kernel_std: tuple[float, ...] = (0.01,) * 8
    bias: tuple[float, ...] = (0, 1, 0, 1, 1, 1, 1, 0)

    def operations(self, layer: str, omitted: bool = False) -> list[str]:
        """Return what follows a convolution, in order; of an omitted one the pooling alone remains."""
        operations = getattr(self, layer).split()
        return [operation for operation in operations if operation == "pool"] if omitted else operations


VARIANTS = {
    "paper": Variant(),
    # The original code as the Computer History Museum released it: layers-145.cfg and layer-params-145.cfg.
    "source2012": Variant(
        conv1="lrn pool relu",
        conv2="relu lrn contrast_norm pool",
        conv5="pool relu",
        lrn=(2.0, 5, 1e-4 / 5, 0.75),  # the code divides its scale by n
        kernel_std=(0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
    ),
    # Caffe's models/bvlc_alexnet, which most weights in circulation come from.
    "caffe": Variant(
        ceil_mode=False,
        lrn=(1.0, 5, 1e-4 / 5, 0.75),
        lrn_across_towers=True,
        inverted_dropout=True,
        kernel_std=(0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
        bias=(0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0),
    ),
    # torchvision's models.alexnet: the single tower of Krizhevsky's "One weird trick" (2014), with fewer kernels.
    "torchvision": Variant(
        stem=Stem(11, 4, 2),
        widths=(64, 192, 384, 256, 256, 4096, 4096),
        towers=1,
        ceil_mode=False,
        conv1="relu pool",
        conv2="relu pool",
        inverted_dropout=True,
        dropout_on_inputs=True,
        # PyTorch draws from ±1 / √(inputs of a unit); these are the standard deviations. Its biases are drawn likewise.
        kernel_std=tuple((3 * inputs) ** -0.5 for inputs in (363, 1600, 1728, 3456, 2304, 9216, 4096, 4096)),
        bias=(0,) * 8,
    ),
}
