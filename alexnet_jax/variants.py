"""What the published forms of AlexNet differ in, as data; model, optimizer, preprocess and the recipes read it here."""

from typing import NamedTuple


class Variant(NamedTuple):
    """One form of the network and of its training; the defaults are the paper's."""

    # The network.
    image_size: int = 224  # side of the crop from a 256×256 image
    rounds_up: bool = True  # conv1's last window may hang over the right and bottom edge, which reads as 0
    activation_after: tuple[str, ...] = ("conv1", "conv2", "conv3", "conv4", "conv5")
    lrn: tuple[float, int, float, float] = (2.0, 5, 1e-4, 0.75)  # k, n, α, β (section 3.3)
    lrn_sees_both_towers: bool = False
    spatial_norm_after: tuple[str, ...] = ()
    spatial_norm: tuple[int, float, float, float] = (5, 0.001, 0.75, 1.0)  # size, scale, power, minDiv
    dropout_rescales: bool = False  # what is kept is multiplied in training, or all outputs in testing (4.2)
    # conv1 … fc8: the initial kernels are N(0, std²), the biases constant (section 5).
    kernel_std: tuple[float, ...] = (0.01,) * 8
    bias: tuple[float, ...] = (0, 1, 0, 1, 1, 1, 1, 0)
    # The optimizer: the biases' ε and weight decay, relative to the kernels' (section 5).
    bias_rate: float = 1.0
    bias_decay: float = 1.0
    batch_size: int = 128
    drop_at_epochs: tuple[float, ...] = ()  # ε ÷ 10; none: when the validation error stops improving
    # Augmentation (section 4.1).
    last_place: bool = False  # whether a crop may end at the last row and column: 33² places of 224 in 256, or 32²
    chunk: int = 1  # consecutive images of a batch that share their crop's place and their flip
    lighting: bool = True
    lighting_power: float = 1.0  # α times λ to this power; one half: the standard deviation
    lighting_divisor: float = 1.0  # all pixels are divided by it after lighting
    ten_crop: bool = True  # the test patches; False: the central one


VARIANTS = {
    "paper": Variant(),
    # The original code as the Computer History Museum released it: layers-145.cfg and layer-params-145.cfg.
    "source2012": Variant(
        activation_after=("pool1", "conv2", "conv3", "conv4", "pool5"),
        lrn=(2.0, 5, 1e-4 / 5, 0.75),  # the code divides its scale by n
        spatial_norm_after=("norm2",),
        kernel_std=(0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01),
        bias_rate=2.0,
        bias_decay=0.0,
        drop_at_epochs=(25.0, 51.0, 79.0),
        last_place=True,
        chunk=32,
        lighting_power=0.5,
        lighting_divisor=1.1,
    ),
    # Caffe's models/bvlc_alexnet, which most weights in circulation come from.
    "caffe": Variant(
        image_size=227,
        rounds_up=False,
        lrn=(1.0, 5, 1e-4 / 5, 0.75),
        lrn_sees_both_towers=True,
        dropout_rescales=True,
        kernel_std=(0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01),
        bias=(0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0),
        bias_rate=2.0,
        bias_decay=0.0,
        batch_size=256,
        drop_at_epochs=(20.0, 40.0, 60.0, 80.0),  # every 100,000 steps
        last_place=True,
        lighting=False,
        ten_crop=False,
    ),
}


def variant_named(name: str) -> Variant:
    """The entry of `VARIANTS`; ValueError for a name that is not there."""
    if name not in VARIANTS:
        raise ValueError(f"variant={name!r}: unknown; the known variants are {', '.join(VARIANTS)}")
    return VARIANTS[name]
