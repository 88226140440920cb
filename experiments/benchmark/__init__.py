"""The speed of the network, compared with the highest rates of the device and with PyTorch.

`python -m experiments.benchmark --workdir DIR` measures the parts; each has a module with a function `run`.
"""
