"""The compact AlexNet on CIFAR-10: 28×28 crops of 32×32 images, horizontal flips, PCA lighting."""

import ml_collections

from alexnet_jax.configs import fashion_mnist


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    c = fashion_mnist.get_config()
    c.dataset = "cifar10"
    c.train_split = "train[:45000]"
    c.validation_split = "train[45000:]"
    c.pad = 0
    c.widths = (32, 64, 96, 96, 96, 1024, 1024)
    c.flip = True
    c.lighting = True
    c.num_epochs = 30.0
    c.plateau_patience = 4
    c.kernel_std = (0.27, *c.kernel_std[1:6], 0.053, 0.053)  # conv1 takes three channels, fc7 and fc8 1024 inputs
    return c
