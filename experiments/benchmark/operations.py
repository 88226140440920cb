"""The time of a train step with the project's own operations, compared with XLA's."""

import statistics
from typing import Any

import jax

from alexnet_jax import AlexNet
from alexnet_jax.configs import fashion_mnist
from alexnet_jax.ops import PLAIN, ops_for
from alexnet_jax.setup import build_model
from experiments import measure
from experiments.benchmark.programs import training_step
from experiments.benchmark.setting import Setting

OWN = ("conv", "max_pool", "local_response_norm")  # the operations that differ from XLA's


def with_plain(model: AlexNet, *names: str) -> AlexNet:
    """Return the network with these of its operations replaced by XLA's."""
    ops = model.ops or ops_for(jax.devices()[0])
    return model.clone(ops=ops._replace(**{name: getattr(PLAIN, name) for name in names}))


def run(setting: Setting) -> dict[str, Any]:
    """Measure a step with the project's operations, and with XLA's for each and for all of `OWN`, in alternation."""
    compact = build_model(fashion_mnist.get_config(), 10)
    networks = {
        "the paper's": (setting.model, setting.batches[-1], setting.shape),
        "the default config's": (compact, 64, (28, 28, 1)),
    }
    records = []
    for network_name, (model, batch, shape) in networks.items():
        steps = {}
        for names in ((), *((name,) for name in OWN), OWN):
            steps[names] = training_step(with_plain(model, *names), batch, shape).run
        counts = {names: measure.repeats(measure.seconds(step, 2)) for names, step in steps.items()}
        rounds = [{names: measure.seconds(step, counts[names]) for names, step in steps.items()}
                  for _ in range(setting.rounds)]  # fmt: skip
        medians = {names: statistics.median(times[names] for times in rounds) for names in steps}
        records += [
            {"network": network_name, "batch": batch, "plain": names, "seconds": seconds,
             "ratio": seconds / medians[()], "rounds_s": [times[names] for times in rounds]}
            for names, seconds in medians.items()
        ]  # fmt: skip
    return {"records": records}
