"""A `python` that forks: a program starts with torch, transformers and DeepSpeed imported already.

A process of ours imports for 8 to 13 seconds of CPU time, and the suite starts some hundreds. Five
kinds of processes take part:

nursery      has imported everything but Ray, and forks a supervisor for every client.
client       is what tests start in place of Python, `Nursery.python`. It sends its arguments,
             environment and open files, passes SIGTERM and SIGINT on, and ends as the program does.
supervisor   forks the program and waits: for its end, which it sends to the client, or for that
             of the client or the nursery, after which it kills the program.
program      runs what Python would have run. `sys.executable` and multiprocessing's executable
             are the client again, so that its Ray cluster and its children come from here, too.
job's parent has imported Ray in the environment of one cluster and job, and forks supervisors for
             clients that are workers of that job. It ends with its raylet or the nursery.

A program differs from one that Python starts: all share one seed for the hashes of strings, what is
read from the environment at import is the nursery's, and it leads a session of its own.

    python tests/helpers/nursery.py FOLDER [vllm]      serves FOLDER/bin/python
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

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
_OURS = ("benchmarks", "rayward", "reward_actor", "serve", "trainer")
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
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(here), str(folder), *(["vllm"] if with_vllm else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": str(here.parents[2])},
            )

    def wait(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # DeepSpeed prints, too
            if line == "ready\n":
                return
        raise RuntimeError("the nursery ended before it was ready:\n" + self._log.read_text())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


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
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a supervisor ended
    sys.executable = str(folder / "bin/python")
    multiprocessing.set_executable(sys.executable)
    end, end_of_this = os.pipe()  # closes with this process
    listener = _listener(str(folder / "socket"))
    print("ready", flush=True)
    _fork_for_each_client(listener, end, own=end_of_this)


def _listener(path: str) -> socket.socket:
    """Listens at `path`, in place of one that ended."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.{os.getpid()}")
    listener.listen(64)
    os.rename(f"{path}.{os.getpid()}", path)
    return listener


def _fork_for_each_client(listener: socket.socket, end: int, own: int) -> None:
    """Until `end` or `own` can be read. `own` is not for what is forked."""
    import select

    while select.select([listener, end, own], [], [])[0] == [listener]:
        client, _ = listener.accept()
        if os.fork() == 0:
            try:
                listener.close()
                os.close(own)
                _supervise(client, end)
            except EOFError:  # the client is gone
                os._exit(1)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        client.close()
    os._exit(0)


def _serve_job(path: str, environment: dict[str, str], client: socket.socket, end: int) -> None:
    """Be a job's parent, at the socket `path`."""
    import gc
    import types
    from importlib import import_module

    os.environ.clear()
    os.environ.update(environment)
    actor = import_module("ray.actor")
    # The first random id seeds Ray's core, and all that are forked after that would draw the same
    # ids. The decorator of an actor class draws one.
    drawn = actor.ActorClassID
    actor.ActorClassID = types.SimpleNamespace(from_random=lambda: drawn(os.urandom(drawn.size())))
    for name in _PRELOADED_WITH_RAY:
        import_module(name)
    actor.ActorClassID = drawn
    gc.collect()
    gc.freeze()
    listener = _listener(path)
    _send(client, 0)
    client.close()
    raylet = os.pidfd_open(int(environment["RAY_RAYLET_PID"]))
    _fork_for_each_client(listener, end, own=raylet)


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: a lock that is held at a fork stays so in the child
    os._exit(0)


def _supervise(client: socket.socket, end: int) -> None:
    """Fork for a client, send it the pid and, in the end, the exit code. If the client is killed,
    or the nursery ends, the program is killed."""
    import fcntl
    import json
    import select

    request = json.loads(_receive_bytes(client, _receive(client)))
    if request["kind"] == "job":
        _serve_job(request["program"], request["environment"], client, end)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(client, 1, len(request["files"]))
    pid = os.fork()
    if pid == 0:
        client.close()
        # Under the numbers that they had in the client: multiprocessing tells a child that of its
        # pipe. First out of the way of these.
        numbers = request.pop("files")
        above = max(*numbers, *files) + 1
        files = [fcntl.fcntl(file, fcntl.F_DUPFD, above) for file in files]
        os.closerange(3, above)
        for target, file in zip(numbers, files, strict=True):
            os.dup2(file, target)
            os.close(file)
        _become(**request)
    for file in files:
        os.close(file)
    _send(client, pid)
    handle = os.pidfd_open(pid)
    readable, _, _ = select.select([handle, client, end], [], [])
    if handle not in readable:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if handle in readable:
        _send(client, code)
    os._exit(0)


def _send(connection: socket.socket, number: int) -> None:
    connection.sendall(number.to_bytes(8, "big", signed=True))


def _receive(connection: socket.socket) -> int:
    return int.from_bytes(_receive_bytes(connection, 8), "big", signed=True)


def _receive_bytes(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        got = connection.recv(size - len(data))
        if not got:
            raise EOFError
        data += got
    return data


def _is_another_checkout(place: str) -> bool:
    """Whether a program with this place on its path has its own copy of our packages, as a job."""
    path = Path(place, "reward_actor")
    return path.is_dir() and not path.samefile(Path(__file__).parents[2] / "reward_actor")


def _become(
    kind: str, program: str, arguments: list[str], environment: dict[str, str], directory: str
) -> None:
    """Run code, a module or a file as Python would."""
    import runpy
    import tempfile
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
    if any(_is_another_checkout(place) for place in (first, *places)):
        for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
            del sys.modules[name]
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
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    import threading

    threading._shutdown()  # type: ignore[attr-defined]  # as at Python's end: threads, then atexit
    import atexit

    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# ---- the client


FORKED = "forked"
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
    try:
        _ask(python, path)
    except (EOFError, ConnectionError):
        print(f"the nursery ended; see {os.path.dirname(path)}/log", file=sys.stderr, flush=True)
        os._exit(1)


def _ask(python: str, path: str) -> None:
    request = _program(sys.argv[1:])
    if not request:
        os.execv(python, [python, *sys.argv[1:]])
    if request["program"].endswith(_CHILDREN_OF_THE_RAYLET):
        os.execv(
            python,
            [python, "-c", _AS_A_CHILD, sys.argv[0], request["program"], *request["arguments"]],
        )
    files = [number for number in map(int, os.listdir("/proc/self/fd")) if _is_open(number)]
    request |= {"files": files, "environment": dict(os.environ), "directory": os.getcwd()}
    has_job = os.environ.get("RAY_JOB_ID") not in _NO_JOB
    is_jobs = request["program"].endswith(_WORKER) and has_job
    connection = _to_jobs_parent(path) if is_jobs else _connected(path)
    _send_request(connection, request)
    socket.send_fds(connection, [b"."], files)
    pid = _receive(connection)
    with open("/proc/self/comm", "w") as name:
        name.write(f"{FORKED} {pid}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = _receive(connection)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _connected(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return connection


def _send_request(connection: socket.socket, request: dict[str, Any]) -> None:
    import json

    body = json.dumps(request).encode("utf-8", "surrogateescape")
    _send(connection, len(body))
    connection.sendall(body)


def _to_jobs_parent(path: str) -> socket.socket:
    """A connection to the process that has imported Ray in this one's environment."""
    import fcntl
    import zlib

    own = sorted(item for item in os.environ.items() if item[0].startswith("RAY"))
    place = f"{path}-{zlib.crc32(repr(own).encode()):08x}"
    with contextlib.suppress(OSError):
        return _connected(place)
    with open(f"{place}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # another worker was first
            return _connected(place)
        with _connected(path) as nursery:
            request = {"kind": "job", "program": place, "environment": dict(os.environ)}
            _send_request(nursery, request)
            _receive(nursery)
        return _connected(place)


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
