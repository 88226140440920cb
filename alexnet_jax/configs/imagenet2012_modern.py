"""The paper's network on ImageNet in large steps, for accelerators of today; not run in full here.

Each field says what it departs from; all others are the paper's.
"""

from alexnet_jax.configs import imagenet2012


def get_config():
    c = imagenet2012.get_config()
    epoch = 1_281_167 // 1024  # steps
    c.batch_size = 1024  # 128 leave an accelerator of today idle between steps; it is for the whole mesh
    c.learning_rate = 0.01 * 1024 / 128  # 0.01: linear scaling, as Krizhevsky (2014) and Goyal et al. (2017) do
    c.warmup_steps = 5 * epoch  # none: a network that has learned nothing does not bear eight times the rate
    c.dtype = "bfloat16"  # float32 activations; parameters, their updates and sums stay float32
    c.log_every = 20  # 100 small steps; not the paper's, which says nothing of it
    return c
