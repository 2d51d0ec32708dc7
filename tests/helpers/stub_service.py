"""A small real HTTP server with the service's protocol, which answers as a test tells it to.

The reward of a completion is its length (of a message that of its content), of token ids their sum;
a model would tell nothing more about a client. `python -m tests.stub_service PORT` runs one in a
process that a test can kill.
"""

from __future__ import annotations

import json
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from reward_actor import binary, schema
from reward_actor.groups import Group, GroupScores, Whole


@dataclass
class Received:
    """One request: its path, headers and body, and the groups in it if it has any."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: tuple[str, int]
    groups: list[Group | Whole] = field(default_factory=list)
    token_rewards: bool = False
    turn_rewards: bool = False

    @property
    def media_type(self) -> str:
        return self.headers["content-type"]

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.groups))


@dataclass(frozen=True)
class Answer:
    """hang_up: close the connection after `hang_up` bytes of the body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: int | None = None


Behaviour = Callable[[Received], "Answer | None"]
"""What to answer; None: the scores."""


def error(type_: Any, **headers: str) -> Answer:
    status, body = schema.error_reply(type_, "as the test wants it", index=0)
    return Answer(status, json.dumps(body).encode(), headers)


class Stub:
    def __init__(self, behave: Behaviour, port: int = 0, context: Any = None) -> None:
        self.received: list[Received] = []
        self.behave = behave
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"] or 0)
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self.rfile.read(length)
                got = Received(self.command, self.path, headers, body, self.client_address)
                if self.path == "/v1/score":
                    got.groups, got.token_rewards, got.turn_rewards = _parse(got)
                stub.received.append(got)
                self._answer(stub.behave(got) or _scores(got))

            do_GET = do_POST  # noqa: N815

            def _answer(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body[: answer.hang_up])
                self.close_connection = answer.hang_up is not None

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, *arguments: Any) -> None:
                """Clients of these tests hang up."""

        self._server = Server(("127.0.0.1", port), Handler)
        scheme = "http"
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"

    @property
    def num_samples(self) -> list[int]:
        return [received.num_samples for received in self.received]

    def run(self) -> None:
        self._server.serve_forever(poll_interval=0.02)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def stub(
    behave: Behaviour = lambda _: None, context: ssl.SSLContext | None = None
) -> Iterator[Stub]:
    server = Stub(behave, context=context)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def _parse(got: Received) -> tuple[list[Group | Whole], bool, bool]:
    if got.media_type == binary.MEDIA_TYPE:
        groups, token_rewards = binary.decode_request(got.body)
        return list(groups), token_rewards, False
    request = schema.ScoreRequest.model_validate_json(got.body)
    parsed: list[Group | Whole] = []
    for group in request.groups:
        if group.texts is not None:
            parsed.append(Whole(group.texts))
        elif group.prompt_ids is not None:
            ids = group.completion_ids or []
            parsed.append(Group(prompt_ids=group.prompt_ids, completion_ids=ids))
        else:
            prompt = group.prompt
            messages = prompt if isinstance(prompt, str) else [m.as_message() for m in prompt or []]
            parsed.append(
                Group(
                    messages,
                    [c if isinstance(c, str) else c.as_message() for c in group.completions or []],
                    template_args=group.chat_template_kwargs or {},
                    tools=group.tools or (),
                )
            )
    return parsed, request.token_rewards, request.turn_rewards


def expected_rewards(group: Group | Whole) -> list[float]:
    if isinstance(group, Whole):
        return [float(len(text)) for text in group.texts]
    if group.prompt_ids is not None:
        return [float(sum(ids)) for ids in group.completion_ids]
    texts = [c if isinstance(c, str) else c["content"] for c in group.completions]
    return [float(len(text)) for text in texts]


def _scores(got: Received) -> Answer:
    if got.path == "/info":
        return Answer(404)
    scores = [_group_scores(group, got.token_rewards, got.turn_rewards) for group in got.groups]
    return answer_with(got, scores)


def named(got: Received) -> Answer:
    """The scores with three named rewards: the reward, its half, and one that nothing has."""
    scores = [_group_scores(group, got.token_rewards, got.turn_rewards) for group in got.groups]
    halves = [[None if r is None else r / 2 for r in each.rewards] for each in scores]
    return answer_with(
        got,
        [
            replace(
                each,
                named_rewards={
                    "whole": each.rewards,
                    "half": half,
                    "none": [None] * len(half),
                },
            )
            for each, half in zip(scores, halves, strict=True)
        ],
    )


def answer_with(got: Received, scores: list[GroupScores]) -> Answer:
    if got.media_type == binary.MEDIA_TYPE:
        head = {"model_version": "sha256:stub", "timings_ms": {}}
        body = binary.encode_reply("stub", scores, head)
        return Answer(200, body, {"Content-Type": binary.MEDIA_TYPE})
    reply = {
        "model": "stub",
        "model_version": "sha256:stub",
        "results": [{**score.to_json(), "from_a_newer_service": 1} for score in scores],
        "timings_ms": {},
    }
    for result in reply["results"]:
        del result["model_version"]
    return Answer(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})


def _earlier(group: Group | Whole) -> list[float]:
    """The rewards of the assistant's turns in a prompt, their lengths."""
    prompt = group.prompt if isinstance(group, Group) else None
    turns = () if prompt is None or isinstance(prompt, str) else prompt
    return [float(len(turn["content"])) for turn in turns if turn["role"] == "assistant"]


def _group_scores(group: Group | Whole, token_rewards: bool, turn_rewards: bool) -> GroupScores:
    rewards = expected_rewards(group)
    n = len(rewards)
    return GroupScores(
        rewards=list(rewards),
        raw_scores=list(rewards),
        num_tokens=[1] * n,
        truncated=[False] * n,
        errors=[None] * n,
        model_version="sha256:stub",
        token_rewards=[[reward] for reward in rewards] if token_rewards else None,
        tokens=[["t"]] * n if token_rewards else None,
        turn_rewards=[[*_earlier(group), r] for r in rewards] if turn_rewards else None,
    )


if __name__ == "__main__":
    server = Stub(lambda _: None, int(sys.argv[1]))
    print(server.url, flush=True)
    server.run()
