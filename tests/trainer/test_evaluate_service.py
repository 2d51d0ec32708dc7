"""Evaluation of a service: the numbers of its directory, from pairs and from rankings."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_files import add, assert_same, write_evaluated_pairs, write_rankings

from trainer.config.data import Columns
from trainer.evaluation import evaluate
from trainer.evaluation.compare import compare_models
from trainer.evaluation.evaluate import evaluate_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_evaluated_pairs(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rankings(tmp_path_factory.mktemp("eval"))


def test_a_service_gives_the_same_numbers(
    service: str, export_dir: Path, data: str, rankings: str
) -> None:
    for source, columns in ((data, None), (rankings, Columns(subset_column="topic"))):
        offline = evaluate_model(str(export_dir), source, columns=columns, device="cpu")
        served = evaluate_model(service, source, columns=columns)
        assert_same(served, offline)
    short = evaluate_model(service, data, max_pairs=4)
    assert short["num_pairs"] == 4


def test_many_requests_give_the_numbers_of_one(
    service: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = evaluate_model(service, data)
    monkeypatch.setattr(evaluate, "_TOKENS_PER_CALL", 40)  # three pairs, and the long one
    assert_same(evaluate_model(service, data), one)


def test_a_service_is_compared_with_its_directory(
    service: str, export_dir: Path, data: str, rankings: str
) -> None:
    for source in (data, rankings):
        found = compare_models(service, str(export_dir), source, device="cpu", num_shown=1)
        assert found.a.model_version == found.b.model_version
        assert (found.agreement, found.difference.mean, found.better) == (1, 0, None)
        assert found.a.errors == found.b.errors == {"too_long": 1}
        assert found.rank_correlation == pytest.approx(1, abs=0.01)


def test_a_service_is_sent_the_messages_of_a_dialogue_in_text(
    service: str, export_dir: Path, tmp_path: Path
) -> None:
    hi = "\n\nHuman: Hi\n\nAssistant:"
    whole = {"chosen": hi + " Hey", "rejected": hi + " No"}
    prompted = {"prompt": hi, "chosen": " Good day", "rejected": " Bye"}
    data = add(tmp_path / "dialogues.jsonl", whole, prompted)
    served = evaluate_model(service, data)
    assert_same(served, evaluate_model(str(export_dir), data, device="cpu"))
    user = {"prompt": [{"role": "user", "content": "Hi"}]}
    messages = add(
        tmp_path / "messages.jsonl",
        {**user, "chosen": "Hey", "rejected": "No"},
        {**user, "chosen": "Good day", "rejected": "Bye"},
    )
    assert_same({**evaluate_model(service, messages), "data": data}, served)
    broken = add(tmp_path / "broken.jsonl", whole, {**whole, "chosen": "\n\nHuman: Hi"})
    with pytest.raises(ValueError, match=r"broken.jsonl:2: the last turn of the dialogue is Human"):
        evaluate_model(service, broken)
