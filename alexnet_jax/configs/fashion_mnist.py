"""The compact AlexNet on Fashion-MNIST at 28×28: minutes on two CPU cores."""

from alexnet_jax.configs import default


def get_config():
    c = default.get_config()
    c.image_size = 28  # the whole image: crops of a padded one only slowed the learning in so few epochs
    c.input_scale = 1 / 70  # about one over the pixels' standard deviation
    c.stem = (5, 1, 0)
    c.widths = (32, 96, 128, 128, 128, 1024, 1024)
    c.kernel_std = (0.28, 0.07, 0.048, 0.059, 0.059, 0.0625, 0.044, 0.035)  # sqrt(2 / fan-in)
    c.batch_size = 64
    c.num_epochs = 12.0
    c.learning_rate = 0.03
    c.warmup_steps = 300
    c.drop_at_epochs = (7.0, 10.0)
    c.plateau_patience = 2
    c.mesh.cpu_devices = 2  # two threads of XLA on one core each: 1,302 images/s; one on two cores: 1,005
    return c
