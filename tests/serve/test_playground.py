"""The playground in a real headless Chromium, on the real service."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import httpx
import pytest
from visits import COMPLETIONS, PROMPT, Visit

from reward_actor import Group, RewardClient
from reward_actor.explain import explain
from reward_actor.schema import Info

if TYPE_CHECKING:
    from playwright.sync_api import Route

    from reward_actor import RewardScorer

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</textarea><script>alert(1)</script>",
    "\"'><svg/onload=alert(1)>&lt;b&gt;",
]


def test_the_page_and_its_files_come_with_a_strict_policy(service: str) -> None:
    with httpx.Client(base_url=service) as http:
        page = http.get("/playground")
        names = re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text)
        replies = [page, *(http.get(f"/{name}") for name in names)]
        for reply in replies:
            assert reply.status_code == 200
            policy = reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert reply.headers["x-content-type-options"] == "nosniff"
        for path in ("routes.py", "..%2froutes.py", "%2e%2e/http.py", "nope.js"):
            assert http.get(f"/playground/{path}").status_code == 404


def test_the_api_page_needs_no_network(visit: Callable[..., Visit]) -> None:
    one = visit(routes={"https://**": lambda route: route.abort()})
    page = one.page
    page.get_by_role("link", name="API").click()
    page.locator("#operations-score-score_v1_score_post .opblock-summary").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    page.locator(".live-responses-table .response-col_status", has_text="200").wait_for()
    page.get_by_text("model_version").first.wait_for()


def test_rewards_and_ranks_are_those_of_the_api(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.write([*COMPLETIONS, "word " * 500, COMPLETIONS[0]])
    one.score()
    with RewardClient(one.url) as client:
        expected = client.score(PROMPT, [*COMPLETIONS, "word " * 500, COMPLETIONS[0]])
    cards = one.page.locator(".card")
    shown = [card.locator(".reward").get_attribute("data-value") for card in cards.all()]
    known = [reward for reward in expected.rewards if reward is not None]
    for value, reward in zip(shown, expected.rewards, strict=True):
        assert (float(value) if value else None) == pytest.approx(reward, abs=1e-5)
    ranks = [
        "not scored" if r is None else f"rank {1 + sum(other > r for other in known)}"
        for r in expected.rewards
    ]
    assert one.texts(".rank") == ranks
    assert ranks[0] == ranks[3]
    assert f"{expected.num_tokens[0]} tokens" in one.texts(".numbers")[0]
    assert one.texts(".sample-error")[2].startswith("too_long: ")
    assert cards.nth(2).locator(".token").count() == 0


def test_the_heat_map_has_one_cell_a_token_with_its_reward(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.write(COMPLETIONS)
    [result] = one.score()["results"]
    for index in range(len(COMPLETIONS)):
        cells = one.page.locator(".card").nth(index).locator(".token")
        found = cells.evaluate_all("cells => cells.map(c => [c.dataset.reward, c.dataset.part])")
        assert [float(reward) for reward, _ in found] == result["token_rewards"][index]
        num_prompt = result["num_prompt_tokens"][index]
        parts = [part for _, part in found]
        assert parts == ["prompt"] * num_prompt + ["completion"] * (len(found) - num_prompt)
        assert float(found[-1][0]) == pytest.approx(result["rewards"][index], abs=1e-5)
        assert "pooled" in (cells.last.get_attribute("class") or "")
        text = "".join(cells.all_text_contents()[num_prompt:])
        if index == 1:
            assert text.startswith("A·hammer.⏎⏎And·a⇥saw,·")
    low, high = one.texts("#scale-low, #scale-high")
    largest = max(abs(reward) for row in result["token_rewards"] for reward in row)
    assert (low, high) == (f"−{largest:.3f}", f"+{largest:.3f}")
    one.page.get_by_label("Prompt tokens").uncheck()
    assert one.page.locator(".token[data-part=prompt]:visible").count() == 0


def test_a_reward_is_explained_when_it_is_asked_for(
    visit: Callable[..., Visit], offline: RewardScorer
) -> None:
    one = visit()
    one.write(COMPLETIONS)
    cards = one.page.locator(".card")
    assert not cards.nth(1).locator(".why").is_visible()
    one.score()
    cards.nth(1).get_by_text("How this reward comes about").click()
    shown = cards.nth(1).locator(".why pre")
    shown.get_by_text("<- read here").wait_for()
    printed = list(explain(offline, Group(PROMPT, COMPLETIONS[1:])))
    text = shown.inner_text()
    for line in printed[printed.index("completion 0") + 1 :]:
        assert line[2:] in text.splitlines()
    assert f"version {offline.model_version}" in text
    assert cards.nth(0).locator(".why pre").text_content() == "…", "only what is opened is asked"
    # What was scored again is explained again.
    one.write(["A spoon.", "A pan."])
    one.score()
    assert not shown.is_visible()
    cards.nth(1).get_by_text("How this reward comes about").click()
    shown.get_by_text("pan").wait_for()


def test_an_explanation_that_fails_says_so_and_can_be_asked_again(
    visit: Callable[..., Visit],
) -> None:
    left = iter([503])

    def refuse_once(route: Route) -> None:
        if next(left, None) is None:
            route.continue_()
            return
        error = {"type": "unavailable", "message": "", "retryable": True, "index": None}
        route.fulfill(status=503, json={"error": error})

    one = visit(routes={"**/v1/explain": refuse_once})
    one.score()
    why = one.page.locator(".card .why").first
    why.locator("summary").click()
    why.get_by_text("not ready").wait_for()
    why.locator("summary").click()
    why.locator("summary").click()
    why.get_by_text("<- read here").wait_for()
    one.ignore_load_errors()


def test_a_conversation_as_json_takes_the_place_of_the_turns(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.write(COMPLETIONS)
    one.page.get_by_text("A conversation as JSON, with tools").click()
    field = one.page.locator("#as-json")
    turns = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": "Apples."},
        {"role": "user", "content": "And more?"},
    ]
    field.fill(json.dumps({"prompt": turns}))
    [result] = one.score()["results"]
    with RewardClient(one.url) as client:
        expected = client.score(turns, COMPLETIONS)
    assert result["rewards"] == pytest.approx(expected.rewards, abs=1e-5)
    # The template of this model writes no calls.
    turns[1] |= {"content": None, "tool_calls": [{"function": {"name": "fruits"}}]}
    field.fill(json.dumps({"prompt": turns}))
    [result] = one.score()["results"]
    assert result["rewards"] == [None] * len(COMPLETIONS)
    assert "tool call 0 of message 1" in one.texts(".sample-error")[0]
    for text, told in (("{", "The conversation is no JSON"), ("[1]", "must be a JSON object")):
        field.fill(text)
        one.page.get_by_role("button", name="Score").click()
        assert told in one.texts("#status")[0]


def test_what_is_served_and_how_long_it_took(visit: Callable[..., Visit]) -> None:
    one = visit()
    info = Info.model_validate(httpx.get(f"{one.url}/info").json())
    assert one.texts("#fact-model, #fact-dtype, #fact-path, #fact-replicas") == [
        info.model,
        info.dtype,
        info.path,
        str(info.num_replicas),
    ]
    version = one.page.locator("#fact-version")
    assert version.text_content() == info.model_version.removeprefix("sha256:")[:8]
    one.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    version.click()
    assert one.page.evaluate("navigator.clipboard.readText()") == info.model_version
    one.score()
    latency = one.page.locator("#fact-latency")
    assert re.fullmatch(r"[\d.]+ m?s queue [\d.]+ ms · score [\d.]+ ms", latency.inner_text())


def test_the_keyboard_alone_is_enough(visit: Callable[..., Visit]) -> None:
    one = visit()
    page = one.page
    focused = "document.activeElement.getAttribute('aria-label') || document.activeElement.id"
    order = []
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
    assert order[:2] == ["API", "Dark colours"] or order[1] == "Dark colours"
    assert order[3:7] == ["tab-score", "add-turn", "Role of turn 1", "Text of turn 1"]
    page.get_by_label("Completion 2", exact=True).focus()
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".card.scored .token")
    tokens = page.locator(".card").first.locator(".token")
    # From the field, one Tab leads to the tokens: to the first of the completion.
    page.get_by_label("Completion 1", exact=True).focus()
    page.keyboard.press("Tab")
    start = page.evaluate("document.activeElement.dataset.part")
    at = int(tokens.evaluate_all("cells => cells.indexOf(document.activeElement)"))
    assert start == "completion"
    page.keyboard.press("ArrowRight")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    reward = tokens.nth(at + 1).get_attribute("data-reward")
    assert f"{abs(float(reward or 0)):.3f}" in label
    assert f"token {at + 2} of {tokens.count()}, completion" in label
    assert f"token {at + 2} of" in one.texts(".readout")[0]
    page.keyboard.press("ArrowUp")
    assert tokens.evaluate_all("cells => cells.indexOf(document.activeElement)") < at + 1
    page.keyboard.press("End")
    assert "pooled" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.locator("#tab-score").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-monitor").is_visible()
    assert page.evaluate("document.activeElement.id") == "tab-monitor"
    page.keyboard.press("Home")
    assert page.locator("#panel-score").is_visible()
    assert not page.locator("#panel-monitor").is_visible()
    one.ignore_load_errors()


def test_hostile_text_stays_text(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.write(HOSTILE, prompt=HOSTILE[0])
    before = one.page.locator("img, script, svg").count()
    one.score()
    assert one.page.locator("img, script, svg").count() == before
    shown = [row.replace("·", " ") for row in one.texts(".tokens")]
    for completion, row in zip(HOSTILE, shown, strict=True):
        assert completion in row
    assert one.page.locator(".token *").count() == 0


def test_a_conversation_is_sent_as_messages(visit: Callable[..., Visit]) -> None:
    one = visit()
    page = one.page
    page.get_by_role("button", name="Add a turn").click()
    page.get_by_label("Role of turn 1").select_option("system")
    page.get_by_label("Role of turn 2").select_option("user")
    page.get_by_label("Text of turn 1").fill("Be brief.")
    page.get_by_label("Text of turn 2").fill(PROMPT)
    [result] = one.score()["results"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    completions = page.locator(".card textarea").evaluate_all("all => all.map(a => a.value)")
    with RewardClient(one.url) as client:
        assert result["rewards"] == pytest.approx(client.score(messages, completions).rewards)
    page.get_by_label("Text of turn 2").fill("Another prompt.")
    assert page.locator(".card.stale").count() == len(completions)
    page.get_by_role("button", name="Remove turn 1").click()
    assert page.locator(".turn").count() == 1


def test_two_to_eight_completions(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.write(["a"] * 8)
    assert one.page.get_by_role("button", name="Add a completion").is_disabled()
    one.write(["a"] * 2)
    assert one.page.get_by_role("button", name="Remove completion 1").is_disabled()


def test_light_and_dark(visit: Callable[..., Visit]) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme).page
        ground = "getComputedStyle(document.body).backgroundColor"
        grounds[scheme] = page.evaluate(ground)
        page.get_by_role("button", name="Dark colours").click()
        grounds[f"{scheme}, pressed"] = page.evaluate(ground)
    assert grounds["light"] == grounds["dark, pressed"] != grounds["dark"]
    assert grounds["dark"] == grounds["light, pressed"]


def test_a_narrow_screen_has_nothing_to_scroll_sideways_and_nothing_jumps(
    visit: Callable[..., Visit],
) -> None:
    one = visit(viewport={"width": 360, "height": 740})
    shifts = one.page.evaluate(
        "new Promise(done => { let sum = 0; new PerformanceObserver(list => {"
        " for (const e of list.getEntries()) if (!e.hadRecentInput) sum += e.value; })"
        ".observe({type: 'layout-shift', buffered: true}); setTimeout(() => done(sum), 300); })"
    )
    assert shifts < 0.01
    one.write([*COMPLETIONS, "w" * 200])
    one.score()
    assert one.page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_token_is_asked_for_once_and_kept_in_memory_only(visit: Callable[..., Visit]) -> None:
    """The service of these tests knows no tokens; the guard stands before it."""
    sent: list[str | None] = []

    def guard(route: Route) -> None:
        sent.append(route.request.headers.get("authorization"))
        if sent[-1] == "Bearer right":
            route.continue_()
        else:
            error = {"type": "unauthenticated", "message": "no token", "retryable": False}
            route.fulfill(status=401, json={"error": {**error, "index": None}})

    one = visit(routes={"**/info": guard, "**/v1/score": guard}, ready=False)
    page = one.page
    field_ = page.get_by_label("Bearer token")
    field_.fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("did not accept that token").wait_for()
    assert field_.input_value() == ""
    field_.fill("right")
    page.keyboard.press("Enter")
    page.wait_for_selector("#state[data-state=ready]")
    assert one.score()["results"]
    assert sent[:3] == [None, "Bearer wrong", "Bearer right"]
    assert set(sent[3:]) == {"Bearer right"}
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [
        0,
        0,
        "",
    ]
    one.ignore_load_errors()


def test_errors_say_what_to_do(visit: Callable[..., Visit]) -> None:
    cases = [
        (422, "invalid_request", "refused this: too odd"),
        (403, "forbidden", "does not allow it: too odd"),
        (429, "overloaded", "more work than it takes"),
        (503, "unavailable", "not ready"),
        (500, "internal", "too odd"),
        (0, "", "cannot be reached"),
    ]
    left = iter(cases)

    def refuse(route: Route) -> None:
        status, type_, _ = next(left)
        if not status:
            route.abort()
            return
        error = {"type": type_, "message": "too odd", "retryable": False, "index": None}
        route.fulfill(status=status, json={"error": error})

    one = visit(routes={"**/v1/score": refuse})
    for _, _, told in cases:
        one.page.get_by_role("button", name="Score").click()
        one.page.locator("#status.error", has_text=told).wait_for()
        assert one.page.locator("#cards").get_attribute("aria-busy") == "false"
    one.ignore_load_errors()


def test_a_service_that_is_not_ready_is_waited_for(visit: Callable[..., Visit]) -> None:
    asked: list[int] = []

    def later(route: Route) -> None:
        asked.append(1)
        if len(asked) == 1:
            error = {"type": "unavailable", "message": "", "retryable": True, "index": None}
            route.fulfill(status=503, json={"error": error})
        else:
            route.continue_()

    one = visit(routes={"**/info": later}, ready=False)
    one.page.wait_for_selector("#state[data-state=waiting]")
    one.page.wait_for_selector("#state[data-state=ready]")
    one.ignore_load_errors()


def test_a_service_that_sleeps_is_asked_until_it_is_awake(visit: Callable[..., Visit]) -> None:
    asked: list[int] = []

    def sleepy(route: Route) -> None:
        asked.append(1)
        route.fulfill(json={**route.fetch().json(), "asleep": len(asked) == 1})

    one = visit(routes={"**/info": sleepy}, ready=False)
    one.page.wait_for_selector("#state[data-state=asleep]")
    one.page.wait_for_selector("#state[data-state=ready]")


def test_members_of_an_ensemble_are_named(visit: Callable[..., Visit]) -> None:
    """The real replies, with the rewards of members that an ensemble would add."""

    def with_members(route: Route) -> None:
        reply = route.fetch().json()
        for result in reply["results"]:
            n = len(result["rewards"])
            result["named_rewards"] = {"<b>one</b>": [1.25] * n, "two": [-0.5] * n}
            result["spread"] = [0.875] * n
        route.fulfill(json=reply)

    one = visit(routes={"**/v1/score": with_members})
    one.score()
    assert one.texts(".members")[0] == "<b>one</b> +1.250two −0.500"
    assert "spread 0.875" in one.texts(".numbers")[0]


def test_a_text_models_prompt_is_one_text(visit: Callable[..., Visit]) -> None:
    def as_text(route: Route) -> None:
        route.fulfill(json={**route.fetch().json(), "format": "text"})

    one = visit(routes={"**/info": as_text})
    one.page.wait_for_selector(".turns.plain")
    assert not one.page.get_by_role("button", name="Add a turn").is_visible()
    with one.page.expect_request("**/v1/score") as sent:
        one.page.get_by_role("button", name="Score").click()
    assert isinstance(sent.value.post_data_json["groups"][0]["prompt"], str)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit: Callable[..., Visit], scheme: str) -> None:
    one = visit(color_scheme=scheme, bypass_csp=True)
    one.write([*COMPLETIONS, "word " * 500])
    one.score()
    one.page.locator(".why summary").first.click()
    one.page.get_by_text("<- read here").wait_for()
    one.page.locator(".token").last.focus()
    one.check_accessibility()
    one.page.evaluate("document.getElementById('token-dialog').showModal()")
    one.check_accessibility()
