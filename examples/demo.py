"""Rayward's main job on one machine, from nothing to scored rollouts: `make demo`.

Every step is a command that a user would type; it is printed before it runs. `--keep` leaves the
service up at the end; `--small` takes a tenth of the data: whether all of it works, not how well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

HERE = Path(__file__).resolve().parent
OUT = Path("outputs/demo")
DATA = OUT / "data"
BASE = OUT / "base"
POLICY = OUT / "policy"
TRAINING = OUT / "reward-model"
EXPORT = TRAINING / "export"
ROLLOUTS = OUT / "rollouts.jsonl"
SERVE_LOG = OUT / "serve.log"

PORT = 8765
NUM_COMPLETIONS = 4
SERVE_TIMEOUT_S = 180
PYTHON = sys.executable
RAYWARD = [PYTHON, "-m", "rayward"]

console = Console()


class StepFailed(Exception):
    """A step of the demo ended badly; the message says how."""


class Steps:
    """Runs the steps in order, with a headline and the seconds of each."""

    def __init__(self, total: int) -> None:
        self.seconds: dict[str, float] = {}
        self.current = "start"
        self._total = total

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        self.current = name
        number = len(self.seconds) + 1
        console.print(f"\n[bold cyan]\\[{number}/{self._total}] {name}[/]  {what}")
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        console.print(f"[green]done in {self.seconds[name]:.1f} s[/]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the service running at the end")
    parser.add_argument("--small", action="store_true", help="a tenth of the data and of the steps")
    arguments = parser.parse_args()
    keep, small = arguments.keep, arguments.small
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of loading weights
    steps = Steps(9)
    service: subprocess.Popen[bytes] | None = None
    try:
        require_free_port()
        shutil.rmtree(OUT, ignore_errors=True)
        OUT.mkdir(parents=True)
        with steps.step("data", "seeded instruction/answer preferences; the rule is not length"):
            sizes = ["--num-pairs", "400", "--num-heldout", "40", "--num-prompts", "4"]
            run([PYTHON, str(HERE / "preferences.py"), str(DATA), *(sizes if small else [])])
        with steps.step("base", "a byte-level BPE tokenizer with a chat template, a small network"):
            corpus = ["--corpus", str(DATA / "corpus.jsonl")]
            run([*RAYWARD, "init-model", str(BASE), *corpus])
        with steps.step("policy", "what will be sampled: trained on good and bad answers alike"):
            script = str(HERE / "train_policy.py")
            steps_wanted = ["--steps", "25"] if small else []
            run([PYTHON, script, str(BASE), str(DATA / "corpus.jsonl"), str(POLICY), *steps_wanted])
        with steps.step("train", "2 Ray Train workers, ZeRO-2, Bradley-Terry; then the export"):
            config = "quickstart"
            options = ["--model.path", str(BASE), "--data.train", str(DATA / "train.jsonl")]
            run([*RAYWARD, "train", "--config", config, *options, "--output-dir", str(TRAINING)])
        with steps.step("evaluate", "accuracy on held-out prompts"):
            command = [*RAYWARD, "eval", str(EXPORT), str(DATA / "heldout.jsonl"), "--json"]
            with console.status("scoring the held-out pairs"):
                evaluation = json.loads(run(command, capture=True))
            console.print(
                f"accuracy {evaluation['accuracy']:.4f} on {evaluation['num_pairs']} pairs"
            )
        with steps.step("serve", "Ray Serve: an ingress and 2 reward model replicas"):
            service, url, ray_address = start_service()
            console.print(f"{url}  (API page: {url}/docs)")
        with steps.step("rollout", f"a vLLM actor samples {NUM_COMPLETIONS} completions a prompt"):
            options = ["--num-completions", str(NUM_COMPLETIONS), "--max-tokens", "64"]
            target = ["--scorer", "rayward", "--ray-address", ray_address]
            prompts = str(DATA / "prompts.jsonl")
            run([*RAYWARD, "rollout", str(POLICY), prompts, str(ROLLOUTS), *options, *target])
        with steps.step("score", "the same rollouts once more, over HTTP"):
            rows = [json.loads(line) for line in ROLLOUTS.open(encoding="utf-8")]
            served = score_over_http(url, rows)
        with steps.step("check", "served rewards against the offline scorer"):
            difference = compare_with_offline(rows, served)
            console.print(f"largest difference {difference:.2e}")
        show(rows)
        summary = summarise(steps, evaluation, rows, served, difference)
        (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        check(summary, small)
    except Exception as error:  # whatever it was, the step is named and the service stopped
        keep = False
        console.print(f"\n[bold red]DEMO FAILED[/] in step {steps.current!r}: {error}")
        return 1
    except KeyboardInterrupt:
        keep = False
        console.print(f"\ninterrupted in step {steps.current!r}")
        return 130
    finally:
        if service is not None and not keep:
            stop(service)
    console.print(
        f"summary: {OUT / 'summary.json'}   whole demo: {sum(steps.seconds.values()):.0f} s"
    )
    if keep:
        assert service is not None
        console.print(f"the API page: {url}/docs   (stop the service with: kill {service.pid})")
    else:
        console.print(f"the API page was at {url}/docs; `make demo KEEP=1` leaves it up")
    print("DEMO OK")
    return 0


def run(command: Sequence[str], *, capture: bool = False) -> str:
    """Run one step's command on this terminal. Raises StepFailed if it fails."""
    show_command(command)
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode != 0:
        raise StepFailed(f"the command above ended with exit code {done.returncode}")
    return done.stdout or ""


def show_command(command: Sequence[str], end: str = "") -> None:
    """The command as a user would type it."""
    is_rayward = list(command[: len(RAYWARD)]) == RAYWARD
    typed = ["rayward", *command[len(RAYWARD) :]] if is_rayward else ["python", *command[1:]]
    console.print(Text(f"$ {' '.join(typed)}{end}", style="dim"))


def start_service() -> tuple[subprocess.Popen[bytes], str, str]:
    """Start `rayward serve` in the background: (process, URL, Ray address). Raises StepFailed."""
    command = [*RAYWARD, "serve", str(EXPORT), "--num-replicas", "2", "--port", str(PORT)]
    # A model this small leaves any GPU idle, and vLLM wants it for itself.
    command += ["--device", "cpu"]
    show_command(command, " &")
    with SERVE_LOG.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        address = wait_for_service(process)
    except BaseException:  # Ctrl-C, too: the service is a process group of its own
        stop(process)
        raise
    return process, f"http://127.0.0.1:{PORT}", address


def wait_for_service(process: subprocess.Popen[bytes]) -> str:
    """The Ray address of the service once it is ready. Raises StepFailed if it never is."""
    deadline = time.monotonic() + SERVE_TIMEOUT_S
    with console.status("loading the model and replaying its golden samples"):
        while time.monotonic() < deadline and process.poll() is None:
            lines = SERVE_LOG.read_text(errors="replace").splitlines()
            if any(line.startswith("ready") for line in lines):
                return next(line.split()[1] for line in lines if line.startswith("Ray "))
            time.sleep(0.2)
    tail = "\n".join(SERVE_LOG.read_text(errors="replace").splitlines()[-5:])
    raise StepFailed(f"the service did not become ready; the end of {SERVE_LOG}:\n{tail}")


def require_free_port() -> None:
    """Raise StepFailed if a service, of an earlier `make demo KEEP=1` perhaps, holds the port."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            raise StepFailed(f"something listens on port {PORT} already; stop it first")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the service and the Ray cluster that it started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def score_over_http(url: str, rows: Sequence[dict[str, Any]]) -> list[Any]:
    from reward_actor import RewardClient

    with RewardClient(url) as client:
        scores = client.score_groups(groups_of(rows))
    console.print(f"model_version {scores[0].model_version}")
    return scores


def compare_with_offline(rows: Sequence[dict[str, Any]], served: Sequence[Any]) -> float:
    """The largest |served - offline| over every rollout, through HTTP and through the handle."""
    from reward_actor import RewardScorer

    offline = RewardScorer.from_pretrained(EXPORT, "cpu").score(groups_of(rows))
    worst = 0.0
    for row, over_http, here in zip(rows, served, offline, strict=True):
        for rewards in (over_http.rewards, row["rewards"]):
            for ours, theirs in zip(here.rewards, rewards, strict=True):
                if ours is None or theirs is None:
                    raise StepFailed("a rollout has no reward; see `errors` in rollouts.jsonl")
                worst = max(worst, abs(ours - theirs))
        if not over_http.model_version == row["model_version"] == here.model_version:
            raise StepFailed("the service and the scorer do not hold the same model_version")
    return worst


def groups_of(rows: Sequence[dict[str, Any]]) -> list[Any]:
    from reward_actor import Group

    return [Group(row["prompt"], row["completions"]) for row in rows]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table of the best and the worst completion of every prompt."""
    table = Table(title="What the policy said, as the reward model ranks it", show_lines=True)
    table.add_column("prompt", ratio=3)
    table.add_column("best", ratio=4, style="green")
    table.add_column("worst", ratio=4, style="red")
    for row in rows:
        ranked = sorted(zip(row["rewards"], row["completions"], strict=True))
        table.add_row(Text(row["prompt"]), ranked_cell(ranked[-1]), ranked_cell(ranked[0]))
    console.print(table)


def ranked_cell(ranked: tuple[float, str]) -> Text:
    reward, completion = ranked
    return Text(f"{reward:+.2f}  {completion}")


def summarise(
    steps: Steps,
    evaluation: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    served: Sequence[Any],
    difference: float,
) -> dict[str, Any]:
    log = (TRAINING / "training_log.jsonl").read_text().splitlines()
    with (DATA / "train.jsonl").open() as file:
        num_pairs = sum(1 for _ in file)
    return {
        "num_pairs": num_pairs,
        "train_steps": json.loads(log[-1])["step"],
        "heldout_accuracy": evaluation["accuracy"],
        "export_dir": str(EXPORT),
        "model_version": served[0].model_version,
        "num_rollouts": sum(len(row["completions"]) for row in rows),
        "num_scored": sum(reward is not None for group in served for reward in group.rewards),
        "max_abs_diff_offline_vs_served": difference,
        "seconds": steps.seconds,
    }


def check(summary: dict[str, Any], small: bool) -> None:
    """Raise StepFailed unless the figures are what the README promises; a small run learns less."""
    if summary["heldout_accuracy"] < 0.95 and not small:
        raise StepFailed(f"heldout_accuracy is {summary['heldout_accuracy']:.3f}, below 0.95")
    if summary["max_abs_diff_offline_vs_served"] > 1e-5:
        raise StepFailed("served and offline rewards differ by more than 1e-5")
    if summary["num_scored"] != summary["num_rollouts"]:
        raise StepFailed("not every rollout was scored")


if __name__ == "__main__":
    sys.exit(main())
