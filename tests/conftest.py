"""What the tests share: one Ray cluster, one tiny model and its export, one running service."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from serve.haproxy import settings

if TYPE_CHECKING:
    import httpx
    from playwright.sync_api import Browser
    from visits import Visit

    from reward_actor import RewardScorer
    from reward_actor.render import Renderer

# Rewards are compared bit for bit in places; thread counts must not change under a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything imports Ray Serve: the tests run what `rayward serve` runs.
settings.enable()

# Machines are shared: how long one example takes says nothing.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

CORPUS = [
    "Name two fruits that grow on trees. An apple and a pear.",
    "How do I boil an egg? Put it into boiling water for seven minutes.",
    "Which tools belong in a kitchen? A knife, a spoon and a pan, please.",
    "def add(a, b):\n    return a + b\n",
    "Ünïcödé, 日本語 and ☀️ must survive the tokenizer.",
] * 8


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private Ray cluster for all tests, with more logical CPUs than real ones."""
    import ray

    from reward_actor.cluster import connect

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
                pytest.fail(
                    "these tests mount a small filesystem, which needs user namespaces or root: "
                    + holder.stderr.read().decode()
                )
            yield Path(f"/proc/{holder.pid}/root{place}")
        finally:
            holder.kill()


def fill(disk: Path) -> Path:
    """A file that leaves no room for others."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**20)):
            pass
    return ballast


def make_export(
    base: Path,
    directory: Path,
    *,
    seed: int = 0,
    format: str = "chat",
    heads: Sequence[str] = ("reward",),
    **contract_fields: Any,
) -> Path:
    """An export of a random reward model on top of `base`, with these fields in its contract."""
    from dataclasses import replace

    import torch
    from transformers import AutoModelForSequenceClassification

    from reward_actor.export import export
    from reward_actor.model.inferred import contract_for
    from reward_actor.model.tokenizer import load_tokenizer

    torch.manual_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(heads), dtype=torch.float32
    )
    torch.nn.init.normal_(network.score.weight, std=0.5)
    tokenizer = load_tokenizer(base)
    contract = contract_for(tokenizer, network.config, format=format)
    contract = replace(contract, heads=list(heads), **contract_fields)
    state_dict = network.state_dict()
    export(directory, network.config, network, state_dict, tokenizer, contract, {}, "cpu")
    return directory


@pytest.fixture(scope="session")
def export_dir(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(base_model, tmp_path_factory.mktemp("export") / "reward-model")


def free_port() -> int:
    return settings.free_ports(1)[0]


def environment_for_a_cluster() -> dict[str, str]:
    """The environment for a process that starts a cluster of its own: without what the tests'
    cluster has set for itself, the ports of its HAProxy above all."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY")}


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
        root / "base", CORPUS, vocab_size=400, hidden_size=512, num_layers=6, num_heads=8,
        num_kv_heads=4, head_dim=64, intermediate_size=2048, max_position_embeddings=512,
    )  # fmt: skip
    return make_export(base, root / "slow")


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


def templated(offline: RewardScorer, prompt: str, completion: str) -> str:
    """A conversation as a client templates it by itself, with what follows the last turn's end."""
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ]
    text = offline.renderer.tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return text


def reward(offline: RewardScorer, prompt: Any, completion: str) -> float:
    """The reward of one completion, without a service."""
    from reward_actor import Group

    [found] = offline.score([Group(prompt, [completion])])[0].rewards
    assert found is not None
    return found


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    """Not for the session: as long as it lives, a loop runs in the thread of the tests."""
    from browser import headless

    with headless() as browser:
        yield browser


@pytest.fixture
def visit(chrome: Browser, service: str) -> Iterator[Callable[..., Visit]]:
    """Opens the playground; a page that complained or asked elsewhere fails its test."""
    from visits import visits

    with visits(chrome, service) as opened:
        yield opened
