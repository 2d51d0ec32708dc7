"""The models of a replica: what it lets go is closed, once, and what it holds is not."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

import pytest

from reward_actor import RewardScorer
from reward_actor.errors import EngineDied
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


def test_asleep_only_the_directory_is_kept(export_dir: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(export_dir, tmp_path / "model"))
    models = LoadedModels(str(directory), 0, "model", load, retire_after_s=0.0)
    scorer = weakref.ref(models.current.scorer)
    before = models.current.scorer.raw_scores([[5, 6, 7]])
    for _ in range(2):
        models.sleep()
        assert models.is_asleep
    assert scorer() is None
    with pytest.raises(ValueError, match="wake it first"):
        models.prepare(str(directory))
    assert not models.activate("v", 1, "next")
    for _ in range(2):
        models.wake()
        assert not models.is_asleep
    assert (models.current.scorer.raw_scores([[5, 6, 7]]) == before).all()


def test_another_model_in_the_directory_is_not_woken(
    directories: list[str], tmp_path: Path
) -> None:
    place = tmp_path / "model"
    shutil.copytree(directories[0], place)
    models = LoadedModels(str(place), 0, "model", load, retire_after_s=0.0)
    version = models.current.version
    models.sleep()
    shutil.rmtree(place)
    with pytest.raises(ValueError, match="model"):
        models.wake()
    shutil.copytree(directories[1], place)
    with pytest.raises(
        ValueError, match="has changed since the service fell asleep: it was sha256"
    ):
        models.wake()
    assert models.is_asleep
    other = LoadedModels(str(place), 0, "model", load, retire_after_s=0.0, asleep_as=version)
    with pytest.raises(ValueError, match="has changed"):
        other.wake()
    shutil.rmtree(place)
    shutil.copytree(directories[0], place)
    for each in (models, other):
        each.wake()
        assert each.current.version == version


class OnDevice(Scorer):
    """Takes itself for one whose weights can leave their device."""

    is_there = True
    has_room = True
    has_host_room = True
    is_alive = True

    def check(self) -> None:
        if not self.is_alive:
            raise EngineDied("gone")

    def offload(self) -> bool:
        self.is_there = False
        if not self.has_host_room:
            raise MemoryError
        return True

    def restore(self) -> None:
        if not self.has_room:
            raise RuntimeError("out of memory")
        self.is_there = True
        self.replay()


def test_weights_that_can_leave_the_device_are_kept_in_memory(export_dir: Path) -> None:
    def load(directory: str) -> Scorer:
        return OnDevice.from_pretrained(directory, "cpu", attention="padded")

    models = LoadedModels(str(export_dir), 0, "model", load, retire_after_s=0.0)
    scorer = models.current.scorer
    assert isinstance(scorer, OnDevice)
    models.sleep()
    assert not scorer.is_there
    models.check()
    scorer.is_alive = False
    with pytest.raises(EngineDied):
        models.check()
    scorer.is_alive = True
    models.wake()
    assert models.current.scorer is scorer
    assert scorer.is_there
    assert scorer.num_closed == 0


def test_weights_that_cannot_be_kept_or_moved_back_are_read_again(export_dir: Path) -> None:
    def load(directory: str) -> Scorer:
        return OnDevice.from_pretrained(directory, "cpu", attention="padded")

    models = LoadedModels(str(export_dir), 0, "model", load, retire_after_s=0.0)
    for setting in ("has_host_room", "has_room"):
        scorer = models.current.scorer
        assert isinstance(scorer, OnDevice)
        setattr(scorer, setting, False)
        models.sleep()
        assert scorer.num_closed == (setting == "has_host_room")
        gone = weakref.ref(scorer)
        if setting == "has_room":
            with pytest.raises(RuntimeError, match="out of memory"):
                models.wake()
            assert scorer.num_closed == 1
        del scorer
        assert gone() is None, "nor is an error's traceback in the way"
        assert models.is_asleep
        models.check()
        models.wake()
