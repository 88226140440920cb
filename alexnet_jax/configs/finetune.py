"""Fine-tuning on a folder of one's own images, as `alexnet_jax.prepare` stores it: docs/finetuning.md.

`config.init` gives the network and its image preparation; `config.dataset` and `config.data_dir` name the images.
"""

import ml_collections
from ml_collections import config_dict

from alexnet_jax.configs import default


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    c = default.get_config()
    c.init = config_dict.placeholder(str)  # the command has to name it
    c.dataset = "images_256"
    c.train_split = "train"
    c.validation_split = "validation"
    c.test_split = "validation"
    c.streaming = True
    c.crop_last_position = True
    c.ten_crop = False
    # conv1 is generic (Girshick 2015, section 4.5). That of torchvision, for pixels in 0 to 255, would also need a
    # learning rate 57² times smaller.
    c.freeze = "conv1"
    c.learning_rates = "fc8=10"  # it is new
    c.batch_size = 32
    c.num_epochs = 20.0
    c.learning_rate = 0.001
    c.linear_decay = True
    c.log_every = 20
    return c
