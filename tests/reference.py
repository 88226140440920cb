"""Float64 NumPy references of sections 3 to 5 of the paper, written from the paper and from nothing of the package.

Images and activations are NHWC, convolutions' kernels HWIO, dense kernels [inputs, outputs]. A gradient takes the
gradient `g` of the result, and returns that of each argument.
"""

import numpy as np
from scipy.signal import correlate


def _float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


# Convolution and dense layers (sections 3.2 and 3.5).


def _columns(x, side, stride, padding):
    """Every window as a row [B·H'·W', side·side·I], and the [B, H', W'] that they come from."""
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))[:, ::stride, ::stride]
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, side * side * x.shape[3]), windows.shape[:3]


def conv(x, kernel, stride=1, padding=((0, 0), (0, 0))):
    """Convolution with zeros before and after the rows and the columns."""
    x, kernel = _float64(x, kernel)
    columns, shape = _columns(x, kernel.shape[0], stride, padding)
    return (columns @ kernel.reshape(-1, kernel.shape[3])).reshape(*shape, -1)


def scipy_conv(x, kernel, stride=1, padding=((0, 0), (0, 0))):
    """The same by SciPy's correlation."""
    x, kernel = _float64(np.pad(x, ((0, 0), *padding, (0, 0))), kernel)
    filters = np.moveaxis(kernel, 3, 0)
    maps = [[correlate(image, w, "valid", "direct")[::stride, ::stride, 0] for w in filters] for image in x]
    return np.moveaxis(maps, 1, 3)


def conv_gradient(x, kernel, g, stride=1, padding=((0, 0), (0, 0))):
    x, kernel, g = _float64(x, kernel, g)
    side, features = kernel.shape[0], kernel.shape[3]
    columns, _ = _columns(x, side, stride, padding)
    rows = g.reshape(-1, features)
    dkernel = (columns.T @ rows).reshape(kernel.shape)
    taps = (rows @ kernel.reshape(-1, features).T).reshape(*g.shape[:3], side, side, -1)
    dx = np.zeros_like(np.pad(x, ((0, 0), *padding, (0, 0))))
    for i in range(side):
        for j in range(side):
            dx[_tap(i, j, stride, *g.shape[1:3])] += taps[:, :, :, i, j]
    (top, _), (left, _) = padding
    return dx[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def _tap(i, j, stride, height, width):
    """What position (i, j) of each of height×width windows covers."""
    return np.s_[:, i : i + stride * height : stride, j : j + stride * width : stride]


def dense(x, kernel, bias):
    x, kernel, bias = _float64(x, kernel, bias)
    return x @ kernel + bias


def dense_gradient(x, kernel, g):
    """The gradients of x, kernel and bias."""
    x, kernel, g = _float64(x, kernel, g)
    return g @ kernel.T, x.T @ g, g.sum(0)


# Activation functions (section 3.1).


def relu(x):
    return np.maximum(*_float64(x), 0)


def relu_gradient(x, g):
    return np.where(np.asarray(x) > 0, *_float64(g), 0)


def tanh(x):
    return np.tanh(*_float64(x))


def tanh_gradient(x, g):
    return (1 - tanh(x) ** 2) * np.asarray(g, np.float64)


# Normalization (section 3.3, and the 2012 source's `rnorm`).


def _window_sum(x, axis, n):
    """The sum of n neighbors, centered on each element and clipped at the ends."""
    edges = [(n // 2,) * 2 if a == axis else (0, 0) for a in range(x.ndim)]
    return np.lib.stride_tricks.sliding_window_view(np.pad(x, edges), n, axis).sum(-1)


def lrn(x, k, n, alpha, beta):
    """Local response normalization: b_i = a_i / (k + α Σ_j a_j²)^β over the n channels around channel i."""
    (x,) = _float64(x)
    return x / (k + alpha * _window_sum(x**2, x.ndim - 1, n)) ** beta


def lrn_gradient(x, g, k, n, alpha, beta):
    """∂b_j/∂a_i = δ_ij s_j^-β − 2αβ a_j a_i s_j^(-β-1) where i is one of j's n channels: where j is one of i's."""
    x, g = _float64(x, g)
    s = k + alpha * _window_sum(x**2, x.ndim - 1, n)
    return g * s**-beta - 2 * alpha * beta * x * _window_sum(g * x * s ** (-beta - 1), x.ndim - 1, n)


def spatial_norm(x, size, scale, power, min_div):
    """The 2012 source's `rnorm`: each map normalized over the size×size pixels around each one."""
    (x,) = _float64(x)
    return x / (min_div + scale / size**2 * _window_sum(_window_sum(x**2, 1, size), 2, size)) ** power


def spatial_norm_gradient(x, g, size, scale, power, min_div):
    x, g = _float64(x, g)
    around = lambda x: _window_sum(_window_sum(x, 1, size), 2, size)  # noqa: E731
    s = min_div + scale / size**2 * around(x**2)
    return g * s**-power - 2 * scale / size**2 * power * x * around(g * x * s ** (-power - 1))


# Pooling (section 3.4).


def window_taps(x, window, stride):
    """What each position of the windows covers, row by row: [window², B, H', W', C]."""
    height, width = ((side - window) // stride + 1 for side in x.shape[1:3])
    return np.stack([x[_tap(i, j, stride, height, width)] for i in range(window) for j in range(window)])


def max_pool(x, window=3, stride=2):
    return window_taps(*_float64(x), window, stride).max(0)


def max_pool_gradient(x, g, window=3, stride=2):
    """Of several maxima in a window the first, row by row, takes the gradient."""
    x, g = _float64(x, g)
    winner, dx = window_taps(x, window, stride).argmax(0), np.zeros_like(x)
    for tap in range(window**2):
        dx[_tap(*divmod(tap, window), stride, *g.shape[1:3])] += np.where(winner == tap, g, 0)
    return dx


# Objective, dropout and the update (sections 3.5, 4.2 and 5).


def relu_lrn_pool(x, dy, towers, k, n, alpha, beta):
    """ReLU, LRN within each tower, and 3×3 max pooling of stride 2: the result, and the gradient for dy."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    batch, height, width, channels = x.shape
    number = np.arange(channels)
    near = abs(number[:, None] - number) <= n // 2
    near &= (number[:, None] // (channels // towers)) == (number // (channels // towers))
    a = np.maximum(x, 0)
    s = k + alpha * (a**2 @ near)
    b = a * s**-beta
    y, d = np.empty(dy.shape), np.zeros(x.shape)
    image, channel = np.ix_(np.arange(batch), number)
    for row in range(dy.shape[1]):
        for column in range(dy.shape[2]):
            taps = b[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].reshape(batch, 9, channels)
            winner = taps.argmax(1)
            y[:, row, column] = taps.max(1)
            d[image, 2 * row + winner // 3, 2 * column + winner % 3, channel] += dy[:, row, column]
    da = d * s**-beta - 2 * alpha * beta * a * ((d * a * s ** (-beta - 1)) @ near)
    return y, np.where(x > 0, da, 0)


def softmax(logits):
    (logits,) = _float64(logits)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def cross_entropy(logits, labels):
    """The mean over the batch."""
    (logits,) = _float64(logits)
    below = logits - logits.max(-1, keepdims=True)
    return (np.log(np.exp(below).sum(-1)) - below[np.arange(len(labels)), labels]).mean()


def cross_entropy_gradient(logits, labels):
    return (softmax(logits) - np.eye(logits.shape[-1])[labels]) / len(labels)


def dropout(x, mask):
    """What the mask keeps, not rescaled; its gradient is the same function of `g`."""
    return np.asarray(x, np.float64) * mask


def sgd(weights, velocity, gradient, rate, momentum=0.9, decay=0.0005):
    """One array's weights and velocity after section 5's update: v ← 0.9 v − 0.0005 ε w − ε ∂L/∂w; w ← w + v."""
    weights, velocity, gradient = _float64(weights, velocity, gradient)
    velocity = momentum * velocity - decay * rate * weights - rate * gradient
    return weights + velocity, velocity


# Augmentation (section 4.1), from the random numbers of each image, and resizing.


def crop(images, positions, size):
    """A size×size crop of each image, at its (top, left)."""
    return np.stack([
        image[top : top + size, left : left + size] for image, (top, left) in zip(images, positions, strict=True)
    ])  # fmt: skip


def flip(images, flipped):
    """The images, with a horizontal flip of those that are `flipped`."""
    return np.stack([image[:, ::-1] if yes else image for image, yes in zip(images, flipped, strict=True)])


def pca_lighting(images, alpha, eigenvalues, eigenvectors):
    """[p1 p2 p3][α1 λ1, α2 λ2, α3 λ3]ᵀ added to every pixel of an image, with its own α [3]."""
    images, alpha, eigenvalues, eigenvectors = _float64(images, alpha, eigenvalues, eigenvectors)
    return images + np.stack([eigenvectors @ (a * eigenvalues) for a in alpha])[:, None, None, :]


def resize(images, side):
    """Bilinear resizing to a larger side×side: a pixel's center is at half a pixel, and edges are repeated outside."""
    (images,) = _float64(images)
    for axis in (1, 2):
        before = images.shape[axis]
        positions = np.clip((np.arange(side) + 0.5) * before / side - 0.5, 0, before - 1)
        low = np.minimum(positions.astype(int), max(before - 2, 0))
        weight = (positions - low).reshape([-1 if a == axis else 1 for a in range(4)])
        low, high = (images.take(np.minimum(low + step, before - 1), axis) for step in (0, 1))
        images = (1 - weight) * low + weight * high
    return images


# The network (section 3.5), in its three published variants.

PAPER_LRN = {"paper": (2.0, 5, 1e-4, 0.75), "source2012": (2.0, 5, 1e-4 / 5, 0.75), "caffe": (1.0, 5, 1e-4 / 5, 0.75),
             "torchvision": None}  # fmt: skip
ACTIVATIONS = {"relu": (relu, relu_gradient), "tanh": (tanh, tanh_gradient)}


def network(
    params, images, variant="paper", stem=(11, 4, 0), towers=2, activation="relu", lrn_constants=None, use_lrn=True,
    pool_window=3, scale=1.0, masks=None,
):  # fmt: skip
    """The logits [B, K], and a function from their gradient to those of all parameters.

    Args:
      params: {layer: {"kernel", "bias"}}. The network has no layer of conv2 … fc7 that is missing.
      stem: conv1's kernel, stride and padding.
      lrn_constants: k, n, α, β where they are not the variant's.
      scale: what the outputs of fc6 and fc7, or torchvision's inputs, are multiplied by: the paper's are halved in
        testing, not in training.
      masks: what dropout keeps of these, [B, N] each; None: everything.
    """
    params = {layer: {leaf: np.asarray(w, np.float64) for leaf, w in of.items()} for layer, of in params.items()}
    tape, gradients = [], {}

    def record(y, gradient):
        tape.append(gradient)
        return y

    def each(parts, function, gradient, x, *constants):  # of the channels' parts, on their own
        xs = np.split(x, parts, -1)

        def back(g):
            pairs = zip(xs, np.split(g, parts, -1), strict=True)
            return np.concatenate([gradient(*pair, *constants) for pair in pairs], -1)

        return record(np.concatenate([function(x, *constants) for x in xs], -1), back)

    def f(x):
        return each(1, *ACTIVATIONS[activation], x)

    def convolution(name, x, stride=1, pad=0, parts=1):
        parts = min(parts, towers)
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        # In 2012 the output size is rounded up: the last window reads zeros past the bottom and right edge.
        up = variant in ("paper", "source2012")
        past = [-(side + 2 * pad - len(kernel)) % stride * up for side in x.shape[1:3]]
        how = stride, tuple((pad, pad + more) for more in past)
        xs, kernels = np.split(x, parts, -1), np.split(kernel, parts, -1)

        def back(g):
            pairs = [conv_gradient(*of, *how) for of in zip(xs, kernels, np.split(g, parts, -1), strict=True)]
            dx, dkernel = (np.concatenate(arrays, -1) for arrays in zip(*pairs, strict=True))
            gradients[name] = {"kernel": dkernel, "bias": g.sum((0, 1, 2))}
            return dx

        return record(np.concatenate([conv(*of, *how) for of in zip(xs, kernels, strict=True)], -1) + bias, back)

    def normalize(x):
        constants = lrn_constants or PAPER_LRN[variant]
        if not (use_lrn and constants):
            return x
        return each(1 if variant == "caffe" else towers, lrn, lrn_gradient, x, *constants)

    def pool(x):
        return each(1, max_pool, max_pool_gradient, x, pool_window, 2)

    def fully_connected(name, x):
        kernel, bias = params[name]["kernel"], params[name]["bias"]

        def back(g):
            dx, dkernel, dbias = dense_gradient(x, kernel, g)
            gradients[name] = {"kernel": dkernel, "bias": dbias}
            return dx

        return record(dense(x, kernel, bias), back)

    def drop(x, mask):
        return record(dropout(x, mask) * scale, lambda g: dropout(g, mask) * scale)

    x = convolution("conv1", np.asarray(images, np.float64), *stem[1:])
    x = f(pool(normalize(x))) if variant == "source2012" else pool(normalize(f(x)))
    if "conv2" in params:
        x = normalize(f(convolution("conv2", x, 1, 2, 2)))
    if "conv2" in params and variant == "source2012":
        x = each(1, spatial_norm, spatial_norm_gradient, x, 5, 0.001, 0.75, 1.0)
    x = pool(x)
    for name, parts in (("conv3", 1), ("conv4", 2), ("conv5", 2)):
        x = f(convolution(name, x, 1, 1, parts)) if name in params else x
    x = pool(x)  # the source has it before the ReLU, with the same result
    shape = x.shape
    x = record(x.reshape(len(x), -1), lambda g: g.reshape(shape))
    for name, mask in zip(("fc6", "fc7"), masks or (1.0, 1.0), strict=True):
        if name in params and variant == "torchvision":
            x = f(fully_connected(name, drop(x, mask)))
        elif name in params:
            x = drop(f(fully_connected(name, x)), mask)
    logits = fully_connected("fc8", x)

    def backward(g):
        for gradient in reversed(tape):
            g = gradient(g)
        return gradients

    return logits, backward


def loss_and_gradients(params, images, labels, **how):
    """The mean cross-entropy, the logits and the gradients of all parameters; `how` as in `network`."""
    logits, backward = network(params, images, **how)
    return cross_entropy(logits, labels), logits, backward(cross_entropy_gradient(logits, labels))


# LPIPS (Zhang et al. 2018).


def lpips(convolutions, heads, a, b, spatial=False):
    """LPIPS of images [B, H, W, 3] from −1 to 1, for (kernel, bias) of networks that take normalized images."""
    shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # those of the authors' package
    x, y = ((image - shift) / scale for image in _float64(a, b))
    total = 0.0
    for i, (kernel, bias) in enumerate(convolutions):
        padding, stride = (((2, 2), (2, 2)) if i < 2 else ((1, 1), (1, 1))), 4 if i == 0 else 1
        x, y = (relu(conv(z, kernel, stride, padding) + bias) for z in (x, y))
        f, g = (z / (np.linalg.norm(z, axis=-1, keepdims=True) + 1e-10) for z in (x, y))
        distances = (f - g) ** 2 @ np.asarray(heads[i], np.float64)
        total = total + (bilinear(distances, *np.shape(a)[1:3]) if spatial else distances.mean((1, 2)))
        x, y = (max_pool(z) for z in (x, y)) if i < 2 else (x, y)
    return total


def bilinear(maps, height, width):
    """Maps [B, h, w] resized; corners are not aligned, and the edges are repeated."""
    for axis, size in ((1, height), (2, width)):
        old = maps.shape[axis]
        positions = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(positions).astype(int)
        weight = (positions - low).reshape((-1, 1) if axis == 1 else (-1,))
        high = np.minimum(low + 1, old - 1)
        maps = maps.take(low, axis) * (1 - weight) + maps.take(high, axis) * weight
    return maps
