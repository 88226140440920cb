"""The paper's network and training on ImageNet as `alexnet_jax.prepare` stores it; `imagenet2012:NAME`: a variant's.

The learning rate decays on a plateau of the validation error, as the authors did with ILSVRC-2012, whose test labels
are not public.
"""

import ml_collections

from alexnet_jax.configs import default
from alexnet_jax.variants import VARIANTS

# The fields of each variant's training that differ from `default`.
TRAINING = {
    "paper": dict(lighting=True, plateau_patience=3),  # in evaluations, one per epoch; not in the paper
    "source2012": dict(
        bias_rate=2.0,
        bias_decay=0.0,
        drop_at_epochs=(25.0, 51.0, 79.0),
        crop_group=32,
        crop_last_position=True,
        lighting=True,
        lighting_exponent=0.5,
        lighting_divisor=1.1,
    ),
    "caffe": dict(
        image_size=227,
        batch_size=256,
        bias_rate=2.0,
        bias_decay=0.0,
        drop_at_epochs=(20.0, 40.0, 60.0, 80.0),  # every 100,000 steps
        crop_last_position=True,
        ten_crop=False,
    ),
    # torchvision's reference training, but for its crops of random size and shape.
    "torchvision": dict(
        input_scale=1 / 57.6,  # 255 times the mean of the three deviations that it divides by
        batch_size=256,
        weight_decay=1e-4,
        drop_at_epochs=(30.0, 60.0),
        crop_last_position=True,
        ten_crop=False,
    ),
}


def get_config(variant: str = "paper") -> ml_collections.ConfigDict:
    """Return the config of a variant; raises ValueError for a name that is not in `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"imagenet2012.py:{variant}: expected one of {', '.join(VARIANTS)}")
    c = default.get_config()
    c.dataset = "imagenet2012_256"
    c.train_split = "train"
    c.validation_split = "validation"
    c.test_split = "validation"
    c.streaming = True
    c.variant = variant
    for field in ("stem", "widths", "towers"):
        c[field] = tuple(value) if isinstance(value := getattr(VARIANTS[variant], field), tuple) else value
    c.update(TRAINING[variant])
    return c
