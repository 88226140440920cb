"""The compact AlexNet on Fashion-MNIST at 28×28: minutes on two CPU cores."""

from alexnet_jax.configs import default


def get_config():
    c = default.get_config()
    c.pad = 2
    c.image_size = 28
    c.input_scale = 1 / 70  # about one over the pixels' standard deviation
    c.stem = (5, 2, 2)
    c.widths = (48, 96, 128, 128, 96, 512, 512)
    c.kernel_std = (0.28, 0.058, 0.048, 0.059, 0.059, 0.14, 0.088, 0.01)  # sqrt(2 / fan-in), and small logits
    c.batch_size = 128
    c.num_epochs = 12.0
    c.learning_rate = 0.05
    c.warmup_steps = 300
    c.plateau_patience = 2
    return c
