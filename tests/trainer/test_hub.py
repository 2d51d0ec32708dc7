"""Pushing an export to the hub, against a server that speaks the four routes it needs."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trainer.report.hub import PATTERNS, PRIVATE, check_push

CALL = """from pathlib import Path
from trainer.config.train import ReportConfig
from trainer.report.hub import push
"""


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits, and remembers them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.server.refuses:
            self._answer({"error": "You may not read here"}, status=403)
        else:
            self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses:
            self._answer({"error": "You may not write here"}, status=403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/lab/polite"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
            self._answer({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            url = f"{self.server.url}/lab/polite/commit/{'0' * 40}"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:
            self._answer({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if "error" in value:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def export(tmp_path: Path) -> Path:
    directory = tmp_path / "polite export"  # a space, for the command in the message
    (directory / "plots").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "plots/loss.png", "optim.pt", *PRIVATE):
        (directory / name).write_bytes(name.encode())
    (directory / "README.md").write_text("---\ntags: [reward-model]\n---\n\n# Reward model\n")
    return directory


def pushed(
    export: Path, endpoint: str, repository: str = "lab/polite", push_report: bool = False
) -> Any:
    """A process of its own: the library reads its endpoint when it is imported."""
    config = f"ReportConfig(push_to_hub={repository!r}, push_report={push_report})"
    call = f"{CALL}print(push(Path({str(export)!r}), {config}))"
    env = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", call], capture_output=True, text=True, env=env, timeout=60,
        cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip


@pytest.mark.process
def test_weights_and_text_arrive_and_nothing_else(hub: Hub, export: Path) -> None:
    done = pushed(export, hub.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/lab/polite/commit/{'0' * 40}"
    assert [(made["name"], made["visibility"]) for made in hub.created] == [("polite", "private")]
    expected = {"model.safetensors", "config.json", "plots/loss.png", "README.md"}
    assert hub.files.keys() == expected
    assert all(hub.files[name] == (export / name).read_bytes() for name in expected)
    assert hub.tokens == {"Bearer hf_test"}


@pytest.mark.process
def test_the_report_and_the_settings_are_pushed_where_that_is_asked_for(
    hub: Hub, export: Path
) -> None:
    assert pushed(export, hub.url, push_report=True).returncode == 0
    assert hub.files.keys() >= set(PRIVATE)
    assert "optim.pt" not in hub.files


@pytest.mark.process
@pytest.mark.parametrize("is_there", [True, False], ids=["refusing", "absent"])
def test_a_failed_push_says_at_once_how_to_try_again(
    hub: Hub, export: Path, is_there: bool
) -> None:
    hub.refuses = True
    before = {path: path.read_bytes() for path in export.rglob("*.*")}
    began = time.monotonic()
    done = pushed(export, hub.url if is_there else "http://127.0.0.1:9")
    assert time.monotonic() - began < 30
    assert done.returncode == 1
    message = done.stderr[done.stderr.rindex("PushError: ") :]
    assert f"the reward model is in {export}, but it could not be pushed to lab/polite" in message
    assert ("You may not write here" if is_there else "Connection refused") in message
    command = shlex.split(message.strip().splitlines()[-1])
    assert command[:6] == ["hf", "upload", "lab/polite", str(export), ".", "--private"]
    assert command[7::2] == [*PATTERNS, *PRIVATE]
    assert command[6::2] == ["--include"] * len(PATTERNS) + ["--exclude"] * len(PRIVATE)
    assert {path: path.read_bytes() for path in export.rglob("*.*")} == before


@pytest.mark.process
def test_the_command_of_a_failed_push_works(hub: Hub, export: Path) -> None:
    hub.refuses = True
    command = shlex.split(pushed(export, hub.url).stderr.strip().splitlines()[-1])
    hub.refuses = False
    hf = Path(sys.executable).with_name(command[0])
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([str(hf), *command[1:]], env=env, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert hub.files.keys().isdisjoint({"optim.pt", *PRIVATE})
    assert "plots/loss.png" in hub.files


def test_what_cannot_be_pushed_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    check_push("lab/polite")
    with pytest.raises(ValueError, match=r"report\.push_to_hub is 'lab/polite/7'"):
        check_push("lab/polite/7")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(ValueError, match="run `hf auth login` or set HF_TOKEN"):
        check_push("lab/polite")
