"""Small networks, their parameters and images, and the paper's sizes."""

import jax
import jax.numpy as jnp

from alexnet_jax import AlexNet, Stem

# Section 3.5 and figure 2: the kernels, and the outputs of a 224×224 image.
KERNELS = {
    "conv1": (11, 11, 3, 96), "conv2": (5, 5, 48, 256), "conv3": (3, 3, 256, 384), "conv4": (3, 3, 192, 384),
    "conv5": (3, 3, 192, 256), "fc6": (9216, 4096), "fc7": (4096, 4096), "fc8": (4096, 1000),
}  # fmt: skip
MAPS = {
    "conv1": (55, 55, 96), "pool1": (27, 27, 96), "conv2": (27, 27, 256), "pool2": (13, 13, 256),
    "conv3": (13, 13, 384), "conv4": (13, 13, 384), "conv5": (13, 13, 256), "pool5": (6, 6, 256),
    "fc6": (4096,), "fc7": (4096,), "fc8": (1000,),
}  # fmt: skip
# torchvision's alexnet, as its module prints it; its grid is fc6's rows before they are flattened.
TORCHVISION_KERNELS = {
    "conv1": (11, 11, 3, 64), "conv2": (5, 5, 64, 192), "conv3": (3, 3, 192, 384), "conv4": (3, 3, 384, 256),
    "conv5": (3, 3, 256, 256), "fc6": (9216, 4096), "fc7": (4096, 4096), "fc8": (4096, 1000),
}  # fmt: skip
TORCHVISION_MAPS = {
    "conv1": (55, 55, 64), "pool1": (27, 27, 64), "conv2": (27, 27, 192), "pool2": (13, 13, 192),
    "conv3": (13, 13, 384), "conv4": (13, 13, 256), "conv5": (13, 13, 256), "pool5": (6, 6, 256),
    "fc6": (4096,), "fc7": (4096,), "fc8": (1000,),
}  # fmt: skip
SMALL = AlexNet(num_classes=6, stem=Stem(5, 2, 2), widths=(8, 12, 16, 8, 12, 20, 14), kernel_std=(0.3,) * 8)


def shapes(model, size, channels=3):
    """Return the shapes of a network's parameters for square images."""
    image = jnp.zeros((2, size, size, channels))
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def small_params(images, model=SMALL):
    """Return random parameters, biases too."""
    params = jax.eval_shape(model.init, jax.random.key(1), images)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten([0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def images_of(size, batch=3, channels=1):
    """Return random square images [B, H, W, C]."""
    return jax.random.normal(jax.random.key(9), (batch, size, size, channels)) * 3
