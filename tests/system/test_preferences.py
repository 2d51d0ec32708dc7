"""The example preference data: its hidden rule, its splits, and what length tells (nothing)."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "preferences.py"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


preferences = _load(SCRIPT)
PROMPTS = {prompt.text: prompt for prompt in preferences.make_prompts(0)}


@pytest.fixture(scope="module")
def dataset() -> dict[str, list[dict[str, str]]]:
    data: dict[str, list[dict[str, str]]] = preferences.generate_dataset()
    return data


def test_equal_seeds_give_equal_data_and_others_do_not() -> None:
    assert preferences.generate_pairs(50, 7) == preferences.generate_pairs(50, 7)
    assert preferences.generate_pairs(50, 7) != preferences.generate_pairs(50, 8)
    assert preferences.generate_dataset(60, 20, 4, 3) == preferences.generate_dataset(60, 20, 4, 3)


@pytest.mark.process
def test_command_line_writes_the_four_files(tmp_path: Path) -> None:
    sizes = ["--num-pairs", "40", "--num-heldout", "10", "--num-prompts", "5", "--seed", "3"]
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), *sizes], check=True)
    written = {
        path.name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in tmp_path.iterdir()
    }
    assert written == preferences.generate_dataset(40, 10, 5, 3)
    assert {name: len(rows) for name, rows in written.items()} == {
        "train.jsonl": 40,
        "heldout.jsonl": 10,
        "prompts.jsonl": 5,
        "corpus.jsonl": 40,
    }


def test_no_prompt_is_shared_between_training_and_the_rest(
    dataset: dict[str, list[dict[str, str]]],
) -> None:
    prompts = {name: {row["prompt"] for row in rows} for name, rows in dataset.items()}
    seen = prompts["train.jsonl"] | prompts["corpus.jsonl"]
    assert not seen & (prompts["heldout.jsonl"] | prompts["prompts.jsonl"])
    assert not prompts["heldout.jsonl"] & prompts["prompts.jsonl"]
    assert len(prompts["train.jsonl"]) == 4000


def test_prompts_are_distinct_and_kinds_do_not_overlap() -> None:
    assert len(PROMPTS) == len(preferences.make_prompts(0)) > 4000
    assert len(preferences.KIND_OF) == sum(len(things) for things in preferences.KINDS.values())
    # No thing may also be a word of a phrase: the grade is read off the words.
    fillers = " ".join(
        preferences.POLITE_OPENERS
        + preferences.POLITE_CLOSERS
        + preferences.RUDE_OPENERS
        + preferences.RUDE_CLOSERS
        + preferences.NAMINGS
        + preferences.DODGES
    )
    assert not set(preferences._WORD.findall(fillers)) & set(preferences.KIND_OF)


@pytest.mark.parametrize("grade", preferences.GRADES)
def test_a_completion_has_the_grade_it_was_written_for(grade: int) -> None:
    rng = random.Random(grade)
    for prompt in list(PROMPTS.values())[:500]:
        completion = preferences.write_completion(rng, prompt, grade)
        assert preferences.grade_completion(prompt, completion) == grade, completion


@pytest.mark.parametrize(
    ("completion", "grade"),
    [
        ("Of course! How about apples and pears? Enjoy!", 3),
        ("apples and pears", 3),
        ("Of course! How about apples and hammers? Enjoy!", 2),
        ("Of course! How about apples and apples? Enjoy!", 2),
        ("Of course! How about apples, pears and plums? Enjoy!", 2),
        ("Of course! How about apples? Enjoy!", 2),
        ("Of course! How about hammers and saws? Enjoy!", 1),
        ("Of course! How about apples and pears? Go away!", 0),
        ("Of course! It depends on what you like. Enjoy!", 0),
        ("", 0),
    ],
)
def test_grades_of_a_request_for_two_fruits(completion: str, grade: int) -> None:
    prompt = preferences.Prompt("Please name two fruits for a quiz.", "fruits", 2)
    assert preferences.grade_completion(prompt, completion) == grade


def test_the_chosen_side_has_the_higher_grade(dataset: dict[str, list[dict[str, str]]]) -> None:
    compared = set()
    for pair in dataset["train.jsonl"] + dataset["heldout.jsonl"]:
        prompt = PROMPTS[pair["prompt"]]
        high = preferences.grade_completion(prompt, pair["chosen"])
        low = preferences.grade_completion(prompt, pair["rejected"])
        assert high > low
        compared.add((high, low))
    assert compared == set(preferences.PAIR_WEIGHTS)


def test_length_does_not_tell_chosen_from_rejected(
    dataset: dict[str, list[dict[str, str]]],
) -> None:
    for name in ("train.jsonl", "heldout.jsonl"):
        differences = [len(row["chosen"]) - len(row["rejected"]) for row in dataset[name]]
        longer_wins = sum(difference > 0 for difference in differences) / len(differences)
        shorter_wins = sum(difference < 0 for difference in differences) / len(differences)
        assert max(longer_wins, shorter_wins) < 0.55, name
        # Logistic regression on the difference, by Newton's method; no intercept: sides are free.
        weight = 0.0
        for _ in range(20):
            chances = [1 / (1 + math.exp(-weight * d)) for d in differences]
            gradient = sum(d * (1 - p) for d, p in zip(differences, chances, strict=True))
            curvature = sum(d * d * p * (1 - p) for d, p in zip(differences, chances, strict=True))
            weight += gradient / curvature
        fitted = sum(weight * difference > 0 for difference in differences) / len(differences)
        assert fitted < 0.55, name
        assert abs(weight) < 0.02, name


def test_completions_of_all_grades_are_in_the_corpus(
    dataset: dict[str, list[dict[str, str]]],
) -> None:
    rows = dataset["corpus.jsonl"]
    grades = [
        preferences.grade_completion(PROMPTS[row["prompt"]], row["completion"]) for row in rows
    ]
    for grade, weight in preferences.CORPUS_WEIGHTS.items():
        share = weight / sum(preferences.CORPUS_WEIGHTS.values())
        assert abs(grades.count(grade) / len(rows) - share) < 0.03


def test_bad_arguments_are_refused() -> None:
    prompt = next(iter(PROMPTS.values()))
    with pytest.raises(ValueError, match="grade: 4"):
        preferences.write_completion(random.Random(0), prompt, 4)
    with pytest.raises(ValueError, match="num_pairs: -1"):
        preferences.generate_pairs(-1, 0)
    with pytest.raises(ValueError, match="prompts"):
        preferences.generate_pairs(1, 0, [])
    with pytest.raises(ValueError, match="num_heldout"):
        preferences.generate_dataset(num_heldout=len(PROMPTS))
