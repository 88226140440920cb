"""AlexNets in the formats of other programs, written with public libraries; small, with random parameters."""

import functools
import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import scipy.io
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

CONVS, DENSE = ("conv1", "conv2", "conv3", "conv4", "conv5"), ("fc6", "fc7", "fc8")
WIDTHS, CLASSES = (4, 4, 6, 4, 4, 2, 2), 3
FULL_WIDTHS = (96, 256, 384, 384, 256, 4096, 4096)
FULL_TORCH_WIDTHS = (64, 192, 384, 256, 256, 4096, 4096)
MEAN_BGR = (104.00699, 116.66877, 122.67891)
ORDER = ("conv1", "norm1", "pool1", "conv2", "norm2", "pool2", "conv3", "conv4", "conv5", "pool5", *DENSE)


def random_params(widths=WIDTHS, classes=CLASSES, towers=2, seed=0):
    """Parameters in this project's layout, `{layer: {"kernel", "bias"}}`."""
    rng = np.random.default_rng(seed)
    outputs = (*widths, classes)
    inputs = (3, widths[0] // towers, widths[1], widths[2] // towers, widths[3] // towers, 36 * widths[4], *widths[5:])
    sides = (11, 5, 3, 3, 3)
    params = {}
    for i, layer in enumerate(CONVS + DENSE):
        shape = (sides[i], sides[i], inputs[i], outputs[i]) if i < 5 else (inputs[i], outputs[i])
        kernel, bias = (rng.standard_normal(s, np.float32) * np.float32(0.01) for s in (shape, outputs[i : i + 1]))
        params[layer] = {"kernel": kernel, "bias": bias}
    return params


def oihw(params):
    """The arrays as torch, Caffe and ONNX have them: OIHW, [out, in], fc6's inputs in (C, H, W) order."""
    arrays = {}
    for layer, (kernel, bias) in ((layer, p.values()) for layer, p in params.items()):
        if layer == "fc6":
            kernel = kernel.reshape(6, 6, -1, kernel.shape[1]).transpose(3, 2, 0, 1).reshape(kernel.shape[1], -1)
        else:
            kernel = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        arrays[layer] = np.ascontiguousarray(kernel), bias
    return arrays


def bgr(arrays):
    """OIHW arrays of a network that takes BGR."""
    return arrays | {"conv1": (np.ascontiguousarray(arrays["conv1"][0][:, ::-1]), arrays["conv1"][1])}


def torch_keys(params):
    modules = [f"features.{i}" for i in (0, 3, 6, 8, 10)] + [f"classifier.{i}" for i in (1, 4, 6)]
    return OrderedDict(
        (f"{module}.{name}", x)
        for module, pair in zip(modules, oihw(params).values(), strict=True)
        for name, x in zip(("weight", "bias"), pair, strict=True)
    )


class Saved:
    """A tensor for `TorchPickler`."""

    def __init__(self, key, x):
        self.key, self.x = key, x

    def __reduce__(self):
        strides = tuple(n // self.x.itemsize for n in self.x.strides)
        storage = types.SimpleNamespace(saved=self)
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (storage, 0, self.x.shape, strides, False, OrderedDict())


class TorchPickler(pickle._Pickler):
    """Pickles tensors as torch does, without torch."""

    def __init__(self, file, legacy):
        super().__init__(file, protocol=2)
        self.legacy = legacy

    def persistent_id(self, obj):
        if isinstance(obj, types.SimpleNamespace):
            saved = obj.saved
            value = ("storage", sys.modules["torch"].FloatStorage, saved.key, "cpu", saved.x.size)
            return (*value, None) if self.legacy else value


class Python2Pickler(pickle._Pickler):
    """Pickles text and bytes as the one string type of Python 2."""

    def save_string(self, value):
        content = value.encode() if isinstance(value, str) else value
        short = len(content) < 256
        self.write((b"U" if short else b"T") + struct.pack("<B" if short else "<i", len(content)) + content)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


class Python2TorchPickler(TorchPickler, Python2Pickler):
    """Pickles as torch in Python 2: an OrderedDict is made from a list of pairs."""

    def reducer_override(self, obj):
        if isinstance(obj, OrderedDict):
            return OrderedDict, ([[key, value] for key, value in obj.items()],)
        return NotImplemented


def named(module, name):
    """A function that pickles as module.name."""

    def function():
        raise AssertionError(f"{module}.{name} was called")

    function.__module__, function.__qualname__ = module, name
    return function


def with_torch_names(write):
    """Run `write` with names of torch to pickle."""

    @functools.wraps(write)
    def wrapped(*args, **kwargs):
        modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
        modules["torch"].FloatStorage = named("torch", "FloatStorage")
        modules["torch._utils"]._rebuild_tensor_v2 = named("torch._utils", "_rebuild_tensor_v2")
        before = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)
        try:
            return write(*args, **kwargs)
        finally:
            sys.modules.update({name: module for name, module in before.items() if module})
            for name in [name for name, module in before.items() if not module]:
                del sys.modules[name]

    return wrapped


@with_torch_names
def torch_zip(path, params, wrap=lambda state: state, compression=zipfile.ZIP_STORED, keys=torch_keys):
    """`keys` gives the arrays by their names in the file."""
    tensors = OrderedDict((key, Saved(str(i), x)) for i, (key, x) in enumerate(keys(params).items()))
    pickled = io.BytesIO()
    TorchPickler(pickled, legacy=False).dump(wrap(tensors))
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled.getvalue())
        file.writestr("archive/byteorder", "little")
        for saved in tensors.values():
            file.writestr(f"archive/data/{saved.key}", saved.x.tobytes())
        file.writestr("archive/version", "3\n")


@with_torch_names
def torch_legacy(path, params, wrap=lambda state: state, python2=False, keys=torch_keys):
    tensors = OrderedDict((key, Saved(str(i), x)) for i, (key, x) in enumerate(keys(params).items()))
    with open(path, "wb") as file:
        sizes = {"short": 2, "int": 4, "long": 4}
        for value in (
            0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}
        ):  # fmt: skip
            pickle.dump(value, file, protocol=2)
        (Python2TorchPickler if python2 else TorchPickler)(file, legacy=True).dump(wrap(tensors))
        keys = [saved.key for saved in tensors.values()]
        (Python2Pickler if python2 else pickle.Pickler)(file, protocol=2).dump(keys)
        for saved in tensors.values():
            file.write(struct.pack("<q", saved.x.size) + saved.x.tobytes())


def torch_safetensors(path, params):
    save_file(dict(torch_keys(params)), path, metadata={"format": "pt"})


@functools.cache
def caffe_messages():
    """Caffe's messages, those of its caffe.proto that a network needs, by name."""
    field = descriptor_pb2.FieldDescriptorProto
    kinds = {
        "int64": field.TYPE_INT64, "string": field.TYPE_STRING, "float": field.TYPE_FLOAT,
        "uint": field.TYPE_UINT32, "double": field.TYPE_DOUBLE,
    }  # fmt: skip
    schema = {
        "BlobShape": [("dim", 1, "packed int64")],
        "BlobProto": [("num", 1, "int64"), ("channels", 2, "int64"), ("height", 3, "int64"), ("width", 4, "int64"),
                      ("data", 5, "packed float"), ("shape", 7, "BlobShape"), ("double_data", 8, "packed double")],
        "Convolution": [("num_output", 1, "uint"), ("pad", 3, "repeated uint"), ("kernel_size", 4, "repeated uint"),
                        ("group", 5, "uint"), ("stride", 6, "repeated uint")],
        "LRN": [("local_size", 1, "uint"), ("alpha", 2, "float"), ("beta", 3, "float")],
        "Pooling": [("pool", 1, "uint"), ("kernel_size", 2, "uint"), ("stride", 3, "uint")],
        "V0": [("name", 1, "string"), ("type", 2, "string"), ("pad", 7, "uint"), ("kernelsize", 8, "uint"),
               ("group", 9, "uint"), ("stride", 10, "uint"), ("alpha", 14, "float"),
               ("blobs", 50, "repeated BlobProto")],
        "V1": [("layer", 1, "V0"), ("bottom", 2, "repeated string"), ("name", 4, "string"), ("type", 5, "uint"),
               ("blobs", 6, "repeated BlobProto"), ("convolution_param", 10, "Convolution"), ("lrn_param", 18, "LRN"),
               ("pooling_param", 19, "Pooling")],
        "V2": [("name", 1, "string"), ("type", 2, "string"), ("blobs", 7, "repeated BlobProto"),
               ("convolution_param", 106, "Convolution"), ("lrn_param", 118, "LRN"), ("pooling_param", 121, "Pooling")],
        "Net": [("name", 1, "string"), ("layers", 2, "repeated V1"), ("layer", 100, "repeated V2")],
    }  # fmt: skip
    file = descriptor_pb2.FileDescriptorProto(name="caffe_test.proto", package="caffe_test", syntax="proto2")
    for name, fields in schema.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            *words, kind = kind.split()
            added = message.field.add(name=field_name, number=number, label=3 if words else 1)
            if kind in kinds:
                added.type = kinds[kind]
            else:
                added.type, added.type_name = field.TYPE_MESSAGE, f".caffe_test.{kind}"
            added.options.packed = "packed" in words
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {n: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe_test.{n}")) for n in schema}


def blob(x, legacy, double=False):
    """An array as a BlobProto."""
    message = caffe_messages()["BlobProto"]()
    getattr(message, "double_data" if double else "data").extend(x.reshape(-1).tolist())
    if legacy:
        message.num, message.channels, message.height, message.width = (1,) * (4 - x.ndim) + x.shape
    else:
        message.shape.dim.extend(x.shape)
    return message


def caffe(path, params, generation=2, order=ORDER, name="AlexNet", lrn_alpha=1e-4, stride=4, double=False):
    """A .caffemodel with layers of the generation 0, 1 or 2."""
    arrays = bgr(oihw(params))
    net = caffe_messages()["Net"](name=name)
    kinds = {
        "conv": ("conv", 4, "Convolution"), "norm": ("lrn", 15, "LRN"), "pool": ("pool", 17, "Pooling"),
        "fc": ("innerproduct", 14, "InnerProduct"), "data": ("data", 5, "Data"), "relu": ("relu", 18, "ReLU"),
    }  # fmt: skip
    for layer_name in ("data", *order, "relu7"):
        kind = layer_name.rstrip("0123456789")
        layer = net.layer.add() if generation == 2 else net.layers.add()
        target = layer.layer if generation == 0 else layer
        target.name, target.type = layer_name, kinds[kind][generation]
        target.blobs.extend(blob(x, generation < 2, double) for x in arrays.get(layer_name, ()))
        if generation == 0:
            if kind == "conv":
                layer.layer.stride, layer.layer.pad = (stride, 0) if layer_name == "conv1" else (1, 1)
            elif kind == "pool":
                layer.layer.kernelsize, layer.layer.stride = 3, 2
            elif kind == "norm":
                layer.layer.alpha = lrn_alpha
        elif kind == "conv":
            layer.convolution_param.stride.append(stride if layer_name == "conv1" else 1)
        elif kind == "pool":
            layer.pooling_param.kernel_size, layer.pooling_param.stride = 3, 2
        elif kind == "norm":
            layer.lrn_param.alpha, layer.lrn_param.beta, layer.lrn_param.local_size = lrn_alpha, 0.75, 5
    Path(path).write_bytes(net.SerializeToString())


def caffe_mean(path, image_bgr):
    """A mean image [3, H, W] as a .binaryproto."""
    Path(path).write_bytes(blob(image_bgr[None], legacy=True).SerializeToString())


def onnx_zoo(path, params, order=ORDER, raw=True, side=224):
    """A graph as the ONNX zoo's bvlcalexnet, for images of side×side."""
    nodes, initializers, x, groups = [], [], "data_0", {"conv2": 2, "conv4": 2, "conv5": 2}
    for layer in order:
        kind, inputs = layer.rstrip("0123456789"), [x]
        if layer in params:
            for letter, array in zip("wb", bgr(oihw(params))[layer], strict=True):
                inputs.append(f"{layer}_{letter}_0")
                initializers.append(
                    numpy_helper.from_array(array, inputs[-1]) if raw
                    else helper.make_tensor(inputs[-1], 1, array.shape, array.reshape(-1))
                )  # fmt: skip
        y = f"{layer}_1"
        if kind == "conv":
            kernel = params[layer]["kernel"].shape[0]
            stride, pad = (4, 0) if layer == "conv1" else (1, kernel // 2)
            attributes = dict(
                kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, group=groups.get(layer, 1)
            )
            nodes.append(helper.make_node("Conv", inputs, [y], **attributes))
        elif kind == "norm":
            nodes.append(helper.make_node("LRN", inputs, [y], size=5, alpha=1e-4, beta=0.75, bias=1.0))
        elif kind == "pool":
            pads = [0, 0, 1, 1] if layer == "pool5" and side == 224 else [0] * 4
            nodes.append(helper.make_node("MaxPool", inputs, [y], kernel_shape=[3, 3], strides=[2, 2], pads=pads))
        else:
            if layer == "fc6":
                shape = np.array([1, 36 * params["conv5"]["bias"].size])
                initializers.append(numpy_helper.from_array(shape, "OC2_DUMMY_1"))
                nodes.append(helper.make_node("Reshape", [x, "OC2_DUMMY_1"], ["flat"]))
                inputs[0] = "flat"
            nodes.append(helper.make_node("Gemm", inputs, [y], transB=1))
        x = y
        if kind in ("conv", "fc") and layer != "fc8":
            x = f"{layer}_2"
            nodes.append(helper.make_node("Relu", [y], [x]))
    nodes.append(helper.make_node("Softmax", [x], ["prob_1"], axis=1))
    values = [helper.make_tensor_value_info(n, 1, s) for n, s in (("data_0", [1, 3, side, side]), ("prob_1", [1, 3]))]
    graph = helper.make_graph(nodes, "bvlc_alexnet", values[:1], values[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)]), path)


def toronto(path, params, protocol=None):
    """A dict of arrays, as `np.save` writes it, or pickled with a protocol alone."""
    conv1 = {"kernel": params["conv1"]["kernel"][:, :, ::-1], "bias": params["conv1"]["bias"]}
    layers = {layer: [p["kernel"], p["bias"]] for layer, p in (params | {"conv1": conv1}).items()}
    layers["fc7"][0] = np.asfortranarray(layers["fc7"][0])
    with open(path, "wb") as file:
        if protocol is None:
            np.save(file, layers, allow_pickle=True)
        else:
            pickle.dump(layers, file, protocol=protocol)


def toronto_python2(path, params):
    """What `np.save` of Python 2 wrote."""
    conv1 = {"kernel": params["conv1"]["kernel"][:, :, ::-1], "bias": params["conv1"]["bias"]}
    layers = {layer: [Array2(x) for x in p.values()] for layer, p in (params | {"conv1": conv1}).items()}
    wrapped = np.empty((), object)
    wrapped[()] = layers
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(69) + b"\n"
    with open(path, "wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        Python2Pickler(file, protocol=2).dump(wrapped)


class Array2:
    """An array that pickles as in Python 2: with its bytes as a string."""

    def __init__(self, x):
        self.x = x

    def __reduce__(self):
        function, arguments, _ = np.zeros(1).__reduce__()
        return function, arguments, (1, self.x.shape, self.x.dtype, False, self.x.tobytes())


def matconvnet(path, params, average, names, compress=False, order=ORDER, old=False):
    """MatConvNet's layers; `average` is the mean of the crop, RGB, or three numbers."""
    layers = []
    for name in order:
        kind = name.rstrip("0123456789")
        layer = {"name": name, "type": {"fc": "conv", "norm": "normalize"}.get(kind, kind)}
        if name in params:
            kernel, bias = params[name].values()
            if name == "fc6":
                kernel = kernel.reshape(6, 6, -1, kernel.shape[-1])
            elif kernel.ndim == 2:
                kernel = kernel[None, None]
            pair = np.empty((1, 2), object)
            pair[0, 0], pair[0, 1] = np.asfortranarray(kernel), bias[None]
            layer |= {"filters": pair[0, 0], "biases": pair[0, 1]} if old else {"weights": pair}
            layer |= {"stride": 4.0 if name == "conv1" else 1.0, "pad": np.zeros(4)}
        elif kind == "norm":
            layer["param"] = np.array([5, 1, 1e-4 / 5, 0.75])
        elif kind == "pool":
            layer |= {"pool": np.array([3.0, 3.0]), "stride": np.array([2.0, 2.0]), "method": "max"}
        layers.append(layer)
    normalization = {"imageSize": np.array([227.0, 227.0, 3.0]), "averageImage": average, "border": [29.0, 29.0]}
    cell = np.empty((1, len(layers)), object)
    cell[0] = layers
    classes = {"name": np.array([f"n{i:08}" for i in range(len(names))], object)[None],
               "description": np.array(names, object)[None]}  # fmt: skip
    meta = {"normalization": normalization, "classes": classes}
    variables = {"layers": cell} | (meta if old else {"meta": meta})
    scipy.io.savemat(path, variables, do_compression=compress, oned_as="row")
