"""What `rayward rollout` does with its files, whatever becomes of the engines."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import rayward
from rayward.commands import rollout as command
from reward_actor import Group, RewardScorer
from reward_actor.groups import GroupScores
from reward_actor.rollout.records import RolloutGroup
from reward_actor.rollout.rows import rollout_row

if TYPE_CHECKING:
    from nursery import Nursery

    from reward_actor.files import Row

pytest.importorskip("vllm")


class Sampling:
    """Stands in for the engines: samples so many prompts, and then raises."""

    def __init__(self, num_prompts: int, error: BaseException | None = None) -> None:
        self.left, self.error = num_prompts, error
        self.seen: list[int] = []

    def __call__(self, *given: Any) -> Iterator[Row]:
        rows, prompts, done, summary = given[-4:]
        summary.begin()
        for index in reversed(range(len(prompts))):
            if index in done:
                continue
            if not self.left:
                assert self.error is not None
                raise self.error
            self.left -= 1
            self.seen.append(index)
            scores = GroupScores([0.5, index], [0.5, index], [4, 4], [False] * 2, [None] * 2, "v")
            group = RolloutGroup(
                prompts[index].prompt or "", [1], ["a", "b"], [[2], [3]], [[-1.0], [-1.0]],
                ["stop", "length"], scores, index=index, ended_with_eos=[True, False],
            )  # fmt: skip
            row = rollout_row(group, rows[index])
            summary.add(row)
            yield row


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    from pyarrow import Table, parquet

    prompts = [{"prompt": f"Prompt {n}", "id": f"q{n}", "label": n % 3} for n in range(6)]
    parquet.write_table(Table.from_pylist(prompts), tmp_path / "prompts.parquet")
    return tmp_path / "prompts.parquet", tmp_path / "out.jsonl"


def run(
    monkeypatch: pytest.MonkeyPatch, base_model: Path, files: tuple[Path, Path], sampling: Sampling,
    *options: str,
) -> int:  # fmt: skip
    monkeypatch.setattr(command, "_sampled", sampling)
    paths = [str(base_model), *map(str, files)]
    return rayward.main(["rollout", *paths, "-n", "2", "--scorer", str(base_model), *options])


def test_what_was_kept_is_said_and_a_finished_output_stays(
    monkeypatch: pytest.MonkeyPatch,
    base_model: Path,
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, output = files
    output.write_text("a finished file\n")
    first = Sampling(2, KeyboardInterrupt())
    assert run(monkeypatch, base_model, files, first) == 2
    assert f"error: {output} exists; --overwrite replaces it" in capsys.readouterr().err
    assert first.seen == []
    assert run(monkeypatch, base_model, files, first, "--overwrite") == 130
    kept = f"2 of 6 prompts are done and in {output}.unfinished; the same command resumes"
    assert kept in capsys.readouterr().err
    assert output.read_text() == "a finished file\n"
    full = Sampling(1, OSError(28, f"no room for {output}.unfinished: its disk has 3 kB left"))
    assert run(monkeypatch, base_model, files, full, "--overwrite") == 2
    said = capsys.readouterr()
    assert "resuming: 2 of 6 prompts are done" in said.out
    assert "3 of 6 prompts are done and in" in said.err
    assert "error: no room for" in said.err.replace("[Errno 28] ", "")
    last = Sampling(6)
    assert run(monkeypatch, base_model, files, last, "--overwrite") == 0
    assert sorted(first.seen + full.seen + last.seen) == list(range(6))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"q{n}" for n in range(6)]
    assert [row["label"] for row in rows] == [n % 3 for n in range(6)]
    out = capsys.readouterr().out
    assert f"6 rows of 6 prompts in {output}" in out
    assert "reward: mean +1.5000, standard deviation 1.5679, 1.0833 within a prompt" in out
    assert "completions: 50.0% cut by length, 0.0% without a reward" in out


@pytest.mark.parametrize(
    ("form", "columns", "num_rows"),
    [
        ("--best-of", {"completion", "reward"}, 6),
        ("--pairs", {"chosen", "rejected", "margin"}, 6),
        ("--advantages", {"advantages", "normalized_advantages", "completions", "rewards"}, 6),
    ],
)
def test_what_is_made_of_rollouts(
    monkeypatch: pytest.MonkeyPatch,
    base_model: Path,
    files: tuple[Path, Path],
    form: str,
    columns: set[str],
    num_rows: int,
) -> None:
    assert run(monkeypatch, base_model, files, Sampling(6), form) == 0
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert len(rows) == num_rows
    assert columns | {"prompt", "id", "label", "prompt_index"} <= rows[0].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--best-of", "--pairs"], "--best-of and --pairs exclude each other"),
        (["--prompt-column", "question"], "row 1: has no 'question', only id, label, prompt"),
        (["--sampling", "top_k"], "--sampling top_k: give NAME=VALUE, such as top_k=50"),
        pytest.param(
            ["--sampling", "top_kk=3"],
            "vLLM does not take this sampling: Unexpected keyword argument 'top_kk'",
            marks=pytest.mark.process,  # importing vLLM looks for compilers
        ),
        (["--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
    ],
)
def test_nonsense_is_told_before_an_engine_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    base_model: Path,
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, base_model, files, Sampling(0), *options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(files[1].parent.glob("out*")) == []


@pytest.mark.process
def test_least_lengths_are_taken(
    monkeypatch: pytest.MonkeyPatch, base_model: Path, files: tuple[Path, Path]
) -> None:
    given = ["--sampling", "min_tokens=5", "--max-tokens", "8"]
    assert run(monkeypatch, base_model, files, Sampling(6), *given) == 0


def test_prompts_that_parquet_cannot_hold_are_refused_first(
    monkeypatch: pytest.MonkeyPatch, base_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "Hi."}, {"prompt": [{"role": "user", "content": "Hi."}]}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = Sampling(2)
    assert run(monkeypatch, base_model, (prompts, tmp_path / "out.parquet"), sampling) == 2
    assert "Parquet cannot hold these rows" in capsys.readouterr().err
    assert sampling.seen == []


def test_forms_need_rewards(
    base_model: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert rayward.main(["rollout", str(base_model), *map(str, files), "--pairs"]) == 2
    assert "--pairs needs rewards; add --scorer" in capsys.readouterr().err
    bad = files[1].with_suffix(".csv")
    assert rayward.main(["rollout", str(base_model), str(files[0]), str(bad)]) == 2
    assert "it must end in .jsonl, .jsonl.gz, .parquet" in capsys.readouterr().err


def test_a_killed_command_resumes(
    vllm_engine: None, nursery: Nursery, service: str, tmp_path: Path, export_dir: Path
) -> None:
    """With a policy that has a vocabulary of its own: its completions are rendered by the reward
    model."""
    import ray

    from trainer.init_model import init_model

    corpus = ["Something else entirely, so that the merges differ.", "0123456789"] * 20
    policy = init_model(
        tmp_path / "policy", corpus, vocab_size=300, hidden_size=32, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=32, intermediate_size=32, max_position_embeddings=128,
    )  # fmt: skip
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "rollouts.jsonl"
    asked = [
        "Name two fruits.",
        [{"role": "user", "content": "Hi."}],
        "Count to three.",
        "word " * 200,
        *(f"Prompt {number}" for number in range(200)),
    ]
    rows = [{"question": prompt, "id": f"q{place}"} for place, prompt in enumerate(asked)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    address = ray.get_runtime_context().gcs_address
    typed = [nursery.python, "-m", "rayward", "rollout", str(policy), str(prompts), str(output)]
    typed += ["--scorer", service, "--ray-address", address, "-n", "2", "--max-tokens", "60"]
    typed += ["--prompt-column", "question", "--advantages", "--sampling", "ignore_eos=true"]
    unfinished = Path(f"{output}.unfinished")
    with subprocess.Popen(typed) as first:
        while not unfinished.exists() or unfinished.read_bytes().count(b"\n") < 5:
            assert first.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        first.kill()
    num_seen = unfinished.read_bytes().count(b"\n") - 1
    assert not output.exists()
    done = subprocess.run(typed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    resumed = re.search(r"resuming: (\d+) of 204 prompts are done", done.stdout)
    assert resumed is not None
    assert num_seen <= int(resumed[1]) < 204
    assert "completions travel as: text" in done.stdout
    assert "204 rows of 204 prompts in" in done.stdout
    assert "2 of 408 have no reward:\n  2 x not sampled: the prompt has" in done.stderr
    assert not unfinished.exists()
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["question"] for row in written] == asked
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert [row["prompt_index"] for row in written] == list(range(204))
    assert "the policy takes 128" in written.pop(3)["error"]
    assert all(row["num_completion_tokens"] == [60, 60] for row in written)
    scorer = RewardScorer.from_pretrained(export_dir, "cpu")
    for row in written[:5]:
        [offline] = scorer.score([Group(row["prompt"], row["completions"])])
        assert row["rewards"] == pytest.approx(offline.rewards, abs=1e-5)
        assert sum(row["advantages"]) == pytest.approx(0, abs=1e-6)
    again = subprocess.run(typed, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert again.stderr == f"error: {output} exists; --overwrite replaces it\n"
