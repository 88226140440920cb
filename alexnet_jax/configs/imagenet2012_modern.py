"""The paper's network on ImageNet in large batches, for present accelerators; not yet run in full.

All fields that are not set here are the paper's.
"""

import ml_collections

from alexnet_jax.configs import imagenet2012


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    c = imagenet2012.get_config()
    steps_per_epoch = 1_281_167 // 1024
    c.batch_size = 1024  # paper: 128
    c.learning_rate = 0.01 * 1024 / 128  # paper: 0.01; linear scaling: Krizhevsky (2014), Goyal et al. (2017)
    c.warmup_steps = 5 * steps_per_epoch  # paper: 0; as Goyal et al.
    c.dtype = "bfloat16"  # paper: float32; parameters and their updates stay float32
    c.log_every = 20  # default: 100
    return c
