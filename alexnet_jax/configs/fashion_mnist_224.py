"""The paper's network on Fashion-MNIST, enlarged to 224×224 on the device: for a GPU."""

import ml_collections

from alexnet_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    c = default.get_config()
    c.pad = 2
    c.crop_last_position = True  # shifts of up to two pixels to every side
    c.image_size = 28
    c.resize = 224
    c.dtype = "bfloat16"
    c.num_epochs = 30.0
    c.learning_rate = 0.02
    c.warmup_steps = 500
    c.linear_decay = True
    return c
