"""What a cluster remembers of the model that is served, over restarts and redeployments."""

from __future__ import annotations

import json

import pytest

from serve import current_model
from serve.current_model import CurrentModel, Sleep, forget, wake_up


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Ray's key-value store, as a dictionary."""
    kept: dict[str, bytes] = {}

    def put(key: str, value: str | bytes, *, overwrite: bool = True) -> bool:
        existed = key in kept
        if overwrite or not existed:
            kept[key] = value if isinstance(value, bytes) else value.encode()
        return existed

    def delete(key: str, *, by_prefix: bool = False) -> None:
        gone = [each for each in kept if each == key or (by_prefix and each.startswith(key))]
        for each in gone:
            del kept[each]

    monkeypatch.setattr(current_model, "kv_put", put)
    monkeypatch.setattr(current_model, "kv_get", kept.get)
    monkeypatch.setattr(current_model, "kv_delete", delete)
    return kept


def test_a_replica_that_starts_again_loads_what_was_swapped_in() -> None:
    assert CurrentModel.at_start("app", "A").set("app")
    assert CurrentModel(1, "B-directory", "b", base="A").set("app")
    found = CurrentModel.at_start("app", "A")
    assert (found.generation, found.directory) == (1, "B-directory")


def test_a_service_that_is_started_with_another_model_serves_that() -> None:
    CurrentModel.at_start("app", "A").set("app")
    CurrentModel(1, "B-directory", "b", base="A").set("app")
    found = CurrentModel.at_start("app", "C")
    assert (found.generation, found.directory, found.base) == (2, "C", "C")
    assert found.set("app")
    old = CurrentModel.get("app")
    assert old is not None
    assert not old.is_of("A"), "an old replica does not follow"


def test_one_of_two_swaps_at_once_is_refused() -> None:
    assert CurrentModel(1, "B", base="A").set("app")
    assert not CurrentModel(1, "C", base="A").set("app")
    assert CurrentModel.get("app") == CurrentModel(1, "B", base="A")


def test_a_start_whose_generation_a_swap_took_meanwhile_takes_the_next() -> None:
    CurrentModel.at_start("app", "A").set("app")
    loading = CurrentModel.at_start("app", "B")
    assert loading.generation == 1
    CurrentModel(1, "A2-directory", "a2", base="A").set("app")
    assert loading.take_over("app", "B") == CurrentModel(2, "B", base="B")
    assert CurrentModel.get("app") == CurrentModel(2, "B", base="B")


def test_replicas_that_start_together_agree() -> None:
    CurrentModel.at_start("app", "A").set("app")
    both = [CurrentModel.at_start("app", "B") for _ in range(2)]
    assert [each.take_over("app", "B") for each in both] == [CurrentModel(1, "B", base="B")] * 2
    assert CurrentModel.at_start("app", "B").take_over("app", "B") == CurrentModel(1, "B", base="B")


def test_a_replica_that_a_swap_went_past_while_it_loaded_stays_behind_it() -> None:
    CurrentModel.at_start("app", "A").set("app")
    loading = CurrentModel.at_start("app", "A")
    CurrentModel(1, "A2-directory", "a2", base="A").set("app")
    assert loading.take_over("app", "A").generation == 0, "it follows by itself"


def test_a_swap_that_died_half_way_is_completed_by_the_next(store: dict[str, bytes]) -> None:
    CurrentModel(1, "B", base="A").set("app")
    half = CurrentModel(2, "C", base="A")
    store["app:swap:2"] = json.dumps(half.__dict__).encode()
    assert not CurrentModel(2, "D", base="A").set("app"), "it is told to try again"
    assert CurrentModel.get("app") == half
    assert CurrentModel(3, "D", base="A").set("app")


def test_another_release_may_have_written_more_or_less(store: dict[str, bytes]) -> None:
    store["app:model"] = b'{"generation": 3, "directory": "B", "more": 1}'
    assert CurrentModel.get("app") == CurrentModel(3, "B")
    assert CurrentModel(3, "B").is_of("anything")
    store["app:model"] = b"nonsense"
    assert CurrentModel.get("app") is None


def test_a_new_start_forgets_everything_of_its_name() -> None:
    CurrentModel(1, "B", base="A").set("app")
    forget("app")
    assert CurrentModel.get("app") is None
    assert CurrentModel(1, "C", base="A").set("app")


def test_a_service_that_is_started_is_awake() -> None:
    sleep = Sleep(2, "v")
    assert Sleep.get("app", "first") is None
    sleep.set("app", "first")
    assert Sleep.get("app", "first") == sleep
    assert Sleep.get("app", "second") is None, "deleted and deployed again, nothing sleeps"
    wake_up("app", "second")
    assert Sleep.get("app", "first") == sleep
    wake_up("app", "first")
    assert Sleep.get("app", "first") is None
    sleep.set("app", "first")
    forget("app")
    assert Sleep.get("app", "first") is None


def test_a_model_that_was_swapped_in_meanwhile_may_wake_up() -> None:
    sleep = Sleep(2, "v")
    assert [sleep.version_of(generation) for generation in (2, 3)] == ["v", ""]
