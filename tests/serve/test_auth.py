"""Tokens, scopes, and the rule of every route, without a cluster."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from applications import application, ask
from fastapi import APIRouter

import rayward
from serve.config import ServeConfig
from serve.http import docs
from serve.http.auth import Guard, ScoreRoute, require_guard
from serve.http.origin import comes_from_elsewhere
from serve.http.tokens import Tokens, add_token
from serve.playground.routes import FILES


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the tokens see; the file is looked at once in a second of it."""
    clock = [0.0]
    monkeypatch.setattr("serve.http.tokens.time.monotonic", lambda: clock[0])
    return clock


def test_every_route_has_a_rule_and_its_guard() -> None:
    """Fails for a new route whose router has no class of `serve.http.auth`."""
    for route in application().routes:
        assert isinstance(route.app, Guard), f"{route.path} is not guarded"
        assert route.app.rule == route.rule, f"{route.path} has another guard than its class says"
        assert route.app.rule is not None, f"{route.path} has no class of serve.http.auth"


def test_these_are_the_rules() -> None:
    """A new route says here who may use it."""
    paths: dict[str, set[str]] = {}
    for route in application().routes:
        paths.setdefault(route.app.rule, set()).add(route.path)
    health = {"/health", "/ready", "/v2/health/live", "/v2/health/ready"}
    pages = {"/docs", "/openapi.json", "/playground"} | {f"/playground/{name}" for name in FILES}
    pages |= {f"/docs/{name}" for name in docs.FILES}
    assert paths == {
        "public": health | pages,
        "score": {
            "/info",
            "/v1/models",
            "/v1/monitor",
            "/v1/explain",
            "/v1/classify",
            "/v1/score",
            "/v1/score/evaluation",
            "/v1/embeddings",
            "/v2/models/{name}",
            "/v2/models/{name}/config",
            "/v2/models/{name}/infer",
            "/v2/models/{name}/ready",
            "/",
            "/classify",
            "/get_reward",
            "/pooling",
            "/predict",
            "/reward/slime",
        },
        "admin": {"/v1/admin/models", "/v1/admin/sleep", "/v1/admin/wake"},
    }


def test_other_paths_lead_nowhere() -> None:
    for path in ("/playground/secrets", "/playground/%2e%2e/v1/score", "/metrics"):
        assert ask(application(), "GET", path).status_code == 404, path
    elsewhere = ask(application(), "POST", "/v1/score/")
    assert elsewhere.status_code == 307, "to the route, which has its guard"


@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_route_without_a_rule_is_refused(
    token_file: Path, monkeypatch: pytest.MonkeyPatch, with_tokens: bool
) -> None:
    async def new() -> None:
        raise AssertionError("it must not be reached")

    ours, unguarded = APIRouter(route_class=ScoreRoute), APIRouter()
    unguarded.add_api_route("/new", new)
    ours.include_router(unguarded)  # which does not take the class of the router that includes it
    monkeypatch.setattr("serve.api.routes.admin", ours)
    token = add_token(token_file, "everything", ["score", "admin"])
    api = application(token_file=str(token_file)) if with_tokens else application()
    reply = ask(api, "GET", "/new", headers=bearer(token))
    assert reply.status_code == 403
    assert "no rule" in reply.json()["error"]["message"]


def test_each_route_asks_for_its_scope(token_file: Path) -> None:
    tokens = {
        name: bearer(add_token(token_file, name, scopes))
        for name, scopes in {"score": ["score"], "admin": ["admin"]}.items()
    }
    api = application(token_file=str(token_file))
    for route in api.routes:
        rule, method = route.rule, next(iter(route.methods))
        nobody = ask(api, method, route.path)
        wrong = ask(api, method, route.path, headers=bearer("rw_wrong"))
        if rule == "public":
            assert 401 not in (nobody.status_code, wrong.status_code)
            continue
        for refused in (nobody, wrong):
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "unauthenticated"
            assert refused.headers["WWW-Authenticate"].startswith("Bearer")
        other = ask(
            api, method, route.path, headers=tokens["admin" if rule == "score" else "score"]
        )
        assert other.status_code == 403
        assert other.json()["error"]["type"] == "forbidden"
        assert f'scope="{rule}"' in other.headers["WWW-Authenticate"]
    # Behind the guard: the body is looked at, and there is no registry.
    assert ask(api, "POST", "/v1/score", headers=tokens["score"]).status_code == 422
    assert ask(api, "GET", "/v1/admin/models", headers=tokens["admin"]).status_code == 404


def test_the_document_says_what_asks_for_a_token(token_file: Path) -> None:
    add_token(token_file, "a", ["score"])
    document = ask(application(token_file=str(token_file)), "GET", "/openapi.json").json()
    assert document["paths"]["/v1/score"]["post"]["security"] == [{"bearer": []}]
    assert "security" not in document["paths"]["/health"]["get"]
    assert "securitySchemes" not in ask(application(), "GET", "/openapi.json").json()["components"]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "{token}")],
        [("Authorization", "Basic {token}")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer ")],
        [("Authorization", "Bearer {token}x")],
        [("Authorization", "Bearer {token}"), ("Authorization", "Bearer {token}")],
        [("X-Authorization", "Bearer {token}")],
    ],
)
def test_nothing_but_one_whole_token_lets_in(
    token_file: Path, headers: list[tuple[str, str]]
) -> None:
    token = add_token(token_file, "a", ["score"])
    api = application(token_file=str(token_file))
    sent = [(name, value.format(token=token)) for name, value in headers]
    assert ask(api, "POST", "/v1/score", headers=sent).status_code == 401
    assert ask(api, "POST", f"/v1/score?token={token}").status_code == 401
    good = ask(api, "POST", "/v1/score", headers={"authorization": f"bearer  {token}"})
    assert good.status_code == 422  # for its body


def test_every_digest_is_compared(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = (add_token(token_file, name, ["score"]) for name in "abcdef")
    tokens = Tokens(token_file)
    for name in "bcdef":
        add_token(token_file, name, ["score"])
    compared = []

    def noted(left: str, right: str) -> bool:
        compared.append(left)
        return left == right

    monkeypatch.setattr("serve.http.tokens.hmac.compare_digest", noted)
    num = len(tokens._entries)
    for token in (first.encode(), b"wrong"):
        compared.clear()
        tokens.scopes(token)
        assert len(compared) == num


def test_tokens_come_and_go_without_a_restart(
    token_file: Path, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    old = add_token(token_file, "trainer", ["score"]).encode()
    tokens = Tokens(token_file)
    new = add_token(token_file, "trainer", ["score", "admin"]).encode()
    assert tokens.scopes(new) is None  # it was looked at a moment ago
    now[0] += 1
    assert tokens.scopes(new) == {"score", "admin"}
    assert tokens.scopes(old) == {"score"}  # both hold, until the old one is taken out
    newest = add_token(token_file, "trainer", ["score"], replace=True).encode()
    now[0] += 1
    assert [tokens.scopes(token) for token in (old, new)] == [None, None]
    assert tokens.scopes(newest) == {"score"}
    assert newest.decode() not in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text("{"),
        lambda file: file.write_text('{"tokens": [{"name": "a"}]}'),
        lambda file: file.chmod(0o602),
    ],
    ids=["gone", "cut off", "incomplete", "open to others"],
)
def test_a_damaged_file_leaves_the_tokens_as_they_were(
    token_file: Path, now: list[float], caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    token = add_token(token_file, "trainer", ["score"]).encode()
    tokens = Tokens(token_file)
    damage(token_file)
    os.utime(token_file.parent)
    if token_file.exists():
        os.utime(token_file, (5, 5))
    now[0] += 1
    with caplog.at_level(logging.ERROR, "ray.serve"):
        logging.getLogger("ray.serve").propagate = True
        assert tokens.scopes(token) == {"score"}
    assert "the tokens stay what they were" in caplog.text
    if token_file.exists():
        token_file.chmod(0o600)
        token_file.unlink()
    later = add_token(token_file, "later", ["score"]).encode()
    now[0] += 1
    assert tokens.scopes(later) == {"score"}
    assert tokens.scopes(token) is None


DIGEST = hashlib.sha256(b"x").hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"tokens": [{"name": "a", "sha256": "SECRET", "scopes": ["score"]}]}', "sha256"),
        (json.dumps({"tokens": [{"name": "a", "sha256": DIGEST, "scopes": []}]}), "scopes"),
        (json.dumps({"tokens": [{"name": "a", "sha256": DIGEST, "scopes": ["root"]}]}), "scopes"),
        (json.dumps({"tokens": [], "colour": "SECRET"}), "colour"),
    ],
)
def test_a_token_file_that_cannot_be_used_says_why(
    token_file: Path, content: str | None, message: str
) -> None:
    if content is not None:
        token_file.write_text(content)
        token_file.chmod(0o600)
    with pytest.raises(ValueError, match=message) as refused:
        Tokens(token_file)
    assert "SECRET" not in str(refused.value)


def test_a_file_that_others_can_write_is_refused(token_file: Path) -> None:
    add_token(token_file, "a", ["score"])
    token_file.chmod(0o660)
    with pytest.raises(ValueError, match="chmod 600"):
        Tokens(token_file)
    token_file.chmod(0o640)  # as a mounted secret of Kubernetes
    Tokens(token_file)


def test_the_command_makes_a_token_and_keeps_its_digest_only(
    token_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rayward.main(["token", "ops", "--scopes", "score,admin", "--file", str(token_file)]) == 0
    token = capsys.readouterr().out.strip()
    assert len(token) > 40
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    assert token not in token_file.read_text()
    assert hashlib.sha256(token.encode()).hexdigest() in token_file.read_text()
    assert Tokens(token_file).scopes(token.encode()) == {"score", "admin"}
    assert rayward.main(["token", "ops", "--scopes", "root", "--file", str(token_file)]) == 2
    assert "scopes" in capsys.readouterr().err
    assert list(token_file.parent.iterdir()) == [token_file]


def test_other_machines_are_served_with_tokens_only(token_file: Path) -> None:
    closed = ServeConfig(model="m")
    for host in ("127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.2"):
        require_guard(host, closed)
    for host in ("0.0.0.0", "::", "10.0.0.5", "example.com", ""):
        with pytest.raises(ValueError, match="rayward token"):
            require_guard(host, closed)
        require_guard(host, ServeConfig(model="m", token_file=str(token_file)))
        require_guard(host, ServeConfig(model="m", allow_unauthenticated=True))


@pytest.mark.parametrize(
    ("host", "origin", "elsewhere"),
    [
        ("127.0.0.1:8000", None, False),
        (None, None, False),
        ("localhost:8000", "http://localhost:8000", False),
        ("[::1]:8000", "http://[::1]:8000", False),
        ("10.0.0.7:8000", "https://10.0.0.7:8000", False),
        ("127.0.0.1:8000", "https://evil.example", True),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", True),
        ("127.0.0.1:8000", "null", True),
        ("127.0.0.1:8000", "", True),
        ("127.0.0.1:8000", "http://[", True),
        ("evil.example:8000", "http://evil.example:8000", True),  # DNS rebinding
        ("evil.example", None, True),
        ("[", None, True),
    ],
)
def test_pages_of_other_sites_are_recognised(
    host: str | None, origin: str | None, elsewhere: bool
) -> None:
    headers = {"host": host, "origin": origin}
    sent = [(n.encode(), v.encode()) for n, v in headers.items() if v is not None]
    assert comes_from_elsewhere(sent) is elsewhere


def test_without_tokens_pages_of_other_sites_are_refused(token_file: Path) -> None:
    page = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    own = {"Origin": "http://127.0.0.1"}
    for path in ("/v1/score", "/v1/admin/models"):
        reply = ask(application(), "POST", path, headers=page)
        assert reply.status_code == 403
        assert "token-file" in reply.json()["error"]["message"]
        assert ask(application(), "POST", path, headers=own).status_code == 422
    token = add_token(token_file, "a", ["score"])
    guarded = application(token_file=str(token_file))
    assert ask(guarded, "POST", "/v1/score", headers=page | bearer(token)).status_code == 422


@pytest.mark.parametrize("host", ["127.0.0.1", "rewards.example:8000"])
def test_a_service_that_is_open_under_any_name_still_refuses_pages_of_other_origins(
    host: str, token_file: Path
) -> None:
    opened = application(allow_unauthenticated=True)
    own = {"Host": host}
    for path in ("/v1/score", "/v1/admin/models"):
        assert ask(opened, "POST", path, headers=own).status_code == 422
        for origin in (f"http://{host}", f"https://{host.upper()}"):
            reply = ask(opened, "POST", path, headers={**own, "Origin": origin})
            assert reply.status_code == 422  # for its body
        for origin in ("https://evil.example", f"http://{host}1", "null", "", f"http://a@{host}"):
            reply = ask(opened, "POST", path, headers={**own, "Origin": origin})
            assert reply.status_code == 403
            assert "token-file" in reply.json()["error"]["message"]
    assert ask(opened, "GET", "/health", headers=own).status_code == 200
    nobody = ask(opened, "POST", "/v1/score", headers={"Host": "", "Origin": "null"})
    assert nobody.status_code == 403
    # A token is what no page has: where there are tokens, they alone decide.
    token = add_token(token_file, "a", ["score"])
    guarded = application(token_file=str(token_file), allow_unauthenticated=True)
    page = {"Origin": "https://evil.example"}
    assert ask(guarded, "POST", "/v1/score", headers=page | bearer(token)).status_code == 422
    assert ask(guarded, "POST", "/v1/score", headers=page).status_code == 401


def test_no_page_of_another_origin_may_read_anything() -> None:
    """CORS is off: no reply carries its headers, and a preflight gets none."""
    headers = {"Origin": "http://127.0.0.1", "Access-Control-Request-Method": "POST"}
    for method, path in (("OPTIONS", "/v1/score"), ("GET", "/health"), ("POST", "/v1/score")):
        reply = ask(application(), method, path, headers=headers)
        assert not [name for name in reply.headers if name.startswith("access-control")]
