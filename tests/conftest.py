"""What the tests share: one Ray cluster, one tiny model and its export, one running service."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from multiprocessing.spawn import get_executable, set_executable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from exports import CORPUS, make_export
from isolation import environment_for_a_cluster, free_port
from missing import EVERYTHING, is_failure, skip_without, told

from serve.haproxy import settings

if TYPE_CHECKING:
    import httpx
    from engines import OnWorkers
    from nursery import Nursery
    from playwright.sync_api import Browser
    from visits import Visit

    from reward_actor import RewardScorer
    from reward_actor.render import Renderer

# Rewards are compared bit for bit in places; thread counts must not change under a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything imports Ray Serve: the tests run what `rayward serve` runs. Each of several test
# processes has ports and files of its own, not those of the one that started it.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in os.environ.keys() - environment_for_a_cluster().keys() - {EVERYTHING}:
        del os.environ[_name]
settings.enable()

# Machines are shared: how long one example takes says nothing. `make test-long` has the other.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=30)
hypothesis.settings.register_profile("long", deadline=None, max_examples=300)
hypothesis.settings.load_profile("tests")


# What a test needs beyond its own process follows from its fixtures; `process` is for tests that
# start one by hand. `make test-fast` runs those without any of these marks.
_MARK_OF_FIXTURE = {
    "ray_cluster": "ray",
    "chrome": "browser",
    "on_workers": "deepspeed",
    "vllm_engine": "vllm",
}
_MARKS_WITH_PROCESSES = {*_MARK_OF_FIXTURE.values(), "process", "long"}


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in _MARK_OF_FIXTURE:
                item.add_marker(_MARK_OF_FIXTURE[fixture])
    # Of two test processes one takes all that use the cluster, so that there is one; of the rest a
    # file at a time, for its fixtures. Files that start processes come first: those at the end are
    # short, and the two end at the same time.
    on_the_cluster = {item.path for item in items if "ray" in _marks(item)}
    with_processes = {item.path for item in items if _marks(item) & _MARKS_WITH_PROCESSES}
    for item in items:
        group = "cluster" if item.path in on_the_cluster else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda i: (i.path not in on_the_cluster, i.path not in with_processes))


def _marks(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    is_skip = report.skipped and not hasattr(report, "wasxfail")
    if is_skip and is_failure(report.longrepr[2]):
        report.outcome = "failed"
        report.longrepr = f"{report.longrepr[2]}: skipped, though {EVERYTHING} is set"
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    for line in told(report.longrepr[2] for report in skipped):
        terminalreporter.write_line(line, yellow=True)


_may_start_processes = True


def _watch_processes(event: str, _arguments: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn") and not _may_start_processes:
        raise RuntimeError(f"this test starts a process ({event}): mark it `process`")


sys.addaudithook(_watch_processes)


@pytest.fixture(autouse=True)
def _processes_are_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that starts a process and does not say so: it would slow `make test-fast`."""
    global _may_start_processes
    _may_start_processes = bool(_marks(request.node) & _MARKS_WITH_PROCESSES)
    yield
    _may_start_processes = True


@pytest.fixture(scope="session")
def on_workers(nursery: Nursery) -> Iterator[OnWorkers]:
    """Runs a function on every rank of DeepSpeed workers that live as long as the session."""
    from engines import Workers

    workers = Workers(nursery.python)
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def vllm_engine(nursery: Nursery) -> Iterator[None]:
    """For tests and fixtures that start vLLM; its processes come from the nursery, too."""
    if find_spec("vllm") is None:
        skip_without("vLLM")
    python = get_executable()
    set_executable(nursery.python)
    yield
    set_executable(python)


@pytest.fixture(scope="session")
def nursery(request: pytest.FixtureRequest) -> Iterator[Nursery]:
    """For programs that start with everything imported, and clusters that get such workers."""
    from nursery import Nursery

    with_vllm = find_spec("vllm") is not None and any(
        "vllm_engine" in getattr(item, "fixturenames", ()) for item in request.session.items
    )
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="rayward-", dir="/tmp") as folder:
        started = Nursery(Path(folder), with_vllm=with_vllm)
        started.wait()
        yield started
        started.close()


@pytest.fixture(scope="session")
def ray_cluster(nursery: Nursery) -> Iterator[None]:
    """One private Ray cluster for all tests, with more logical CPUs than real ones."""
    import ray

    from reward_actor.cluster import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", nursery.python)
        connect(16, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model with a chat tokenizer, random weights."""
    from trainer.init_model import init_model

    return init_model(
        tmp_path_factory.mktemp("base") / "base",
        CORPUS,
        vocab_size=400,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,  # the smallest that vLLM has a CPU kernel for
        intermediate_size=64,
        max_position_embeddings=256,
    )


@pytest.fixture
def tokenizer(base_model: Path) -> Any:
    """The base model's, for one test to change."""
    from reward_actor.model.tokenizer import load_tokenizer

    return load_tokenizer(base_model)


@pytest.fixture(scope="session")
def renderers(base_model: Path) -> dict[str, Renderer]:
    """One for each format, of at most 64 tokens."""
    from transformers import AutoConfig

    from reward_actor.model.inferred import contract_for
    from reward_actor.model.tokenizer import load_tokenizer
    from reward_actor.render import Renderer

    tokenizer, network = load_tokenizer(base_model), AutoConfig.from_pretrained(base_model)
    return {
        name: Renderer(tokenizer, contract_for(tokenizer, network, format=name, max_length=64))
        for name in ("chat", "text")
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 8 MB. A process of its own mounts it where that takes no root, in namespaces
    that end with it; /proc shows others what it sees there."""
    place = tmp_path / "small"
    place.mkdir()
    mount = f"mount -t tmpfs -o size=8m tmpfs {place} && echo mounted && exec sleep infinity"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        try:
            if not holder.stdout.readline():
                skip_without("small disk", holder.stderr.read().decode().strip())
            yield Path(f"/proc/{holder.pid}/root{place}")
        finally:
            holder.kill()


@pytest.fixture(scope="session")
def export_dir(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(base_model, tmp_path_factory.mktemp("export") / "reward-model")


@pytest.fixture(scope="session")
def serve_config(export_dir: Path) -> Any:
    """How the tests' service is configured, a `ServeConfig`."""
    from serve.config import ServeConfig

    return ServeConfig(
        model=str(export_dir),
        num_replicas=2,
        device="cpu",
        cpus_per_replica=0.5,
        threads_per_replica=1,
        body_limit_bytes=1_000_000,
        max_request_samples=500,
        request_timeout_s=60,
    )


@pytest.fixture(scope="session")
def service(ray_cluster: None, serve_config: Any) -> Iterator[str]:
    """The URL of a real service with two replicas of the exported model."""
    from ray import serve

    from serve.app import start

    yield start(serve_config, port=free_port())
    serve.shutdown()


@pytest.fixture(scope="session")
def seeds(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one kind, normalised differently, each in a folder named export."""
    root = tmp_path_factory.mktemp("seeds")
    plain = make_export(base_model, root / "seed-0" / "export", seed=0)
    scaled = make_export(base_model, root / "seed-1" / "export", seed=1, mean=0.5, std=2.0)
    return [plain, scaled]


@pytest.fixture(scope="session")
def text_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(base_model, tmp_path_factory.mktemp("text") / "text", format="text")


@pytest.fixture(scope="session")
def slow_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that scores some thousand tokens a second on one thread."""
    from trainer.init_model import init_model

    root = tmp_path_factory.mktemp("slow")
    base = init_model(
        root / "base", CORPUS, vocab_size=400, hidden_size=512, num_layers=2, num_heads=8,
        num_kv_heads=4, head_dim=64, intermediate_size=2048, max_position_embeddings=512,
    )  # fmt: skip
    return make_export(base, root / "slow", head_std=0.05)  # raw scores of about 1, for its width


@pytest.fixture(scope="session")
def offline(export_dir: Path) -> RewardScorer:
    """What the service must agree with."""
    from reward_actor import RewardScorer

    return RewardScorer.from_pretrained(export_dir, "cpu")


@pytest.fixture(scope="session")
def http(service: str) -> Iterator[httpx.Client]:
    import httpx

    with httpx.Client(base_url=service, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    """Not for the session: as long as it lives, a loop runs in the thread of the tests."""
    from browser import chromium, headless

    path = chromium()
    if path is None:
        skip_without("Chromium")
    with headless(path) as browser:
        yield browser


@pytest.fixture
def visit(chrome: Browser, service: str) -> Iterator[Callable[..., Visit]]:
    """Opens the playground; a page that complained or asked elsewhere fails its test."""
    from visits import visits

    with visits(chrome, service) as opened:
        yield opened
