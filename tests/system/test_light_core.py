"""The core that a trainer's machine installs: neither torch nor ray, and a quick `--help`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reward_actor.contract import ScoringContract
from reward_actor.model.tokenizer import identity, load_tokenizer
from reward_actor.render import Renderer

pytestmark = pytest.mark.process

LIGHT = [
    "reward_actor",
    "reward_actor.binary",
    "reward_actor.engine.cache",
    "reward_actor.client.sync",
    "reward_actor.command_line",
    "reward_actor.contract",
    "reward_actor.errors",
    "reward_actor.files",
    "reward_actor.groups",
    "reward_actor.integrations",
    "reward_actor.integrations.nemo_rl",
    "reward_actor.integrations.openrlhf",
    "reward_actor.integrations.skyrl",
    "reward_actor.integrations.trl",
    "reward_actor.integrations.verl",
    "reward_actor.readout",
    "serve.http.tokens",
    "serve.registry",
    "reward_actor.schema",
    "reward_actor.config_errors",
    "serve.config",
    "trainer.config.train",
    "trainer.config.config_file",
    "trainer.config.data",
    "trainer.evaluation.metrics",
    "trainer.config.options",
    "rayward",
]
HEAVY = ("torch", "ray", "transformers", "deepspeed", "vllm", "fastapi", "datasets", "trl")


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_light_module_loads_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_ingress_renders_without_torch(export_dir: Path) -> None:
    code = (
        "import sys, serve.deployments\n"
        "from pathlib import Path\n"
        "from reward_actor.contract import ScoringContract\n"
        "from reward_actor.render import Renderer\n"
        "from reward_actor.model.tokenizer import load_like\n"
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


TRAINER = """
import importlib.util, json, sys
from reward_actor import Group, RewardClient, RewardServiceError
from reward_actor.integrations import nemo_rl, openrlhf, skyrl, trl, verl
assert not any(importlib.util.find_spec(name) for name in ("torch", "ray", "transformers"))
rewards = trl.reward_function(sys.argv[1])(["Hi."], ["Hello!"])
with RewardClient(sys.argv[1]) as client:
    rewards += client.score("Hi.", ["Hello!", "What?"]).rewards
    [scores] = client.score_groups([Group(prompt_ids=[5], completion_ids=[[6], [7]])])
print(json.dumps(rewards + scores.rewards))
"""


def test_the_package_without_extras_scores(service: str, tmp_path: Path) -> None:
    """Into an environment of its own goes what `pip install .` brings, and nothing else."""
    from reward_actor import Group, RewardClient

    root = Path(__file__).parents[2]
    constraints = str(root / "constraints.txt")
    quiet = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    source = tmp_path / "source"  # setuptools writes beside what it builds
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "cluster.yaml"):
        shutil.copy(root / name, source)
    for name in ("rayward", "reward_actor", "serve", "trainer", "deploy"):
        shutil.copytree(root / name, source / name)
    light = str(tmp_path / "light")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", light], check=True)
    python = f"{light}/bin/python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        *quiet,
        "-c",
        constraints,
        str(source),
    ]
    subprocess.run(install, check=True, timeout=300)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    _has_what_is_no_python(Path(light))
    _takes_nothing_of_others_for_ours(python, tmp_path, environment)
    command = [python, "-c", TRAINER, service]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with RewardClient(service) as client:
        expected = client.score("Hi.", ["Hello!", "Hello!", "What?"]).rewards
        [scores] = client.score_groups([Group(prompt_ids=[5], completion_ids=[[6], [7]])])
    assert json.loads(done.stdout) == pytest.approx(expected + scores.rewards, abs=1e-5)
    for command, extra in (("train --data.train x", "train"), ("serve x", "serve")):
        done = subprocess.run(
            [f"{light}/bin/rayward", *command.split()],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.endswith(f'which is not installed: pip install "rayward[{extra}]"\n')
        assert done.stderr.count("\n") == 1


def _has_what_is_no_python(environment: Path) -> None:
    (packages,) = environment.glob("lib/python3.*/site-packages")
    for file in (
        packages / "trainer/config/presets/quickstart.yaml",
        packages / "trainer/report/report.html",
        packages / "serve/playground/index.html",
        packages / "reward_actor/py.typed",
        environment / "share/rayward/grafana/rayward.json",
        environment / "share/rayward/prometheus-rules.yml",
    ):
        assert file.is_file(), file


def _takes_nothing_of_others_for_ours(
    python: str, folder: Path, environment: dict[str, str]
) -> None:
    """In a directory with a user's own trainer.py and serve.py, from a wheel."""
    project = folder / "project"
    project.mkdir()
    for name in ("trainer.py", "serve.py"):
        (project / name).write_text("raise SystemExit('not ours')\n")

    def rayward(place: Path, **more: str) -> subprocess.CompletedProcess[str]:
        command = [python, "-m", "rayward", "token", "me", "--file", str(folder / "tokens.json")]
        return subprocess.run(
            command, env={**environment, **more}, cwd=place, capture_output=True, text=True
        )

    done = rayward(project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rw_")
    done = rayward(folder, PYTHONPATH=str(project))
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: trainer is {project / 'trainer.py'}, but Rayward's is in "
    )
