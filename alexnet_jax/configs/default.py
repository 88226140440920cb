"""Every field that a recipe can set, with its type. The other files of this folder change values, never names."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()

    c.seed = 0  # every random number of a run comes from it

    # Data. Splits in TFDS's notation. Validation steers the schedule; the test split is read once, at the end.
    c.dataset = "fashion_mnist"  # a TFDS name
    c.data_dir = ""  # where TFDS keeps prepared data sets; "": ~/tensorflow_datasets
    c.source_dir = ""  # a folder with the four IDX files of Fashion-MNIST, if you have them
    c.train_split = "train[:55000]"
    c.validation_split = "train[55000:]"
    c.test_split = "test"
    c.streaming = False  # read from the disk all along, by worker processes; False: the whole set lies on each device
    c.loader_workers = 0  # the processes that decode what is streamed; 0: one a core, 16 at most

    # What the network sees (section 4.1).
    c.pad = 0  # mean-coloured border, in pixels, added before cropping
    c.image_size = 224  # side of the cropped patch, in pixels of the data set
    c.resize = 0  # side to which the patch is enlarged on the device; 0: not
    c.random_crop = True  # training sees a random patch; False: the central one
    c.flip = True
    c.lighting = False  # PCA lighting; needs three colour channels
    c.input_scale = 1.0  # the network sees (pixel − mean) × this; 1: the paper's 0 to 255
    c.ten_crop = True  # test on ten patches; False: on the central one

    # The network (section 3.5).
    c.variant = "paper"
    c.dtype = "float32"  # of the activations; or "bfloat16". Parameters are float32
    c.stem = (11, 4, 0)  # kernel, stride and padding of conv1
    c.widths = (96, 256, 384, 384, 256, 4096, 4096)  # conv1 … conv5, fc6, fc7; with one tower, 0 leaves a layer out
    c.towers = 2  # or 1: every layer sees all channels before it
    c.activation = "relu"  # or "tanh" (section 3.1)
    c.lrn = True  # local response normalization after conv1 and conv2 (section 3.3)
    c.lrn_alpha = 0.0  # its α; 0: the variant's own, meant for input_scale 1: another scale s wants α ÷ s²
    c.pool_window = 3  # z of section 3.4; 2: poolings that do not overlap
    c.dropout = 0.5  # rate at fc6 and fc7 (section 4.2); 0: none
    c.kernel_std = ()  # initial standard deviation of the eight layers' kernels; (): the variant's own
    c.bias = ()  # initial biases of the eight layers; (): the variant's own

    # Stochastic gradient descent (section 5).
    c.batch_size = 128
    c.num_train_steps = 0  # 0: num_epochs decides
    c.num_epochs = 90.0
    c.learning_rate = 0.01
    c.momentum = 0.9
    c.weight_decay = 5e-4
    c.warmup_steps = 0
    c.plateau_patience = 0  # ÷ 10 after this many evaluations without a better validation error, three times; 0: never
    c.linear_decay = False  # ε falls linearly to zero at the last step; the drops, if any, come on top
    c.drop_at_epochs = ()  # ÷ 10 at these epochs, unless the plateau's drop came before

    # The devices (section 3.2).
    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # parts of a batch; -1: all devices that the towers leave
    c.mesh.tower = 1  # or 2: each tower on devices of its own
    c.mesh.cpu_devices = 1  # virtual devices that a CPU is split into

    # How often, in steps.
    c.log_every = 100
    c.eval_every = 0  # validate and save; 0: once an epoch
    return c
