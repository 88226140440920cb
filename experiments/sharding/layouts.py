"""The layouts: a mesh, and for XLA's partitioner the rules that say how each layer is split."""

import re
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec as P

from alexnet_jax import AlexNet
from alexnet_jax.errors import UserError
from alexnet_jax.model import LAYERS
from alexnet_jax.sharding import DATA, tower_specs


class Rule(NamedTuple):
    """How the layers whose name matches are split by XLA's partitioner."""

    layers: str  # a regular expression
    kernels: str | None = None  # the mesh axis that splits the output channels (units)
    gather: bool = False  # whether the parts of the kernels are gathered before use
    batch: str | None = DATA  # the mesh axis that splits the batch of this layer; None: each device has all of it


class Layout(NamedTuple):
    """A mesh, and the partition rules; without rules the project's own train step, which places its collectives."""

    name: str
    data: int  # devices along `data`; −1: the number of devices ÷ `tower`
    tower: int
    rules: tuple[Rule, ...] = ()

    def rule(self, layer: str) -> Rule:
        """Return the first rule that matches a layer."""
        return next(rule for rule in self.rules if re.match(rule.layers, layer))


LAYOUTS = (
    Layout("one_device", 1, 1),
    Layout("data", -1, 1),
    Layout("tower", 1, 2),
    Layout("data_tower", -1, 2),
    # Krizhevsky (2014), "One weird trick": convolutions split the batch, fully connected layers split their units.
    Layout("one_weird_trick", -1, 1, (Rule("conv"), Rule("fc", kernels=DATA, batch=None))),
    # FSDP (ZeRO-3): every parameter is stored in parts, and gathered when its layer needs it.
    Layout("fsdp", -1, 1, (Rule("", kernels=DATA, gather=True),)),
)


def title(name: str) -> str:
    """Return a layout's name as tables and plots show it."""
    return "FSDP" if name == "fsdp" else name.replace("_", " ")


def param_specs(layout: Layout, params: Any) -> Any:
    """Return the partition of the parameters: the last axis of each over the mesh axis of its layer's rule."""
    if not layout.rules:
        return tower_specs(params)
    return {
        layer: {name: P(*(None,) * (x.ndim - 1), layout.rule(layer).kernels) for name, x in leaves.items()}
        for layer, leaves in params.items()
    }


def fit(layout: Layout, model: AlexNet, devices: int, batch: int) -> Layout:
    """Return the layout with its number of devices along `data`.

    Raises:
      UserError: the layout, the batch or the widths do not fit the devices.
    """
    data = devices // layout.tower if layout.data == -1 else layout.data
    if not data or data * layout.tower > devices or layout.data == -1 and devices % layout.tower:
        raise UserError(f"--devices={devices}: {layout.name} needs a multiple of {layout.tower}")
    if layout.tower > model.towers:
        raise UserError(f"--layout={layout.name}: the network has one tower; expected a layout without towers")
    if batch < 1 or batch % data:
        raise UserError(f"--batch={batch}: {layout.name} splits a batch into {data} parts; expected a multiple of it")
    widths = dict(zip(LAYERS, (*model.widths, model.num_classes), strict=True))
    for layer, width in widths.items():
        if layout.rules and layout.rule(layer).kernels and width % data:
            raise UserError(
                f"--devices={devices}: {layout.name} splits the {width} output channels of {layer} into {data} parts; "
                "expected a divisor of it"
            )
    return layout._replace(data=data)
