"""The serving benchmark's processes: how its servers end, and tiny runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]


def test_a_server_ends_with_everything_that_it_started(tmp_path: Path) -> None:
    """A server whose grandchild has a session of its own and ignores SIGTERM, in a process that
    adopts orphans."""
    grandchild = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
    )
    server = (
        "import subprocess, sys, time\n"
        f"command = [sys.executable, '-c', {grandchild!r}]\n"
        "child = subprocess.Popen(command, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(0 if 'gone' in sys.argv else 99)\n"
    )
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from benchmarks.common import processes\n"
        "processes.adopt_orphans()\n"
        f"command = [sys.executable, '-c', {server!r}, *sys.argv[2:]]\n"
        "with processes.Server('some', command, {}, Path(sys.argv[1])) as server:\n"
        "    while not server.log.strip(): time.sleep(0.05)\n"
        "    time.sleep(0.5)\n"
        "    assert int(server.log) in server.pids\n"
        "assert not server.pids\n"
    )
    for number, words in enumerate(([], ["gone"])):
        log = tmp_path / f"{number}.log"
        command = [sys.executable, "-c", code, str(log), *words]
        subprocess.run(command, check=True, cwd=ROOT, timeout=60)
        with pytest.raises(ProcessLookupError):
            os.kill(int(log.read_text()), 0)


def test_a_server_that_ends_early_shows_its_log(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from benchmarks.common.processes import Server\n"
        "command = [sys.executable, '-c', 'raise SystemExit(\"no such model\")']\n"
        "with Server('some', command, {}, Path(sys.argv[1])) as server:\n"
        "    server.wait_until_ready(1, '/', 20)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "ChildError: some ended with 1" in done.stderr
    assert "no such model" in done.stderr


def test_a_server_of_others_on_its_port_is_not_taken_for_it(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from benchmarks.common.processes import Server, answers\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(99)']\n"
        "assert answers(f'http://127.0.0.1:{sys.argv[2]}/')\n"
        "with Server('some', command, {}, Path(sys.argv[1])) as server:\n"
        "    server.wait_until_ready(int(sys.argv[2]), '/', 1)\n"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever).start()
        command = [sys.executable, "-c", code, str(tmp_path / "log"), str(other.server_port)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        other.shutdown()
    assert "some is not ready after 1 s" in done.stderr


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_tiny_run_of_every_server(tmp_path: Path) -> None:
    output = tmp_path / "serving.json"
    flags = (
        "--shape tiny --workload all --rounds 1 --warm-up-s 1 --duration-s 2 --num-groups 16 "
        "--prompt-tokens 32 --completion-tokens 4..16"
    )
    command = [sys.executable, "-m", "benchmarks.serving", *flags.split(), "--output", str(output)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        printed, _ = process.communicate()
    assert process.returncode == 0
    result = json.loads(output.read_text())
    assert result["measurements"]["groups"].keys() >= {"ours_1x2", "ours_1x2_binary"}
    assert result["measurements"]["singles"].keys() >= {"ours_1x2", "one_at_a_time"}
    assert result["measurements"]["handle"]["ours_1x2"]["p50_ms"]["median"] > 0
    assert result["measurements"]["replica start"]["ours_1x2"]["seconds"]["median"] > 0
    for by_label in result["measurements"].values():
        for figures in by_label.values():
            assert figures.get("statuses", {"200": 1}).keys() == {"200"}
    assert max(result["largest_difference_of_rewards"].values()) < 1e-4
    for target in result["targets"]:
        assert target["what"] in printed


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_server(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--shape", "tiny", "--peers"]
    command += ["one_at_a_time", "--workload", "singles", "--num-groups", "8"]
    command += ["--output", str(tmp_path / "serving.json")]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        # A shell's background jobs, and what they start, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        log = None
        deadline = time.monotonic() + 120
        while log is None:
            assert time.monotonic() < deadline
            log = next(tmp_path.glob("*/one_at_a_time.log"), None)
            time.sleep(0.2)
        time.sleep(1)
        [server] = _children(process.pid)
        process.send_signal(number)
        process.wait(60)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{server}").exists():
        assert time.monotonic() < deadline, "the server outlives the benchmark"
        time.sleep(0.1)


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
