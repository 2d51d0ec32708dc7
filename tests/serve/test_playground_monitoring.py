"""The playground's second tab, in a real headless Chromium, on the real service."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from reward_actor.schema import MonitorReply

if TYPE_CHECKING:
    from playwright.sync_api import Route
    from visits import Visit


EDGES = [-2.0, -1.0, 0.0, 1.0, 2.0]
DRIFTED = {
    "model_version": "sha256:" + "a" * 64,
    "num_rewards": 1234,
    "mean": 1.1,
    "std": 0.4,
    "live": {"edges": EDGES, "shares": [0.0, 0.0, 0.4, 0.6]},
    "held_out": {"edges": EDGES, "shares": [0.1, 0.4, 0.4, 0.1]},
    "drift": 2.5,
    "length_correlation": 0.7,
    "share_at_extremes": 0.3,
    "warnings": [
        {"type": "drift", "message": "PSI 2.5 <b>"},
        {"type": "length", "message": "correlation 0.7"},
        {"type": "extremes", "message": "30 %"},
    ],
}
UNKNOWN = {
    **dict.fromkeys(
        ("mean", "std", "live", "held_out", "drift", "length_correlation", "share_at_extremes")
    ),
    "model_version": "sha256:" + "b" * 64,
    "num_rewards": 1,
    "warnings": [],
}


def test_monitoring_shows_what_has_drifted_and_what_to_do(visit: Callable[..., Visit]) -> None:
    replies = [{"models": [DRIFTED, UNKNOWN]}, {"models": [UNKNOWN]}]
    for reply in replies:
        MonitorReply.model_validate(reply)
    asked: list[int] = []

    def monitor(route: Route) -> None:
        asked.append(1)
        route.fulfill(json=replies[len(asked) > 1])

    one = visit(routes={"**/v1/monitor": monitor})
    page = one.page
    page.get_by_role("tab", name="Monitoring").click()
    first = page.locator(".monitored").first
    first.wait_for()
    assert first.locator("h3, .badge, .count").all_text_contents() == [
        "aaaaaaaa",
        "served now",
        "1,234 rewards",
    ]
    assert first.locator("rect.live").count() == len(EDGES) - 1
    assert first.locator("path.held-out").count() == 1
    assert first.locator(".warnings li").count() == 3
    assert "PSI 2.5 <b>" in first.locator(".warnings").inner_text()
    assert "rayward eval" in first.locator(".warnings").inner_text()
    figures = first.locator(".figures strong").all_text_contents()
    assert figures == ["+1.100", "0.400", "2.500", "+0.700", "30.0 %"]
    first.get_by_text("The same as a table").click()
    assert "60.0 %" in first.locator("table").inner_text()
    assert (
        page.locator(".monitored").nth(1).locator(".figures strong").first.inner_text()
        == "not known"
    )
    page.locator(".monitored", has_text="aaaaaaaa").wait_for(state="detached")
    assert page.locator(".monitored .badge").all_text_contents() == ["served now"]
    page.get_by_role("tab", name="Score").click()
    before = len(asked)
    page.wait_for_timeout(2300)
    assert len(asked) <= before + 1, "a tab that nobody looks at asks for nothing"


@pytest.mark.parametrize("reply", [404, 401, {"models": [{**UNKNOWN, "num_rewards": 0}]}])
def test_monitoring_without_anything_to_show_says_so(
    visit: Callable[..., Visit], reply: Any
) -> None:
    def monitor(route: Route) -> None:
        if isinstance(reply, int):
            route.fulfill(status=reply, json={"error": {"type": "not_found", "message": ""}})
        else:
            route.fulfill(json=reply)

    one = visit(routes={"**/v1/monitor": monitor})
    one.page.get_by_role("tab", name="Monitoring").click()
    titles = {404: "No monitoring here", 401: "This service asks for a token"}
    title = titles[reply] if isinstance(reply, int) else "No rewards yet"
    one.page.get_by_role("heading", name=title).wait_for()
    one.ignore_load_errors()


def test_monitoring_of_this_service(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.score()
    one.page.get_by_role("tab", name="Monitoring").click()
    current = one.page.locator(".monitored").first
    current.wait_for()
    assert current.locator("h3").text_content() == one.page.locator("#fact-version").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit: Callable[..., Visit], scheme: str) -> None:
    def monitor(route: Route) -> None:
        route.fulfill(json={"models": [DRIFTED, UNKNOWN]})

    one = visit(routes={"**/v1/monitor": monitor}, color_scheme=scheme, bypass_csp=True)
    one.page.get_by_role("tab", name="Monitoring").click()
    one.page.locator(".monitored").first.wait_for()
    one.check_accessibility()
