"""One process per peer, told what to do by one JSON object a line, over its stdin and stdout.

A process of its own gives a peer its own libraries, environment and peak memory. Between two
orders a child waits in a read, so that only one of them ever uses the cores.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Answer = Callable[[Message], Message]

_LOG_TAIL_CHARACTERS = 3000


class ChildError(RuntimeError):
    """A child ended or failed; the message holds the end of its log."""


class Child:
    """A running `python -m benchmarks.<module>`; several may load at once."""

    def __init__(
        self,
        module: str,
        name: str,
        order: Message,
        environment: Mapping[str, str],
        log_dir: Path,
    ) -> None:
        """Start it and give it its order, without waiting. Raises ChildError."""
        self.name = name
        self._ready: Message | None = None
        self._log = log_dir / f"{name}.log"
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"benchmarks.{module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self._send(order)

    @property
    def ready(self) -> Message:
        """What it said once it was loaded; waits for that. Raises ChildError."""
        if self._ready is None:
            self._ready = self._receive()
        return self._ready

    def ask(self, message: Message) -> Message:
        """Send one message and wait for its answer. Raises ChildError."""
        assert self.ready is not None
        self._send(message)
        return self._receive()

    def _send(self, message: Message) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_receive` will say why
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> Message:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            tail = self._log.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:]
            raise ChildError(f"{self.name} ended with {self._process.wait()}; its log:\n{tail}")
        answer: Message = json.loads(line)
        return answer

    def close(self) -> None:
        """End it: its orders end, or it is killed after a while."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(load: Callable[[Message], tuple[Message, Answer]]) -> None:
    """A child's whole life: load by the first message, answer the others until there are none.

    What libraries print goes to the log: stdout belongs to the answers.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(message: Message) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    ready, answer = load(json.loads(sys.stdin.readline()))
    reply(ready)
    for line in sys.stdin:
        reply(answer(json.loads(line)))
