"""How fast the network is, compared with what the device reaches at best and with PyTorch.

`python -m experiments.benchmark --workdir DIR` measures the parts; each has a module with a function `run`.
"""
