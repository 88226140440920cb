"""The paper's network on ImageNet in large batches, for today's accelerators; not yet run in full.

Each comment says what the paper has instead; all other fields are the paper's.
"""

import ml_collections

from alexnet_jax.configs import imagenet2012


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    c = imagenet2012.get_config()
    epoch = 1_281_167 // 1024  # steps
    c.batch_size = 1024  # 128, which leaves today's accelerators idle between steps; of the whole mesh
    c.learning_rate = 0.01 * 1024 / 128  # 0.01: linear scaling, as Krizhevsky (2014) and Goyal et al. (2017) do
    c.warmup_steps = 5 * epoch  # none; training does not start at eight times the learning rate
    c.dtype = "bfloat16"  # float32 activations; parameters, their updates and sums stay float32
    c.log_every = 20  # 100, of small steps; the paper does not say
    return c
