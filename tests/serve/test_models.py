"""The models of a replica: what it lets go is closed, once, and what it holds is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from reward_actor import RewardScorer
from serve.replica.models import LoadedModels


class Scorer(RewardScorer):
    """Ours, which knows whether it was closed: as an engine in processes of its own must be."""

    num_closed = 0

    def close(self) -> None:
        self.num_closed += 1


def load(directory: str) -> Scorer:
    return Scorer.from_pretrained(directory, "cpu", attention="padded", check_golden=False)


@pytest.fixture
def directories(export_dir: Path, text_model: Path, seeds: list[Path]) -> list[str]:
    return [str(path) for path in (export_dir, text_model, seeds[1])]


def activated(models: LoadedModels, directory: str) -> Scorer:
    loaded = models.prepare(directory)
    assert models.activate(loaded.version, models.generation + 1, "next")
    assert models.current is loaded
    assert models.name == "next"
    return loaded.scorer


def test_every_model_that_is_let_go_is_closed(directories: list[str]) -> None:
    first, second, third = directories
    models = LoadedModels(first, 0, "first", load, retire_after_s=0.0)
    one = models.current.scorer
    assert models.name == "first"
    two = activated(models, second)
    assert one.num_closed == 0, "it may be asked for yet"
    models.retire()
    assert one.num_closed == 1
    assert models.find(one.model_version) is None
    three = models.prepare(third).scorer
    models.discard_candidate()
    models.discard_candidate()
    assert (two.num_closed, three.num_closed) == (0, 1)
    again = models.prepare(third).scorer
    assert again is not three, "what is closed does not come back"
    other = models.prepare(first).scorer
    assert (again.num_closed, other.num_closed) == (1, 0), "there is one candidate at a time"


def test_a_candidate_that_is_held_anyway_stays_open(directories: list[str]) -> None:
    first, second, third = directories
    models = LoadedModels(first, 0, "first", load, retire_after_s=0.0)
    one = models.current.scorer
    two = activated(models, second)
    assert models.prepare(second).scorer is two
    models.discard_candidate()
    assert models.prepare(first).scorer is one
    models.retire()  # its time is over, but it is about to come back
    assert activated(models, first) is one
    assert (one.num_closed, two.num_closed) == (0, 0)
    activated(models, third)  # there are never more than two
    assert (one.num_closed, two.num_closed) == (0, 1)
