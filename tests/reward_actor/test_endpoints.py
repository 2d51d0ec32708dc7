"""Which endpoint is asked next, and what an address may be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_actor import AsyncRewardClient
from reward_actor.client.endpoints import Endpoints, parse_urls
from reward_actor.errors import RewardServiceError

outage = RewardServiceError("unavailable", "down", retryable=True)
busy = RewardServiceError("overloaded", "full", retryable=True, retry_after_s=5.0)
events = st.lists(st.tuples(st.sampled_from(["ok", "down", "busy"]), st.floats(0, 20)), max_size=40)


@given(st.integers(1, 4), events)
def test_nothing_is_chosen_that_is_aside_while_another_is_not(
    count: int, events: list[tuple[str, float]]
) -> None:
    endpoints = Endpoints([f"http://{n}" for n in range(count)])
    now = 100.0
    for event, later in events:
        now += later
        ready = [e for e in endpoints.all if e.aside_until <= now]
        pause = endpoints.pause_s(now, is_first=True)
        if ready:
            assert pause == 0
        elif all(e.is_overloaded for e in endpoints.all):
            assert 0 < pause <= 10
        else:
            assert pause == 0
        if not ready:
            assert 0 < endpoints.pause_s(now, is_first=False) <= 10
        chosen = endpoints.choose(now)
        assert not ready or chosen in ready
        if event == "ok":
            endpoints.succeeded(chosen)
            assert chosen.aside_until <= now
        else:
            failure = outage if event == "down" else busy
            endpoints.failed(chosen, failure, now, now)
            assert chosen.aside_until >= now + (failure.retry_after_s or 0)


@given(st.integers(1, 5), st.integers(1, 20))
def test_healthy_endpoints_take_turns(count: int, num_turns: int) -> None:
    endpoints = Endpoints([f"http://{n}" for n in range(count)])
    chosen = [endpoints.choose(1.0).url for _ in range(count * num_turns)]
    assert {chosen.count(url) for url in set(chosen)} == {num_turns}


def test_requests_that_fail_together_count_once() -> None:
    endpoints = Endpoints(["http://one"])
    [one] = endpoints.all
    for _ in range(50):
        endpoints.failed(one, outage, started=10.0, now=11.0)
    assert one.num_failures == 1
    assert one.aside_until <= 11.2
    for round_ in range(1, 20):
        endpoints.failed(one, outage, one.aside_until, one.aside_until + 1)
        assert one.num_failures == round_ + 1
    assert 5 <= one.aside_until - one.failed_at <= 10


def test_only_one_request_tries_an_endpoint_that_may_be_back() -> None:
    endpoints = Endpoints(["http://one", "http://two"])
    one, two = endpoints.all
    endpoints.failed(one, outage, 10.0, 10.0)
    chosen = [endpoints.choose(20.0) for _ in range(4)]
    assert chosen.count(one) == 1
    endpoints.succeeded(one)
    assert {id(endpoints.choose(20.0)) for _ in range(2)} == {id(one), id(two)}


def test_addresses_come_as_a_list_or_with_commas() -> None:
    expected = ["http://a:1", "https://b/x"]
    assert parse_urls("http://a:1/, https://b/x,http://a:1,") == expected
    assert parse_urls(["http://a:1", "https://b/x/"]) == expected


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ("localhost:8000", "http://"),
        ("ftp://host", "http://"),
        ("", "urls is empty"),
        ([], "urls is empty"),
        ("http://me:canary@host", "token="),
    ],
)
def test_an_address_that_is_none_is_refused(urls: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        AsyncRewardClient(urls)
    assert "canary" not in str(refused.value)
