"""The serving benchmark: its requests, its figures, the flags that it refuses, its simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common.rounds import Setting
from benchmarks.common.shapes import SHAPES
from benchmarks.common.workloads import Range
from benchmarks.serving import __main__, report, simulation
from benchmarks.serving.model import make_tokenizer, text_groups
from benchmarks.serving.peers import choose, make_peers, parse_sizes
from benchmarks.serving.workloads import PROTOCOLS, id_groups, singles
from reward_actor import schema

TINY = SHAPES["tiny"]
SETTING = Setting("tiny", "cpu", "float32", 2)

ranges = st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda r: Range(r[0], sum(r)))


@given(st.integers(1, 3), st.integers(1, 4), ranges, ranges)
def test_every_protocol_asks_for_the_same_sequences(
    num_groups: int, size: int, prompt: Range, completion: Range
) -> None:
    asked = id_groups(TINY, num_groups, size, prompt, completion, "some")
    assert len(asked) == num_groups
    for each in asked:
        native = schema.ScoreRequest.model_validate_json(
            PROTOCOLS["native"].request(each).body
        ).groups[0]
        assert native.prompt_ids is not None
        assert native.completion_ids is not None
        assert all(native.completion_ids), "a completion has a token of its own"
        rows = [native.prompt_ids + ids for ids in native.completion_ids]
        assert json.loads(PROTOCOLS["vllm"].request(each).body) == {"input": rows}
        assert json.loads(PROTOCOLS["plain"].request(each).body) == {"input_ids": rows}
        assert each.num_tokens == sum(map(len, rows))
        binary = PROTOCOLS["binary"].request(each)
        assert (binary.path, binary.body[:4]) == ("/v1/score", b"RWQ1")


def test_single_texts_share_the_prompt_of_their_group() -> None:
    tokenizer = make_tokenizer(TINY)
    groups = text_groups(tokenizer, 2, 3, Range(40, 40), Range(5, 30), "some")
    asked = singles(tokenizer, groups)
    assert len(asked) == 6
    bodies = [json.loads(PROTOCOLS["openrlhf"].request(each).body) for each in asked]
    assert [body["prompts"] for body in bodies[:3]] == [[groups[0].prompt]] * 3
    for each, body in zip(asked, bodies, strict=True):
        [query], [prompt] = body["query"], body["prompts"]
        assert query.startswith(prompt)
        assert json.loads(PROTOCOLS["vllm"].request(each).body) == {"input": [query]}
        ids = tokenizer(query)["input_ids"]
        assert each.num_tokens == len(ids)
        assert ids[: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]
        assert len(tokenizer(prompt)["input_ids"]) == pytest.approx(40, rel=0.4)


def test_a_peer_is_started_as_it_was_asked_for() -> None:
    peers = {p.name: p for p in make_peers(["ours", "vllm"], [(2, 1), (1, 2)], SETTING)}
    assert list(peers) == ["vllm", "ours_2x1", "ours_1x2"]
    command = peers["ours_2x1"].command(Path("/models/some"), 8123)
    assert command[1:5] == ["-m", "rayward", "serve", "/models/some"]
    flags = dict(zip(command[5::2], command[6::2], strict=True))
    assert (flags["--num-replicas"], flags["--threads-per-replica"]) == ("2", "1")
    assert flags["--port"] == "8123"
    theirs = peers["vllm"].command(Path("/models/some"), 8123)
    assert "--enable-prefix-caching" in theirs
    assert theirs[theirs.index("--runner") + 1] == "pooling"


@pytest.mark.parametrize("text", ["", "1", "0x1", "1x0", "1x2,", "2x", "axb"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="REPLICASxTHREADS"):
        parse_sizes(text)
    with pytest.raises(ValueError, match="'theirs' is not one of"):
        choose("ours,theirs")


def test_bad_flags_are_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, why in {
        "--peers one_at_a_time --workload handle": "none of them takes handle",
        "--ours 2": "REPLICASxTHREADS",
        "--peers theirs": "not one of",
        "--duration-s 0": "invalid",
    }.items():
        with pytest.raises(SystemExit) as exit_:
            __main__.main(flags.split())
        assert exit_.value.code == 2
        assert why in capsys.readouterr().err


def test_a_round_is_made_of_the_servers_that_something_is_asked_of() -> None:
    peers = make_peers(choose("all")[0], [(1, 2)], SETTING)

    def round_of(*wanted: str) -> list[tuple[str, str]]:
        return [(t.peer.name, t.model) for t in __main__.turns_of(peers, list(wanted))]

    assert round_of("singles")[0][0] in ("vllm", "ours_1x2")
    assert ("one_at_a_time", "full") in round_of("singles")
    assert ("one_at_a_time", "full") not in round_of("groups")
    assert round_of("empty") == [("ours_1x2", "empty"), ("plain_ray_serve", "empty")]
    assert round_of("start") == [("ours_1x2", "full")]


def test_targets_are_ratios_of_medians() -> None:
    def rounds(**numbers: list[float]) -> list[dict[str, Any]]:
        rows = zip(*numbers.values(), strict=True)
        return [dict(zip(numbers, row, strict=True)) | {"statuses": {"200": 2}} for row in rows]

    runs = {
        "groups": {
            "vllm": rounds(tokens_per_s=[100.0, 90.0, 500.0]),
            "ours_1x2": rounds(tokens_per_s=[170.0, 10.0, 160.0]),
        },
        "groups_half": {
            "vllm": rounds(p50_ms=[10.0], p99_ms=[20.0]),
            "ours_1x2": rounds(p50_ms=[5.0], p99_ms=[40.0]),
        },
        "empty, 1 client": {"ours_1x2": rounds(p50_ms=[2.0])},
        "empty, 64 clients": {
            "ours_1x2": rounds(requests_per_s=[100.0]),
            "plain_ray_serve": rounds(requests_per_s=[50.0]),
        },
    }
    figures = report.summarize(runs)
    assert figures["groups"]["vllm"]["tokens_per_s"]["rounds"] == [100.0, 90.0, 500.0]
    assert figures["groups"]["vllm"]["statuses"] == {"200": 6}
    found = [(t["value"], t["is_met"]) for t in report.targets(figures)]
    assert found == [(1.6, True), (0.5, True), (2.0, False), (2.0, True), (2.0, False)]
    printed = report.tables(figures, report.targets(figures))
    assert "| ours_1x2 | 160 | 10.00..170 | 0 |" in printed


@pytest.mark.alone
def test_simulated_replicas_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "simulation.json"
    flags = (
        "--tokens-per-s 20000 --shape tiny --replicas 1 4 --prompt-tokens 64 --num-groups 32 "
        "--completion-tokens 8..16 --warm-up-s 0.7 --duration-s 1.5 --ingress-clients 8"
    )
    assert simulation.main([*flags.split(), "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    one, four = result["scaling"]
    assert one["tokens_per_s"] == pytest.approx(20_000, rel=0.25)
    assert four["share_of_linear"] > 0.75
    assert one["statuses"].keys() == four["statuses"].keys() == {"200"}
    assert result["ingress"].keys() == {"ids, binary", "ids, JSON", "text", "single texts"}
    for row in result["ingress"].values():
        # A core that is busy all the time is measured as up to a twentieth more than one.
        assert 0 < row["ingress_cpu_share"] <= 1.05
        assert row["ingress_tokens_per_s"] * 1.05 >= row["tokens_per_s"]
    printed = capsys.readouterr().out
    assert "of linear" in printed
    assert "single texts" in printed


def test_the_simulation_takes_its_rate_from_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serving.json"
    figures = {"ours_1x2": {"tokens_per_s": {"median": 7000}}, "vllm": {}}
    path.write_text(json.dumps({"measurements": {"groups": figures}}))
    assert simulation.measured_rate(path) == 7000
    path.write_text(json.dumps({"measurements": {}}))
    with pytest.raises(SystemExit):
        simulation.main(["--results", str(path)])
    assert "--tokens-per-s" in capsys.readouterr().err
