"""How many replicas the queue asks for, and the limits that go together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.autoscaling import wanted_replicas
from serve.config import ServeConfig


@given(st.floats(0, 1e9), st.floats(0, 1e6), st.floats(0.1, 100), st.integers(0, 1000))
def test_enough_replicas_work_the_queue_off_in_time_and_no_more(
    queued: float, rate: float, target_s: float, num_requests: int
) -> None:
    wanted = wanted_replicas(queued, rate, target_s, num_requests)
    if not queued:
        assert wanted == (num_requests > 0)
        return
    each = max(rate, 1.0) * target_s
    assert wanted * each >= queued * (1 - 1e-9)
    assert wanted == 1 or (wanted - 1) * each < queued


def test_scaling_needs_an_upper_end() -> None:
    with pytest.raises(ValueError, match="min_replicas needs max_replicas"):
        ServeConfig(model="m", min_replicas=0)
    with pytest.raises(ValueError, match="min_replicas is above max_replicas"):
        ServeConfig(model="m", min_replicas=3, max_replicas=2)
