"""RewardBench 2 end to end: a directory and its service give the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_files import V2, write

from reward_actor import Group, RewardScorer
from trainer.evaluation.rewardbench import (
    evaluate_rewardbench,
    read_benchmark,
    score_v2,
)


def test_version_2_end_to_end_of_a_directory_and_its_service(
    export_dir: Path, service: str, tmp_path: Path
) -> None:
    data = write(tmp_path / "v2.parquet", V2)
    offline = evaluate_rewardbench(str(export_dir), data, 2, device="cpu")
    served = evaluate_rewardbench(service, data, 2)
    rows = read_benchmark(data, 2)
    scorer = RewardScorer.from_pretrained(export_dir, device="cpu")
    scores = scorer.score([Group(row.prompt, row.completions) for row in rows])
    expected = score_v2(rows, [[r for r in s.rewards if r is not None] for s in scores])
    for result in (offline, served):
        assert result["model_version"] == scorer.model_version
        assert (result["num_rows"], result["num_unscored"], result["errors"]) == (3, 0, {})
        for name in ("Focus", "Ties"):
            assert result["subsets"][name] == pytest.approx(expected["subsets"][name], abs=1e-5)
    assert set(offline["subsets"]["Ties"]) > {"tied_accuracy", "preferred_hard", "score"}
