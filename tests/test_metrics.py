import resource

import pytest

from alexnet_jax.metrics import Metrics


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
