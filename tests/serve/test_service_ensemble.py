"""An ensemble behind the service: the same rewards, members and spread as offline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from exports import make_export

from reward_actor import Group, RewardClient, RewardHandle, RewardScorer
from reward_actor.model.ensemble import write_ensemble

GROUPS = [
    Group("Name two fruits.", ["An apple and a pear.", "A hammer.", "word " * 500]),
    Group([{"role": "user", "content": "Hi."}], ["Hello, how can I help?"]),
    Group(prompt_ids=[5, 6, 7], completion_ids=[[8], [9, 10]]),
]


@pytest.fixture(scope="module")
def ensemble_dir(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    members = [
        make_export(base_model, root / "one", seed=3),
        make_export(base_model, root / "two", seed=4, heads=["a", "b"], mean=0.5, std=2.0),
    ]
    write_ensemble(root / "both", members, "mean_minus_std", 0.5)
    return root / "both"


@pytest.fixture(scope="module")
def url(service: str, ensemble_dir: Path) -> Iterator[str]:
    """A second application in the cluster of the shared one."""
    from ray import serve

    from serve.app import build, resolve
    from serve.config import ServeConfig

    config = ServeConfig(
        model=str(ensemble_dir),
        device="cpu",
        cpus_per_replica=0.5,
        threads_per_replica=1,
        cache_size=100,
        attention="padded",
    )
    serve.run(build(resolve(config), use_gpu=False), name="ensemble", route_prefix="/ensemble")
    yield service + "/ensemble"
    serve.delete("ensemble")


def assert_close(ours: Any, theirs: Any) -> None:
    """Numbers, None, and lists and objects of them, to any depth."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
    else:
        assert ours == (None if theirs is None else pytest.approx(theirs, abs=1e-5))


def test_an_ensemble_scores_over_http_as_it_does_offline(url: str, ensemble_dir: Path) -> None:
    offline = RewardScorer.from_pretrained(ensemble_dir, "cpu")
    expected = offline.score(GROUPS, token_rewards=True)
    with RewardClient(url) as client:
        first, again = client.score_groups(GROUPS), client.score_groups(GROUPS)
        with_tokens = client.score_groups(GROUPS, token_rewards=True)
        info = client.info()
    assert again == first, "the cache answers bit by bit"
    for served in (first, with_tokens, RewardHandle("ensemble").score_groups(GROUPS)):
        for ours, theirs in zip(served, expected, strict=True):
            for name in ("rewards", "raw_scores", "named_rewards", "spread"):
                assert_close(getattr(ours, name), getattr(theirs, name))
            assert ours.errors == theirs.errors
            assert ours.model_version == offline.model_version
    for ours, theirs in zip(with_tokens, expected, strict=True):
        assert_close(ours.token_rewards, theirs.token_rewards)
    assert expected[0].named_rewards is not None
    for rewards in expected[0].named_rewards.values():
        assert [reward is None for reward in rewards] == [False, False, True]
    assert info.ensemble is not None
    assert info.ensemble.names == offline.readout.names == ["one", "two/a", "two/b"]
    assert (info.ensemble.combine, info.ensemble.k) == ("mean_minus_std", 0.5)
    assert (info.ensemble.means, info.ensemble.stds) == ([0.0, 0.5, 0.5], [1.0, 2.0, 2.0])
    assert info.normalisation == {}
    assert info.path == "padded"
    assert info.limits["cache_size"] == 100
    assert info.limits["max_batch_tokens"] >= 256, "chosen from free memory"


def test_one_model_has_neither_members_nor_a_rule(service: str) -> None:
    with RewardClient(service) as client:
        [scores] = client.score_groups(GROUPS[1:2])
        info = client.info()
    assert scores.named_rewards is None
    assert scores.spread is None
    assert info.ensemble is None
    assert info.normalisation == {"mean": 0.0, "std": 1.0}
    assert "forest" in info.path


def test_a_request_without_samples_is_answered(url: str) -> None:
    reply = httpx.post(url + "/v1/score", json={"groups": [{"prompt": "Hi.", "completions": []}]})
    [result] = reply.json()["results"]
    assert result["rewards"] == result["spread"] == []
    assert result["named_rewards"] == {"one": [], "two/a": [], "two/b": []}


def test_a_function_that_is_called_as_a_member_is_refused_at_the_start(
    ensemble_dir: Path, tmp_path: Path
) -> None:
    from serve.app import resolve
    from serve.config import ServeConfig

    functions = tmp_path / "rewards.py"
    functions.write_text("REWARDS = {'two/a': print}")
    with pytest.raises(ValueError, match="both have a reward named 'two/a'; rename yours"):
        resolve(ServeConfig(model=str(ensemble_dir), functions=str(functions)))


def test_a_scorer_actor_takes_an_ensemble(ray_cluster: None, ensemble_dir: Path) -> None:
    import ray

    from reward_actor.actor import start_scorer_actor

    offline = RewardScorer.from_pretrained(ensemble_dir, "cpu")
    actor = start_scorer_actor(str(ensemble_dir))
    try:
        info = ray.get(actor.info.remote())
        served = ray.get(actor.score_groups.remote(GROUPS))
    finally:
        ray.kill(actor)
    assert info.model == "both"
    assert info.model_version == offline.model_version
    assert info.ensemble is not None
    assert info.ensemble.names == offline.readout.names
    for ours, theirs in zip(served, offline.score(GROUPS), strict=True):
        assert_close(ours.rewards, theirs.rewards)
        assert_close(ours.named_rewards, theirs.named_rewards)
