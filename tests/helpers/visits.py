"""A page of the playground, as the tests see it: what they do on it, and what went wrong there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

PROMPT = "Name two fruits."
COMPLETIONS = ["An apple and a pear.", "A hammer.\n\nAnd a\tsaw, 日本."]

# Those of WCAG 2.2, A and AA, contrast among them.
_ACCESSIBILITY = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@dataclass
class Visit:
    """A page and what went wrong on it: messages of the console, requests to elsewhere."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def write(self, completions: list[str], prompt: str = PROMPT) -> None:
        self.page.get_by_label("Text of turn 1").fill(prompt)
        cards = self.page.locator(".card")
        while cards.count() < len(completions):
            self.page.get_by_role("button", name="Add a completion").click()
        while cards.count() > len(completions):
            cards.last.get_by_role("button", name="Remove").click()
        for index, completion in enumerate(completions):
            cards.nth(index).locator("textarea").fill(completion)

    def score(self) -> dict[str, Any]:
        """Press the button; what the service replied, once it is on the page."""
        with self.page.expect_response("**/v1/score") as reply:
            self.page.get_by_role("button", name="Score").click()
        self.page.wait_for_selector("#cards[aria-busy=false]")
        body: dict[str, Any] = reply.value.json()
        return body

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_text_contents()

    def ignore_load_errors(self) -> None:
        """Chromium writes a line for every status above 399, whoever handles it."""
        self.complaints[:] = [
            text for text in self.complaints if "Failed to load resource" not in text
        ]

    def check_accessibility(self) -> None:
        """axe-core's rules. It writes HTML of its own, which the page's policy forbids to everyone:
        for a visit with bypass_csp."""
        from axe_playwright_python.sync_playwright import Axe

        options = {"runOnly": {"type": "tag", "values": _ACCESSIBILITY}}
        found = Axe().run(self.page, options=options)
        assert found.violations_count == 0, found.generate_report()


@contextmanager
def visits(chrome: Browser, service: str) -> Iterator[Callable[..., Visit]]:
    """Opens the playground; a page that complained or asked elsewhere fails its test."""
    made: list[Visit] = []

    def open_(
        *,
        routes: dict[str, Callable[[Route], None]] | None = None,
        ready: bool = True,
        **options: Any,
    ) -> Visit:
        context = chrome.new_context(**options)
        context.set_default_timeout(10_000)
        page = context.new_page()
        one = Visit(page, service)
        page.on("console", lambda message: one.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: one.complaints.append(str(error)))
        page.on("dialog", lambda dialog: one.complaints.append(f"alert: {dialog.message}"))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(service) else one.foreign.append(request.url)
            ),
        )
        for pattern, handler in (routes or {}).items():
            page.route(pattern, handler)
        page.goto(f"{service}/playground")
        if ready:
            page.wait_for_selector("#state[data-state=ready]")
        made.append(one)
        return one

    yield open_
    for one in made:
        one.page.unroute_all(behavior="ignoreErrors")
        one.page.context.close()
        assert one.foreign == []
        assert one.complaints == []
