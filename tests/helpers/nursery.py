"""Processes that have torch, transformers and DeepSpeed imported already: forked, not started.

A Ray worker of ours imports for 8 to 13 seconds of CPU time, and the suite starts about a hundred.
`Nursery` keeps one process that has imported and forks on request; the clusters of the tests take
their workers from it through Ray's own `py_executable`. What Ray starts in place of Python is a
small client, which hands its arguments, environment and files over, passes signals on, and ends
when the forked process does. One that is killed takes the forked process with it.

    python tests/helpers/nursery.py serve SOCKET                        the nursery
    python tests/helpers/nursery.py SOCKET [-m MODULE | FILE] ...       the client
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

_SOCKET_VARIABLE = "RAYWARD_NURSERY"
# Not Ray: its core reads the environment, which is a worker's own, when it is imported.
_PRELOADED = (
    "aiohttp",
    "fastapi",
    "grpc",
    "jsonschema",
    "opentelemetry.sdk.metrics",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "reward_actor.scorer",
    "transformers.models.qwen3.modeling_qwen3",
    "trainer.finish",
)


class Nursery:
    """The process that forks; it ends with the process that made this, or by `close`."""

    def __init__(self, folder: Path) -> None:
        self._socket = str(folder / "nursery")
        here = Path(__file__).resolve()
        self._process = subprocess.Popen(
            [sys.executable, str(here), "serve", self._socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(here.parents[2])},
        )
        self.environment = {
            _SOCKET_VARIABLE: self._socket,
            "RAY_RUNTIME_ENV_HOOK": "nursery.hook",
            "PYTHONPATH": f"{here.parent}{os.pathsep}{here.parents[2]}",
        }
        """For processes whose Ray clusters take their workers from here."""

    def wait(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # DeepSpeed prints, too
            if line == "ready\n":
                return
        raise RuntimeError("the nursery could not import what it preloads")

    def python(self) -> list[str]:
        """In place of `sys.executable`, to start a program in a forked process."""
        return _client(self._socket)

    def close(self) -> None:
        self._process.communicate()


def _client(path: str) -> list[str]:
    # -S -E: a client needs none of what makes Python's start slow.
    return [sys.executable, "-S", "-E", str(Path(__file__).resolve()), path]


def hook(runtime_env: dict[str, object] | None) -> dict[str, object]:
    """For $RAY_RUNTIME_ENV_HOOK: workers come from the nursery."""
    client = " ".join(_client(os.environ[_SOCKET_VARIABLE]))
    return {"py_executable": client, **(runtime_env or {})}


# ---- the nursery


def _serve(path: str) -> None:
    """Import, say so on stdout, and fork a process for every client until stdin closes."""
    import gc
    import threading
    from importlib import import_module

    sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed's autotuner would import it
    for name in (*_PRELOADED, "deepspeed"):
        import_module(name)
    del sys.modules["mlflow"]
    assert "ray" not in sys.modules
    gc.collect()
    gc.freeze()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a tender ended
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _tend(client)
        client.close()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _tend(client: socket.socket) -> None:
    """Fork for a client, tell it the pid and, in the end, how the process ended."""
    import json
    import select

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told = json.loads(_exactly(client, int.from_bytes(_exactly(client, 8), "big")))
    _, files, _, _ = socket.recv_fds(client, 1, 3)
    pid = os.fork()
    if pid == 0:
        client.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        _become(**told)
    for file in files:
        os.close(file)
    client.sendall(pid.to_bytes(8, "big"))
    handle = os.pidfd_open(pid)
    readable, _, _ = select.select([handle, client], [], [])
    if handle not in readable:  # the client was killed
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if handle in readable:
        client.sendall((code if code >= 0 else 128 - code).to_bytes(8, "big"))
    os._exit(0)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        got = connection.recv(size - len(data))
        if not got:
            os._exit(1)
        data += got
    return data


def _become(arguments: list[str], environment: dict[str, str], directory: str) -> None:
    """Run a file or a module as Python would."""
    import runpy
    import traceback

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    is_module = arguments[0] == "-m"
    places = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    first = directory if is_module else os.path.dirname(os.path.abspath(arguments[0]))
    sys.path[:] = [first, *places, *(p for p in sys.path[1:] if p not in places)]
    sys.argv = arguments[1:] if is_module else arguments
    code = 0
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    import threading

    threading._shutdown()  # type: ignore[attr-defined]  # as at Python's end: threads, then atexit
    import atexit

    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---- the client


def _ask(path: str, arguments: list[str]) -> None:
    import json

    told = {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
    body = json.dumps(told).encode("utf-8", "surrogateescape")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    connection.sendall(len(body).to_bytes(8, "big") + body)
    socket.send_fds(connection, [b"."], [0, 1, 2])
    pid = int.from_bytes(_exactly(connection, 8), "big")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    os._exit(int.from_bytes(_exactly(connection, 8), "big"))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(sys.argv[2])
    else:
        _ask(sys.argv[1], sys.argv[2:])
