"""The scoring benchmark: its workloads, its figures, and the flags that it refuses."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
from collections.abc import AsyncIterator
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common import report
from benchmarks.common.rounds import choose_peers
from benchmarks.common.sglang_peer import make_sglang
from benchmarks.common.shapes import SHAPES
from benchmarks.common.workloads import Range, Workload, count_prefix_tokens, grpo, real, unique
from benchmarks.scoring.__main__ import main

TINY = SHAPES["tiny"]

ranges = st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda r: Range(r[0], sum(r)))


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8))
def test_prefix_tokens_are_the_distinct_prefixes(sequences: list[list[int]]) -> None:
    prefixes = {tuple(s[:end]) for s in sequences for end in range(1, len(s) + 1)}
    assert count_prefix_tokens(sequences) == len(prefixes)


@given(st.integers(1, 4), st.integers(1, 5), ranges, ranges)
def test_a_group_shares_its_prompt(groups: int, size: int, prompt: Range, rest: Range) -> None:
    workload = grpo(TINY, groups, size, prompt, rest)
    assert workload == grpo(TINY, groups, size, prompt, rest)
    assert len(workload.sequences) == groups * size
    assert all(3 <= i < TINY.vocab_size for s in workload.sequences for i in s)
    for start in range(0, groups * size, size):
        group = workload.sequences[start : start + size]
        columns = zip(*group, strict=False)
        shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
        assert shared >= prompt.low
        assert all(prompt.low + rest.low <= len(s) <= prompt.high + rest.high for s in group)


@given(st.integers(1, 20), ranges)
def test_unique_sequences_share_nothing(num_sequences: int, lengths: Range) -> None:
    workload = unique(TINY, num_sequences, lengths)
    assert workload == unique(TINY, num_sequences, lengths)
    assert len(workload.sequences) == num_sequences
    assert all(lengths.low <= len(s) <= lengths.high for s in workload.sequences)
    assert count_prefix_tokens(workload.sequences) == workload.num_tokens


def test_real_texts_share_their_prompts(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Say something about the number {i}.", "completions": ["One.", "Two of it."]}
        for i in range(5)
    ]
    path = tmp_path / "groups.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    workload = real(TINY, path, max_groups=3)
    assert len(workload.sequences) == 6
    assert workload.settings["num_groups"] == 3
    assert count_prefix_tokens(workload.sequences) < workload.num_tokens
    path.write_bytes(gzip.compress(b'{"prompt": "a", "completions": []}\n'))
    with pytest.raises(ValueError, match=r"groups.jsonl.gz:1"):
        real(TINY, path, max_groups=3)


def test_a_sequence_that_the_shape_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="2049 tokens; the shape takes 2048"):
        unique(TINY, 1, Range(2049, 2049))


@pytest.mark.parametrize("text", ["", "0", "5..", "..5", "7..5", "-1", "a..b"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="MIN"):
        Range.parse(text)


def test_the_figures_are_those_of_the_definitions() -> None:
    workload = Workload("w", [[1, 2, 3], [1, 2, 4]])  # 6 tokens, 4 distinct prefixes
    runs = {
        peer: [
            {"seconds": s, "cpu_seconds": s, "peak_memory_bytes": 5, "max_abs_diff": 0.0}
            for s in seconds
        ]
        for peer, seconds in {"ours": [1.0, 3.0, 2.0], "other": [8.0, 8.0, 8.0]}.items()
    }
    summary = report.summarize(workload, runs, layer_parameters=10, matmul_flops_per_s=80.0)
    assert (summary["num_tokens"], summary["num_prefix_tokens"]) == (6, 4)
    ours, other = summary["peers"]["ours"], summary["peers"]["other"]
    assert (ours["median_s"], ours["min_s"], ours["max_s"], ours["iqr_s"]) == (2, 1, 3, 1)
    assert ours["effective_tokens_per_s"] == 3.0
    assert ours["share_of_matmul"] == 2 * 10 * 4 / 2 / 80
    ratio = other["ratio"]  # of each round: 8, 8/3 and 4
    assert (ratio["median"], ratio["min"], ratio["max"]) == (4, 8 / 3, 8)


def test_rewards_that_are_not_numbers_are_not_equal() -> None:
    assert report.max_abs_diff([1.0, 2.0], [1.5, 2.0]) == 0.5
    assert not report.max_abs_diff([1.0, float("nan")], [1.0, 2.0]) <= 1e9


def test_a_peer_that_cannot_run_is_skipped_with_its_reason() -> None:
    peers, skipped = choose_peers("padded_16,flash,ours", "cpu")
    assert peers == ["ours", "padded_16"]
    assert "CUDA" in skipped["flash"]
    with pytest.raises(ValueError, match="'theirs' is not one of"):
        choose_peers("ours,theirs", "cpu")
    with pytest.raises(ValueError, match="CUDA"):
        choose_peers("flash", "cpu")


def test_a_bad_flag_is_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--workload", "real"])
    assert exit_.value.code == 2
    assert "--real FILE" in capsys.readouterr().err


def test_sglang_gets_token_ids_and_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it goes without a GPU: SGLang's part is played here."""
    made: dict[str, Any] = {}

    class Manager:
        async def generate_request(self, request: Any, _: None) -> AsyncIterator[list[Any]]:
            yield [
                {"embedding": [float(sum(ids))], "meta_info": {"cached_tokens": len(ids)}}
                for ids in request.input_ids
            ]

    class Engine:
        def __init__(self, **arguments: Any) -> None:
            made.update(arguments, flushed=0)
            self.loop = asyncio.new_event_loop()
            self.tokenizer_manager = Manager()

        def flush_cache(self) -> Any:
            made["flushed"] += 1
            return SimpleNamespace(success=made["flushed"] == 1)

    io_struct = SimpleNamespace(EmbeddingReqInput=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "sglang", SimpleNamespace(Engine=Engine))
    for name in ("sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", io_struct)
    order = {"model_dir": "model", "longest": 100, "shape": "tiny", "dtype": "bfloat16"}
    peer = make_sglang({**order, "device": "cuda:0"})
    assert (made["model_path"], made["device"], made["is_embedding"]) == ("model", "cuda", True)
    assert peer.score("grpo", [[1, 2], (3, 4, 5)]) == [3.0, 12.0]
    assert peer.details() == {"num_cached_tokens": 5}
    peer.modes["sglang_warm"]()
    peer.modes["sglang_cold"]()
    assert made["flushed"] == 1
    with pytest.raises(RuntimeError, match="prefix cache"):
        peer.modes["sglang_cold"]()
