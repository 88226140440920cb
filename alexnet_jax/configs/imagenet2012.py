"""The paper's whole recipe on ImageNet, as `alexnet_jax.prepare` stores it; `imagenet2012.py:source2012` another form.

The plateau listens to the validation set, as the authors did with ILSVRC-2012, whose test labels are not public.
"""

from alexnet_jax.configs import default
from alexnet_jax.variants import VARIANTS


def get_config(variant="paper"):
    """Raises ValueError for a form that is none of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"imagenet2012.py:{variant}: expected one of {', '.join(VARIANTS)}")
    c = default.get_config()
    of = VARIANTS[variant]
    c.dataset = "imagenet2012_256"
    c.train_split = "train"
    c.validation_split = "validation"
    c.test_split = "validation"
    c.streaming = True
    c.variant = variant
    c.image_size = of.image_size
    c.lighting = of.lighting
    c.ten_crop = of.ten_crop
    c.batch_size = of.batch_size
    c.drop_at_epochs = of.drop_at_epochs
    c.plateau_patience = 0 if of.drop_at_epochs else 3  # epochs; the paper does not say how long they waited
    return c
