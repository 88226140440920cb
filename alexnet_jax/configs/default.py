"""Every field of a config, with its type and the paper's value; the other configs change values, never names."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Return the config."""
    c = ml_collections.ConfigDict()

    c.seed = 0  # every random number of a run derives from it

    # Data. Splits are in TFDS's notation. Validation sets the schedule; the test split is read once, at the end.
    c.dataset = "fashion_mnist"  # a TFDS name
    c.data_dir = ""  # where TFDS keeps prepared data sets; "": ~/tensorflow_datasets
    c.source_dir = ""  # the original files of Fashion-MNIST (a folder) or CIFAR-10 (the archive); "": other sources
    c.train_split = "train[:55000]"
    c.validation_split = "train[55000:]"
    c.test_split = "test"
    c.streaming = False  # read from disk during training, by worker processes; False: the devices hold the data set
    c.loader_workers = 0  # processes that decode a streamed or large data set; 0: one per core, 16 at most

    # The inputs of the network (section 4.1).
    c.pad = 0  # border of mean color, in pixels, added before cropping
    c.image_size = 224  # side of the crop, in pixels of the data set
    c.resize = 0  # side to which the crop is enlarged on the device; 0: none
    c.random_crop = True  # train on random crops; False: on the center crop
    c.crop_group = 1  # consecutive images of a batch that share the position of their crop and their flip
    c.crop_last_position = False  # random crops may end at the last row and column: 33² positions of 224 in 256
    c.flip = True  # horizontal flips, at random
    c.lighting = False  # PCA lighting; needs three color channels
    c.lighting_exponent = 1.0  # the power of λ in PCA lighting; 0.5: α times the standard deviation
    c.lighting_divisor = 1.0  # all pixels are divided by it after PCA lighting
    c.input_scale = 1.0  # the inputs are (pixel − mean) × this; 1: the paper's 0 to 255
    c.ten_crop = True  # test on ten-crops, five without flips; False: on the center crop

    # The network (section 3.5).
    c.variant = "paper"  # or "source2012", "caffe", "torchvision": the layers; imagenet2012:NAME sets the rest too
    c.dtype = "float32"  # of the activations; or "bfloat16". Parameters are float32
    c.stem = (11, 4, 0)  # kernel, stride and padding of conv1
    c.widths = (96, 256, 384, 384, 256, 4096, 4096)  # conv1 … conv5, fc6, fc7; 0 omits a layer after conv1
    c.towers = 2  # or 1: every layer takes all channels before it
    c.activation = "relu"  # or "tanh" (section 3.1)
    c.lrn = True  # local response normalization after conv1 and conv2 (section 3.3)
    c.lrn_alpha = config_dict.placeholder(float)  # α of LRN; the paper's is 1e-4 / input_scale²; None: the variant's
    c.pool_window = 3  # z of section 3.4; 2: pooling does not overlap
    c.dropout = 0.5  # rate at fc6 and fc7 (section 4.2); 0: none
    c.kernel_std = config_dict.placeholder(tuple)  # initial std of the eight layers' kernels; None: the variant's
    c.bias = config_dict.placeholder(tuple)  # initial biases of the eight layers; None: the variant's

    # Stochastic gradient descent (section 5).
    c.batch_size = 128
    c.num_train_steps = 0  # 0: num_epochs decides
    c.num_epochs = 90.0
    c.learning_rate = 0.01
    c.momentum = 0.9
    c.weight_decay = 5e-4
    c.bias_rate = 1.0  # learning rate of the biases, relative to that of the kernels
    c.bias_decay = 1.0  # weight decay of the biases, relative to that of the kernels
    c.warmup_steps = 0
    c.plateau_patience = 0  # learning rate ÷ 10 after this many evaluations without a lower error, 3 times; 0: never
    c.linear_decay = False  # the learning rate falls linearly to zero at the last step, in addition to its drops
    c.drop_at_epochs = ()  # learning rate ÷ 10 at each; with the decay on plateau the larger number of drops counts

    # Fine-tuning. Layers are named as conv1 … fc8, or by how several names begin, with commas.
    c.init = ""  # the file of weights, or the run's working directory, to start from; "": random kernels
    c.init_sha256 = ""  # its SHA-256, which a run writes to its config.json; another file is refused; "": any
    c.freeze = ""  # the layers that are not trained, as in "conv1,fc6"; or "all_but_fc8", a linear probe
    c.learning_rates = ""  # factors of the learning rate, as in "fc8=10,conv=0.1"; the longest name decides

    # The devices (section 3.2).
    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # parts of a batch; -1: the number of devices ÷ tower
    c.mesh.tower = 1  # or 2: each tower on devices of its own
    c.mesh.cpu_devices = 1  # virtual devices of a CPU

    # How often, in steps.
    c.log_every = 100
    c.eval_every = 0  # validate and save; 0: once per epoch
    return c
