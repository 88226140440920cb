"""The paper's network in PyTorch, which the benchmark alternates with.

It runs as a script in a process of its own and imports only torch and numpy. Each line of standard input is a request
in JSON, each line of standard output its answer. Arrays have JAX's layout.
"""

import json
import os
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


class AlexNet(nn.Module):
    """The network of section 3.5, with `groups=2` where a layer is confined to its tower; [B, C, H, W] to logits."""

    def __init__(self, image: int, channels: int, classes: int, widths: list[int]):
        super().__init__()
        one, two, three, four, five, six, seven = widths
        self.conv1 = nn.Conv2d(channels, one, 11, stride=4)
        self.conv2 = nn.Conv2d(one, two, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(two, three, 3, padding=1)
        self.conv4 = nn.Conv2d(three, four, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(four, five, 3, padding=1, groups=2)
        self.extra_padding = -(image - 11) % 4  # ceil mode
        side = (image + self.extra_padding - 11) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        self.fc6 = nn.Linear(side * side * five, six)
        self.fc7 = nn.Linear(six, seven)
        self.fc8 = nn.Linear(seven, classes)

    def lrn(self, x):  # section 3.3; PyTorch divides α by n
        return torch.cat([F.local_response_norm(t, 5, alpha=5 * 1e-4, beta=0.75, k=2.0) for t in x.chunk(2, 1)], 1)

    def dropout(self, x):  # section 4.2; PyTorch's scales by 2 in training
        return 0.5 * F.dropout(x, 0.5, self.training)

    def forward(self, x):
        x = F.pad(x, (0, self.extra_padding, 0, self.extra_padding))
        x = F.max_pool2d(self.lrn(F.relu(self.conv1(x))), 3, 2)
        x = F.max_pool2d(self.lrn(F.relu(self.conv2(x))), 3, 2)
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.max_pool2d(F.relu(self.conv5(x)), 3, 2).flatten(1)
        x = self.dropout(F.relu(self.fc6(x)))
        return self.fc8(self.dropout(F.relu(self.fc7(x))))


def _to_torch(layer: str, kernel: np.ndarray, last_maps: int) -> np.ndarray:
    """Return a kernel HWIO as OIHW, or [in, out] as [out, in]; fc6 reads the maps channel by channel."""
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    if layer == "fc6":
        side = round((kernel.shape[0] / last_maps) ** 0.5)
        kernel = kernel.reshape(side, side, last_maps, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    return kernel.T


def _to_jax(layer: str, kernel: np.ndarray, last_maps: int) -> np.ndarray:
    if kernel.ndim == 4:
        return kernel.transpose(2, 3, 1, 0)
    kernel = kernel.T
    if layer == "fc6":
        side = round((kernel.shape[0] / last_maps) ** 0.5)
        kernel = kernel.reshape(last_maps, side, side, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)
    return kernel


def compute(network: dict, source: str, target: str) -> dict:
    """Write logits and gradients without dropout into a .npz file, from images, labels and parameters in another.

    In float64: in float32 another of two nearly equal pixels may be the maximum of a pooling window.
    """
    arrays = {name: array.astype(np.float64) for name, array in np.load(source).items()}
    net = AlexNet(**network).double().eval()
    last_maps = network["widths"][4]
    with torch.no_grad():
        for layer in LAYERS:
            kernel = _to_torch(layer, arrays[f"{layer}/kernel"], last_maps)
            getattr(net, layer).weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel)))
            getattr(net, layer).bias.copy_(torch.from_numpy(arrays[f"{layer}/bias"]))
    logits = net(torch.from_numpy(arrays["images"].transpose(0, 3, 1, 2).copy()))
    F.cross_entropy(logits, torch.from_numpy(arrays["labels"]).long()).backward()
    results = {"logits": logits.detach().numpy()}
    for layer in LAYERS:
        module = getattr(net, layer)
        results[f"{layer}/kernel"] = _to_jax(layer, module.weight.grad.numpy(), last_maps)
        results[f"{layer}/bias"] = module.bias.grad.numpy()
    np.savez(target, **results)
    return {}


class Timed:
    """Train steps or inference on one random batch, which stays on the device."""

    def __init__(self, network: dict, batch: int, train: bool, dtype: str, compiled: bool, channels_last: bool):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        layout = torch.channels_last if channels_last else torch.contiguous_format
        net = AlexNet(**network).to(self.device, memory_format=layout).train(train)
        side = network["image"]
        images = 64 * torch.randn(batch, network["channels"], side, side, device=self.device)
        self.images = images.to(memory_format=layout)
        self.labels = torch.randint(0, network["classes"], (batch,), device=self.device)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
        self.net = torch.compile(net, dynamic=False) if compiled else net
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=dtype == "bfloat16")
        self.step = self.train_step if train else self.infer

    def train_step(self):
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            loss = F.cross_entropy(self.net(self.images), self.labels)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self):
        with self.autocast:
            return F.softmax(self.net(self.images), dim=1)

    def seconds(self, steps: int) -> float:
        """Return the seconds of so many steps after one that is not counted, until the device has finished."""
        cuda = self.device == "cuda"
        self.step()  # allocates the memory that was freed for the other programs
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if cuda:  # memory for the other modes and for JAX
            torch.cuda.empty_cache()
        return seconds


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of a compiler is not an answer
    timed = {}
    for line in sys.stdin:
        request = json.loads(line)
        ask = request.pop("ask")
        try:
            if ask == "version":
                answer = {"version": torch.__version__, "cuda": torch.cuda.is_available()}
            elif ask == "compute":
                answer = compute(**request)
            elif ask == "open":
                name = request.pop("name")
                timed[name] = Timed(**request)
                timed[name].seconds(1)  # which compiles
                answer = {"seconds": timed[name].seconds(1)}
            elif ask == "time":
                answer = {"seconds": timed[request["name"]].seconds(request["steps"])}
            else:
                timed.clear()
                answer = {}
        except Exception as error:  # a mode may fail (no compiler, no memory) without ending the others
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
