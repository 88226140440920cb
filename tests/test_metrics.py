import json
import resource

import pytest

from alexnet_jax.metrics import Metrics
from alexnet_jax.runtime.files import write_json


def test_a_full_disk_is_raised_by_write_and_not_by_close(tmp_path):
    metrics, limits = Metrics(tmp_path, 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            for step in range(100):
                metrics.write(step, loss=0.5)
        metrics.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_numbers_that_are_not_finite_are_null_since_json_has_none(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    metrics = Metrics(tmp_path, 0)
    metrics.write(1, loss=float("nan"), error=0.5)
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "error": 0.5}
    write_json(tmp_path / "result.json", {"errors": [float("inf"), 1.0], "center": {"loss": float("nan")}, "steps": 3})
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert result == {"errors": [None, 1.0], "center": {"loss": None}, "steps": 3}
