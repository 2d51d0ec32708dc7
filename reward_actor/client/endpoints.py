"""Which of several addresses of the service is asked next. No network, no clock of its own.

An endpoint that failed is left aside for a while that grows and is random; one that is overloaded,
for as long as it says. Times are those of time.monotonic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from reward_actor.errors import RewardServiceError, backoff_s


@dataclass
class Endpoint:
    """One address; `error` is the last one since it answered."""

    url: str
    aside_until: float = 0.0
    failed_at: float = 0.0
    num_failures: int = 0
    error: RewardServiceError | None = None

    @property
    def is_overloaded(self) -> bool:
        return self.error is not None and self.error.type == "overloaded"


class Endpoints:
    """The addresses in turn, those that are aside last."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.all = [Endpoint(url) for url in urls]
        self._next = 0

    def num_ready(self, now: float) -> int:
        return sum(endpoint.aside_until <= now for endpoint in self.all)

    def pause_s(self, now: float, *, is_first: bool) -> float:
        """Seconds before a request may be sent. Its first attempt waits only where all endpoints
        have said that they are overloaded; the others wait for one that is not aside."""
        if self.num_ready(now) or (is_first and not all(e.is_overloaded for e in self.all)):
            return 0.0
        return min(endpoint.aside_until for endpoint in self.all) - now

    def least_bad(self) -> Endpoint:
        """Of endpoints that are all aside: the first to come back, but those that asked for a pause
        after the others."""
        return min(self.all, key=lambda e: (e.is_overloaded, e.aside_until))

    def choose(self, now: float) -> Endpoint:
        """The next one in turn that is not aside, or the least bad one."""
        count = len(self.all)
        turns = [self.all[(self._next + step) % count] for step in range(count)]
        ready = [endpoint for endpoint in turns if endpoint.aside_until <= now]
        chosen = ready[0] if ready else self.least_bad()
        self._next = (self.all.index(chosen) + 1) % count
        if chosen.error is not None and len(ready) > 1:
            # One request tries whether it is back; the others need not find out with it.
            chosen.aside_until = now + backoff_s(chosen.num_failures)
        return chosen

    @staticmethod
    def succeeded(endpoint: Endpoint) -> None:
        endpoint.aside_until, endpoint.num_failures, endpoint.error = 0.0, 0, None

    @staticmethod
    def failed(endpoint: Endpoint, error: RewardServiceError, started: float, now: float) -> None:
        """Leave it aside after a request that was sent at `started`. Those that were under way
        together count once."""
        until = now + (error.retry_after_s or 0.0)
        if started >= endpoint.failed_at:
            until = max(until, now + backoff_s(endpoint.num_failures))
            endpoint.num_failures += 1
            endpoint.failed_at = now
        endpoint.error = error
        endpoint.aside_until = max(endpoint.aside_until, until)


def parse_urls(urls: str | Sequence[str]) -> list[str]:
    """The addresses in a list or a comma-separated string, each once. Raises ValueError."""
    given = urls.split(",") if isinstance(urls, str) else urls
    parsed = []
    for url in filter(None, (each.strip().rstrip("/") for each in given)):
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise ValueError("a URL must not hold credentials; give them as token=")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {url!r}; it must begin with http:// or https://")
        parsed.append(url)
    if not parsed:
        raise ValueError("urls is empty; give the address of a service: http://HOST:PORT")
    return list(dict.fromkeys(parsed))
