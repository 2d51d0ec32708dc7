"""The trainers' own code asks a service for rewards. `make test-integrations` runs this.

The code of the user is that of docs/integrations.md, and the command lines are the examples'. The
trainers are in an environment of their own, since what they need and what we need do not agree.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from isolation import environment_for_a_cluster
from missing import SOURCES, skip_without
from offline import reward

from reward_actor import RewardScorer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-integrations"
SAMPLES = [
    {"prompt": "Name two fruits.", "completion": "An apple and a pear."},
    {"prompt": "Name two fruits.", "completion": "A hammer."},
    {"prompt": "Hi.", "completion": "Hello!"},
]
LONG = {"prompt": "Hi.", "completion": "word " * 500}
REFUSED = "refused"

# By the name of their function in clients.py; whether the page has code for them, and whether that
# is asked for a sample without a reward, too.
TRAINERS = {
    "openrlhf": (),
    "verl": (),
    "skyrl": ("code",),
    "nemo_rl": ("code",),
    "slime": (),
    "llama_factory": (),
    "areal": ("code", "long"),
    "ms_swift": ("code", "long"),
    "verifiers": ("code", "long"),
}
HEADINGS = {"skyrl": "SkyRL", "nemo_rl": "NeMo-RL", "areal": "AReaL", "ms_swift": "ms-swift"}


def code_of(heading: str) -> str:
    """The first block of Python in that section of the page."""
    page = (ROOT / "docs/integrations.md").read_text()
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return section.split("```python\n")[1].split("```")[0]


def arguments_of(example: str, folder: Path, *arguments: str, **variables: str) -> list[str]:
    """What an example's last command is given: `ray` and `python3 -m` write it down instead."""
    for name in ("ray", "python3"):
        program = folder / name
        program.write_text(
            f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\n'
            f"printf '%s\\n' \"$@\" > {folder}/arguments\n"
        )
        program.chmod(0o755)
    subprocess.run(
        [ROOT / "examples" / example, *arguments],
        check=True,
        cwd=ROOT,
        env={**environment_for_a_cluster(), "PATH": f"{folder}:/usr/bin:/bin", **variables},
    )
    return (folder / "arguments").read_text().splitlines()


def asked(name: str, task: dict[str, Any], log: Path) -> dict[str, list[Any]]:
    with log.open("w") as errors:
        done = subprocess.run(
            [ENVIRONMENT / "bin/python", Path(__file__).with_name("clients.py"), name],
            input=json.dumps(task),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={
                **environment_for_a_cluster(),
                "PYTHONPATH": str(ROOT),
                "CUDA_VISIBLE_DEVICES": "",
                "RAYWARD_URL": task["url"],
            },
        )
    assert done.returncode == 0, done.stdout + log.read_text()
    found: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.process
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainers_own_code_gets_the_rewards(
    service: str,
    offline: RewardScorer,
    export_dir: Path,
    tmp_path: Path,
    name: str,
) -> None:
    task: dict[str, Any] = {"url": service, "model": str(export_dir), "samples": SAMPLES}
    task["sources"] = str(ENVIRONMENT / "src")
    source = {"nemo_rl": "NeMo-RL", "slime": "slime"}.get(name)
    if source is not None and not (ENVIRONMENT / "src" / source).is_dir():
        skip_without(SOURCES, source)
    if "code" in TRAINERS[name]:
        code = code_of(HEADINGS.get(name, name))
        task["file"] = str(tmp_path / "my_file.py")
        Path(task["file"]).write_text(code.replace("http://127.0.0.1:8000", service))
    expected: list[Any] = [reward(offline, **sample) for sample in SAMPLES]
    expected = [pytest.approx(each, abs=1e-5) for each in expected]
    if "long" in TRAINERS[name]:
        task["long"] = LONG
        expected.append(REFUSED)
    if name == "verl":
        files = ("train.parquet", "heldout.parquet")
        example = arguments_of("verl.sh", tmp_path, *files, RAYWARD_URL=service)
        assert example[:2] == ["-m", "verl.trainer.main_ppo"]
        task["example"] = example[2:]
    found = asked(name, task, tmp_path / "log")
    assert found
    assert found == dict.fromkeys(found, expected)


@pytest.mark.process
def test_openrlhf_has_the_options_of_our_example(tmp_path: Path) -> None:
    variables = {"RAYWARD_URL": "http://127.0.0.1:8000", "RAYWARD_TOKEN": "a-token"}
    found = arguments_of("openrlhf.sh", tmp_path, "prompts.jsonl", **variables)
    environment = json.loads(found[found.index("--runtime-env-json") + 1])
    assert environment == {"env_vars": variables}
    found = found[found.index("openrlhf.cli.train_ppo_ray") + 1 :]
    function_file = found[found.index("--reward.remote_url") + 1]
    assert Path(function_file) == ROOT / "reward_actor/integrations/openrlhf.py"
    [source] = ENVIRONMENT.glob("lib/*/site-packages/openrlhf/cli/train_ppo_ray.py")
    known = re.findall(r'add_argument\(\s*f?"(--[\w.{}]+)"', source.read_text())
    known = {option.format(prefix="actor") for option in known}
    options = {argument for argument in found if argument.startswith("--")}
    assert len(options) > 20
    assert options <= known
