"""The core that a trainer's machine installs: neither torch nor ray, and a quick `--help`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from reward_actor.contract import ScoringContract
from reward_actor.render import Renderer
from reward_actor.tokenizer import identity, load_tokenizer

LIGHT = [
    "reward_actor",
    "reward_actor.batching",
    "reward_actor.binary",
    "reward_actor.cache",
    "reward_actor.client",
    "reward_actor.contract",
    "reward_actor.files",
    "reward_actor.groups",
    "reward_actor.readout",
    "reward_actor.registry",
    "reward_actor.schema",
    "reward_actor.settings",
    "serve.config",
    "trainer.config",
    "trainer.config_file",
    "trainer.data_config",
    "trainer.metrics",
    "trainer.options",
    "rayward",
]
HEAVY = ("torch", "ray", "transformers", "deepspeed", "vllm", "fastapi", "datasets")


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_light_module_loads_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_ingress_renders_without_torch(export_dir: Path) -> None:
    code = (
        "import sys, serve.ingress\n"
        "from pathlib import Path\n"
        "from reward_actor.contract import ScoringContract\n"
        "from reward_actor.render import Renderer\n"
        "from reward_actor.tokenizer import load_like\n"
        "path = Path(sys.argv[1])\n"
        "tokenizer = load_like(path, sys.argv[2])\n"
        "print(Renderer(tokenizer, ScoringContract.load(path)).render('Hi.', 'Hello.'))\n"
        "print([m for m in ('torch', 'deepspeed', 'vllm') if m in sys.modules])"
    )
    tokenizer = load_tokenizer(export_dir)
    arguments = [sys.executable, "-c", code, str(export_dir), identity(tokenizer)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    contract = ScoringContract.load(export_dir)
    assert contract is not None
    ids = Renderer(tokenizer, contract).render("Hi.", "Hello.")
    assert done.stdout.splitlines() == [str(ids), "[]"]


@pytest.mark.parametrize("command", [[], ["train"], ["serve"], ["rollout"], ["eval"], ["score"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys, rayward\n"
        "try: rayward.main(sys.argv[1:])\n"
        f"finally: print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, *command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "usage: rayward" in done.stdout
