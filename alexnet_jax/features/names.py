"""The names of a network's outputs, those of torchvision and Caffe among them."""

from alexnet_jax.variants import BEFORE, VARIANTS

# The modules of torchvision's alexnet. Dropout changes nothing in testing. `avgpool` and `classifier.0` have the values
# of pool5 only where that is 6×6, as for images of 224×224.
TORCHVISION = {
    "features.0": "conv1:pre", "features.1": "relu1", "features.2": "pool1",
    "features.3": "conv2:pre", "features.4": "relu2", "features.5": "pool2",
    "features.6": "conv3:pre", "features.7": "relu3",
    "features.8": "conv4:pre", "features.9": "relu4",
    "features.10": "conv5:pre", "features.11": "relu5", "features.12": "pool5",
    "avgpool": "pool5", "classifier.0": "pool5",
    "classifier.1": "fc6:pre", "classifier.2": "relu6", "classifier.3": "relu6",
    "classifier.4": "fc7:pre", "classifier.5": "relu7",
    "classifier.6": "fc8",
}  # fmt: skip
# The layers of Caffe's bvlc_alexnet whose names are not those of this network; its ReLU and dropout are in place.
CAFFE = {**{f"relu{i}": f"relu{i}" for i in range(1, 8)}, "drop6": "relu6", "drop7": "relu7"}
FULL_SIZE = ("fc6", "fc7", "fc8", "avgpool", "classifier", "relu6", "relu7", "drop6", "drop7")  # how these names begin


def output_name(name: str, variant: str) -> str:
    """Return a name of `model.OUTPUTS`, or LAYER:pre, for a name of a layer; other names as they are.

    "relu1" is the output after conv1's activation, wherever the variant has it.
    """
    name = TORCHVISION.get(name, name)
    name = CAFFE.get(name, name)
    if name not in CAFFE:
        return "fc8" if name == f"fc8{BEFORE}" else name  # fc8 has no activation
    number = name.removeprefix("relu")
    if int(number) > 5:
        return f"fc{number}"
    output = f"conv{number}"
    for operation in VARIANTS[variant].operations(output):
        if operation == "relu":
            break
        output = {"lrn": f"norm{number}", "pool": f"pool{number}"}.get(operation, output)
    return output


def needs_full_size(name: str) -> bool:
    """Return whether an output exists only for images of the size that the fully connected layers take."""
    return name.startswith(FULL_SIZE)
