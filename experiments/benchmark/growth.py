"""How the time of a train step grows with the image, the batch, the width and the devices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import measure
from experiments.benchmark.programs import training_step
from experiments.benchmark.setting import Setting
from experiments.sharding import Layout
from experiments.sharding import measure as measure_layout


def exponent(curve: Sequence[dict[str, Any]]) -> float:
    """Return p of seconds ≈ c · FLOP^p over the three largest points: 1 is linear, less is better."""
    work, seconds = (np.log([point[name] for point in curve[-3:]]) for name in ("flops", "seconds"))
    return float(np.polyfit(work, seconds, 1)[0])


def run(setting: Setting) -> dict[str, Any]:
    """Measure a train step against the image's side, the batch and the width, one at a time."""
    model, side, channels = setting.model, setting.shape[0], setting.shape[2]
    middle = setting.batches[min(1, len(setting.batches) - 1)]

    def point(value, model, batch, side):
        call = training_step(model, batch, (side, side, channels))
        return {"value": value, "flops": call.cost["flops"], "program_bytes": call.cost["program_bytes"],
                "seconds": measure.median_seconds(call.run, setting.rounds)}  # fmt: skip

    def wider(factor):
        return model.clone(widths=tuple(2 * round(factor * w / 2) for w in model.widths))

    sides = (side, 2 * side) if setting.quick else (side // 2, 3 * side // 4, side, 3 * side // 2)
    factors = (1, 2) if setting.quick else (0.25, 0.5, 1, 1.5)
    curves = {
        "image side": [point(s, model, middle, s) for s in sides],
        **({"batch": [point(b, model, b, side) for b in setting.batches]} if len(setting.batches) > 1 else {}),
        "width": [point(factor, wider(factor), middle, side) for factor in factors],
    }
    return {"batch": middle, "curves": curves, "exponents": {name: exponent(curve) for name, curve in curves.items()}}


def run_devices(setting: Setting) -> dict[str, Any]:
    """Measure a data-parallel train step of one batch on 1, 2, 4 … devices; virtual ones share a CPU's cores."""
    batch = setting.batches[-1]
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count() and batch % n == 0]
    records = [
        measure_layout(Layout(f"{n} devices", n, 1), setting.model, setting.shape, batch, setting.rounds)
        for n in counts
    ]
    return {
        "batch": batch, "virtual": jax.devices()[0].platform == "cpu",
        "curve": [{"value": n, "seconds": r["step_s"]} for n, r in zip(counts, records, strict=True)],
    }  # fmt: skip
