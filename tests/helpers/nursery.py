"""A `python` that forks: a program starts with torch, transformers and DeepSpeed imported already.

A process of ours imports for 8 to 13 seconds of CPU time, and the suite starts some hundreds.
`Nursery` keeps one process that has imported and forks on request. What tests start in place of
Python, its `python`, is a small client: it hands its arguments, environment and files over, passes
signals on, and ends as the forked process does. One that is killed takes the forked process with
it. `sys.executable` of a forked process is that client again, so the workers of its Ray cluster
come from here, too: those of a job from a process that has imported Ray in its environment.

    python tests/helpers/nursery.py FOLDER [vllm]      serves FOLDER/bin/python
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

_PRELOADED = (
    "aiohttp",
    "bitsandbytes",
    "fastapi",
    "grpc",
    "jsonschema",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "opentelemetry.sdk.metrics",
    "pandas",
    "peft",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "reward_actor.scorer",
    "transformers.models.qwen3.modeling_qwen3",
    "trainer.finish",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # and with it torch's compiler
)
# Ray reads the environment, which is a cluster's and a job's own, when it is imported.
_PRELOADED_WITH_RAY = ("ray.data", "ray.serve", "ray.train.torch", "serve.app", "trainer.worker")
_PRELOADED_FOR_VLLM = (
    "setproctitle",
    "vllm.entrypoints.openai.api_server",
    "vllm.model_executor.models.adapters",
    "vllm.model_executor.models.qwen3",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
)
# These end when their parent is not the raylet.
_CHILDREN_OF_THE_RAYLET = ("dashboard/agent.py", "runtime_env/agent/main.py")


class Nursery:
    """The process that forks; it ends with the process that made this, or by `close`."""

    def __init__(self, folder: Path, *, with_vllm: bool = False) -> None:
        self.bin = folder / "bin"
        """For the $PATH: this `python`, and what else lies beside the real one."""
        self.python = str(self.bin / "python")
        """In place of `sys.executable`, to start a program in a forked process."""
        self.bin.mkdir()
        for program in Path(sys.executable).parent.iterdir():
            if not program.name.startswith("python"):
                (self.bin / program.name).symlink_to(program)
        here = Path(__file__).resolve()
        # -S and -E: a client needs none of what makes Python's start slow.
        client = [
            f"#!{sys.executable} -SE",
            f"import sys; sys.path[0] = {str(here.parent)!r}",
            f"import nursery; nursery.ask({sys.executable!r}, {str(folder / 'socket')!r})",
        ]
        Path(self.python).write_text("\n".join(client) + "\n")
        Path(self.python).chmod(0o755)
        self._process = subprocess.Popen(
            [sys.executable, str(here), str(folder), *(["vllm"] if with_vllm else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(here.parents[2])},
        )

    def wait(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # DeepSpeed prints, too
            if line == "ready\n":
                return
        raise RuntimeError("the nursery could not import what it preloads")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def descendants(process: "psutil.Process") -> "Iterator[psutil.Process]":
    """All that it started; behind a client, the forked process and what that started."""
    import psutil

    try:
        name = Path(f"/proc/{process.pid}/comm").read_text().split()
        if name[:1] == [_FORKED]:
            process = psutil.Process(int(name[1]))
            yield process
        children = process.children()
    except (OSError, psutil.NoSuchProcess):
        return
    for child in children:
        yield child
        yield from descendants(child)


def titled(
    name: str, processes: "Iterable[psutil.Process] | None" = None
) -> "list[psutil.Process]":
    """Those whose title begins so, Ray's workers say; among all that these tests started, where no
    others are given. A process may end while it is looked at."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True) if processes is None else processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "".join(process.cmdline()[:1]).startswith(name):
                found.append(process)
    return found


# ---- the nursery


def _serve(folder: Path, *, with_vllm: bool) -> None:
    """Import, say so on stdout, and fork a process for every client until stdin closes."""
    import gc
    import multiprocessing
    import threading
    from importlib import import_module

    # MLflow: DeepSpeed's autotuner would import it. Ray: vLLM would.
    absent: dict[str, Any] = dict.fromkeys(("mlflow", "ray"))
    sys.modules |= absent
    for name in (*_PRELOADED, *(_PRELOADED_FOR_VLLM if with_vllm else ())):
        import_module(name)
    # The last of them is where vLLM keeps that there is no Ray.
    for name in (*absent, "vllm.v1.executor.ray_utils"):
        sys.modules.pop(name, None)
    gc.collect()
    gc.freeze()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a tender ended
    sys.executable = str(folder / "bin/python")
    multiprocessing.set_executable(sys.executable)
    end, end_of_this = os.pipe()  # closes with this process
    listener = _listener(str(folder / "socket"))
    print("ready", flush=True)
    _fork_for_each_client(listener, end, end_of_this)


def _listener(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    return listener


def _fork_for_each_client(listener: socket.socket, end: int, *ours: int) -> None:
    """Until `end` can be read; the files `ours` are not for the forked."""
    import select

    while end not in select.select([listener, end], [], [])[0]:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            for file in ours:
                os.close(file)
            _tend(client, end)
        client.close()
    os._exit(0)


def _import_ray(path: str, environment: dict[str, str], client: socket.socket, end: int) -> None:
    """Fork at the socket `path`, with Ray imported in that environment, for its cluster."""
    import gc
    import types
    from importlib import import_module

    os.environ.clear()
    os.environ.update(environment)
    actor = import_module("ray.actor")
    # Whoever asks Ray's core for a random id seeds it; all that were forked after that would draw
    # the same ids. An actor class asks when it is decorated.
    drawn = actor.ActorClassID
    actor.ActorClassID = types.SimpleNamespace(from_random=lambda: drawn(os.urandom(drawn.size())))
    for name in _PRELOADED_WITH_RAY:
        import_module(name)
    actor.ActorClassID = drawn
    gc.collect()
    gc.freeze()
    listener = _listener(path)
    _tell(client, 0)
    client.close()
    _fork_for_each_client(listener, end)


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: a lock that is held at a fork stays so in the child
    os._exit(0)


def _tend(client: socket.socket, end: int) -> None:
    """Fork for a client, tell it the pid and, in the end, how the process ended. If the client is
    killed, or the nursery ends, the process is killed."""
    import fcntl
    import json
    import select

    told = json.loads(_exactly(client, _number(client)))
    if told["kind"] == "ray":
        _import_ray(told["program"], told["environment"], client, end)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(client, 1, len(told["files"]))
    pid = os.fork()
    if pid == 0:
        client.close()
        # Under the numbers that they had in the client: multiprocessing tells a child that of its
        # pipe. First out of the way of these.
        numbers = told.pop("files")
        above = max(*numbers, *files) + 1
        files = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
        os.closerange(3, above)
        for target, file in zip(numbers, files, strict=True):
            os.dup2(file, target)
            os.close(file)
        _become(**told)
    for file in files:
        os.close(file)
    _tell(client, pid)
    handle = os.pidfd_open(pid)
    readable, _, _ = select.select([handle, client, end], [], [])
    if handle not in readable:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if handle in readable:
        _tell(client, code)
    os._exit(0)


def _tell(connection: socket.socket, number: int) -> None:
    connection.sendall(number.to_bytes(8, "big", signed=True))


def _number(connection: socket.socket) -> int:
    return int.from_bytes(_exactly(connection, 8), "big", signed=True)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        got = connection.recv(size - len(data))
        if not got:
            os._exit(1)
        data += got
    return data


def _become(
    kind: str, program: str, arguments: list[str], environment: dict[str, str], directory: str
) -> None:
    """Run code, a module or a file as Python would."""
    import runpy
    import tempfile
    import traceback
    import types

    import numpy as np

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    if "--multiprocessing-fork" in arguments and "setproctitle" in sys.modules:
        # Of vLLM, which names its processes. How to is found out before the environment moves; Ray
        # has its own way, which must be the first.
        sys.modules["setproctitle"].getproctitle()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    tempfile.tempdir = None  # found in $TMPDIR when it is asked for
    np.random.seed()
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    places = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    first = os.path.dirname(os.path.abspath(program)) if kind == "file" else directory
    sys.path[:] = [first, *places, *(p for p in sys.path[1:] if p not in places)]
    sys.argv = [{"code": "-c", "module": "-m"}.get(kind, program), *arguments]
    code = 0
    try:
        if kind == "code":
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), main.__dict__)
        elif kind == "module":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
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


_FORKED = "forked"
"""A client's name in /proc is this word and the pid of what was forked for it."""

# A cluster's few workers without a job are not worth an import of Ray for all.
_WORKER, _NO_JOB = "/ray/_private/workers/default_worker.py", (None, "ffffffff")

# The runtime environments' agent tells workers what Python they run under: its own.
_AS_A_CHILD = """
import runpy, sys
sys.executable, *sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ask(python: str, path: str) -> None:
    """Be a client of the nursery at the socket `path`; or the real Python, where it cannot fork."""
    import json

    told = _program(sys.argv[1:])
    if not told:
        os.execv(python, [python, *sys.argv[1:]])
    if told["program"].endswith(_CHILDREN_OF_THE_RAYLET):
        os.execv(
            python, [python, "-c", _AS_A_CHILD, sys.argv[0], told["program"], *told["arguments"]]
        )
    files = [number for number in map(int, os.listdir("/proc/self/fd")) if _is_open(number)]
    told |= {"files": files, "environment": dict(os.environ), "directory": os.getcwd()}
    body = json.dumps(told).encode("utf-8", "surrogateescape")
    if told["program"].endswith(_WORKER) and os.environ.get("RAY_JOB_ID") not in _NO_JOB:
        path = _with_ray(path)
    connection = _connection(path, body)
    socket.send_fds(connection, [b"."], files)
    pid = _number(connection)
    with open("/proc/self/comm", "w") as name:
        name.write(f"{_FORKED} {pid}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = _number(connection)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _connection(path: str, body: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    _tell(connection, len(body))
    connection.sendall(body)
    return connection


def _with_ray(path: str) -> str:
    """The socket of a process that has imported Ray in this one's environment."""
    import fcntl
    import json
    import zlib

    own = sorted(item for item in os.environ.items() if item[0].startswith("RAY"))
    place = f"{path}-{zlib.crc32(repr(own).encode()):08x}"
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(place):
            told = {"kind": "ray", "program": place, "environment": dict(os.environ)}
            with _connection(path, json.dumps(told).encode("utf-8", "surrogateescape")) as asked:
                _number(asked)
    return place


def _is_open(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


def _program(arguments: list[str]) -> dict[str, Any]:
    """What Python's command line says to run; empty for what only Python itself can do."""
    while arguments[:1] in (["-u"], ["-B"]):  # Ray's way, and multiprocessing's
        if arguments[0] == "-u":
            os.environ["PYTHONUNBUFFERED"] = "1"
        arguments = arguments[1:]
    kind = {"-c": "code", "-m": "module"}.get(arguments[0]) if arguments else None
    if kind and len(arguments) > 1:
        return {"kind": kind, "program": arguments[1], "arguments": arguments[2:]}
    if not arguments or arguments[0].startswith("-"):
        return {}
    return {"kind": "file", "program": arguments[0], "arguments": arguments[1:]}


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), with_vllm=sys.argv[2:] == ["vllm"])
