"""The training benchmark: its pairs, its peers, its figures, and a tiny run on plain torch."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_flags import FLAGS

from benchmarks.common.shapes import SHAPES, build_network
from benchmarks.common.workloads import Range
from benchmarks.training.__main__ import main
from benchmarks.training.engines import torch_engine
from benchmarks.training.pairs import PairWorkload, real, synthetic
from benchmarks.training.peers import PEERS, PaddedPairs, Peers, Step, measure_memory
from benchmarks.training.report import TOLERANCES, Differences, Measured, check, summarize, table
from reward_actor.model.reward_model import RewardModel, get_reward

TINY = SHAPES["tiny"]

ranges = st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda r: Range(r[0], sum(r)))


def dialogues(path: Path, num_rows: int, **more: str) -> Path:
    rows = [
        {
            **more,
            "chosen": f"\n\nHuman: How do I count to {i}?\n\nAssistant: One by one.",
            "rejected": f"\n\nHuman: How do I count to {i}?\n\nAssistant: You do not, {'no ' * i}",
        }
        for i in range(num_rows)
    ]
    with gzip.open(path, "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@given(st.integers(1, 5), ranges, ranges, ranges)
def test_both_sides_of_a_synthetic_pair_begin_with_its_prompt(
    num_pairs: int, prompt: Range, chosen: Range, rejected: Range
) -> None:
    workload = synthetic(TINY, num_pairs, prompt, chosen, rejected)
    assert len(workload.pairs) == num_pairs
    for i in range(num_pairs):
        better, worse = workload.pairs.sequences(i)
        assert better[: prompt.low] == worse[: prompt.low]
        assert prompt.low + chosen.low <= len(better) <= prompt.high + chosen.high
        assert prompt.low + rejected.low <= len(worse) <= prompt.high + rejected.high
    again = synthetic(TINY, num_pairs, prompt, chosen, rejected)
    assert workload.pairs.digest() == again.pairs.digest()


def test_distinct_tokens_count_the_shared_beginning_of_a_pair_once() -> None:
    sides = [([5, 6, 7], [5, 6, 8, 9]), ([5, 6], [4])]
    workload = PairWorkload.of("some", sides, {})
    assert workload.num_distinct_tokens([0, 1]) == 5 + 3
    assert workload.pairs.num_tokens([0, 1]) == 7 + 3


def test_no_two_steps_share_a_pair() -> None:
    workload = synthetic(TINY, 6, Range(1, 1), Range(1, 1), Range(1, 1))
    assert [workload.step(i, 2) for i in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_real_pairs_share_what_their_texts_share_and_long_ones_are_left_out(
    tmp_path: Path,
) -> None:
    path = dialogues(tmp_path / "pairs.jsonl.gz", 12, prompt="A long story. " * 3)
    with gzip.open(path, "at") as lines:
        lines.write(json.dumps({"chosen": "short", "rejected": "long \u00e9" * 2000}) + "\n")
    workload = real("hh", TINY, path, 12)
    assert len(workload.pairs) == 12
    assert int(workload.pairs.lengths.max()) <= 1024
    chosen = workload.step(0, 12)
    assert workload.num_distinct_tokens(chosen) < 0.8 * workload.pairs.num_tokens(chosen)
    with pytest.raises(ValueError, match="has 12 pairs of up to 1024 tokens a side; 13 are needed"):
        real("hh", TINY, path, 13)


def test_a_line_that_is_no_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": "a"}\n')
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: expected"):
        real("hh", TINY, path, 1)


def test_the_padded_batch_is_get_reward_of_the_concatenated_sides() -> None:
    network = build_network(TINY, torch.float32, "cpu")
    sequences = [[5, 6, 7], [5, 6], [9, 8, 7, 6, 5], [9]]
    padded = torch.tensor(
        [[5, 6, 7, 0, 0], [9, 8, 7, 6, 5], [5, 6, 0, 0, 0], [9, 0, 0, 0, 0]]
    )  # chosen sides first
    with torch.no_grad():
        _, expected, _ = get_reward(network, padded, 0, 0, padded != 0)
        model = RewardModel(network)
        batch = PaddedPairs(model, sequences)
        rewards = model.head(batch.pooled()).squeeze(-1)
    assert batch.indices == [0, 2, 1, 3]
    assert batch.num_rows == padded.numel()
    # The last bit may differ: the head of `network` itself sums in another order.
    torch.testing.assert_close(rewards, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_all_peers_have_the_same_losses_and_gradients(lora_rank: int) -> None:
    engine = torch_engine(build_network(TINY, torch.float32, "cpu"), lora_rank)
    workload = synthetic(TINY, 20, Range(9, 9), Range(1, 30), Range(1, 30))
    chosen = workload.step(0, 20)
    peers = Peers(engine, micro_batch_tokens=200)
    steps = {peer: peers.step(peer, workload.pairs, chosen) for peer in PEERS}
    assert max(check(steps, Differences(1e-5, 1e-5, 1e-5))) > 0
    computed = [steps[peer].num_computed_tokens for peer in ("ours", "padded_sorted", "padded")]
    assert computed[0] <= workload.num_distinct_tokens(chosen)
    assert all(fewer < more for fewer, more in pairwise(computed))


def test_products_of_frozen_matrices_count_two_thirds() -> None:
    def flops(lora_rank: int) -> int:
        return torch_engine(build_network(TINY, torch.float32, "cpu"), lora_rank).flops_per_token()

    assert flops(0) == 6 * TINY.layer_parameters
    adapters = flops(4) - 4 * TINY.layer_parameters
    assert adapters > 0
    assert flops(8) - 4 * TINY.layer_parameters == 2 * adapters


def step(seconds: float, tokens: int, losses: tuple[float, ...] = (0.5,), norm: float = 2) -> Step:
    return Step(list(losses), norm, tokens, seconds, seconds)


def test_a_peer_that_gets_other_losses_or_gradients_is_named() -> None:
    ours = step(1, 1, (0.5, 1.0))
    tolerance = TOLERANCES["float32"]
    found = check({"ours": ours, "padded": step(1, 1, (0.5, 1.00005))}, tolerance)
    assert found == pytest.approx((5e-5, 2.5e-5, 0))
    for other in (
        step(1, 1, (0.5, 1.001)),
        step(1, 1, (0.5, 1.0), norm=2.001),
        step(1, 1, (0.5, float("nan"))),
        step(1, 1, (0.5, 1.0), norm=float("nan")),
    ):
        with pytest.raises(ValueError, match="of padded differs from ours by"):
            check({"ours": ours, "padded": other}, tolerance)


def test_in_bfloat16_only_a_single_pair_may_be_far_off() -> None:
    ours, tolerance = step(1, 1, (0.5, 1.0)), TOLERANCES["bfloat16"]
    check({"ours": ours, "padded": step(1, 1, (0.4, 1.1), norm=2.03)}, tolerance)
    for other, what in (
        (step(1, 1, (0.45, 1.0)), "mean_loss"),
        (step(1, 1, (0.5, 1.0), norm=2.05), "grad_norm"),
        (step(1, 1, (0.2, 1.3)), "pair_loss"),
    ):
        with pytest.raises(ValueError, match=f"{what} of padded differs from ours by"):
            check({"ours": ours, "padded": other}, tolerance)


def test_memory_that_cannot_be_measured_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise PermissionError("read-only /proc")

    monkeypatch.setattr(Path, "write_text", forbidden)
    device = torch.device("cpu")
    memory = {peer: measure_memory(lambda: step(1, 1), device) for peer in PEERS}
    assert memory["ours"] == {"peak_memory_bytes": None, "step_memory_bytes": None}
    steps = {peer: [step(1, 1)] for peer in PEERS}
    figures = summarize(Measured({}, 1, memory, [1], [1], steps), 10, 500.0)
    assert json.loads(json.dumps(figures))["peers"]["ours"]["peak_memory_bytes"] is None
    assert "unknown" in table({"some": figures})


def test_the_figures_are_those_of_the_definitions() -> None:
    memory = {peer: {"peak_memory_bytes": 7, "step_memory_bytes": 3} for peer in PEERS}
    steps = {
        "ours": [step(1, 30), step(2, 40)],
        "padded": [step(4, 100), step(5, 160)],
        "padded_sorted": [step(3, 60), step(3, 60)],
    }
    measured = Measured({}, 1, memory, [60, 80], [30, 40], steps)
    figures = summarize(measured, flops_per_token=10, matmul_flops_per_s=500.0)
    assert (figures["num_tokens"], figures["num_distinct_tokens"]) == (140, 70)
    ours, padded = figures["peers"]["ours"], figures["peers"]["padded"]
    assert (ours["median_s"], ours["min_s"], ours["max_s"]) == (1.5, 1, 2)
    assert (ours["ratio"]["median"], padded["ratio"]["median"]) == (1, (4 + 2.5) / 2)
    assert ours["pair_tokens_per_s"] == (60 + 40) / 2
    assert ours["share_of_matmul"] == ours["share_of_matmul_needed"] == (30 + 20) / 2 / 50
    assert padded["num_computed_tokens"] == 260
    assert padded["share_of_matmul"] == pytest.approx((25 + 32) / 2 / 50)
    assert padded["share_of_matmul_needed"] == pytest.approx((7.5 + 8) / 2 / 50)
    assert (padded["peak_memory_bytes"], padded["step_memory_bytes"]) == (7, 3)


@pytest.mark.alone
def test_a_tiny_run_on_plain_torch_writes_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "training.json"
    path = dialogues(tmp_path / "pairs.jsonl.gz", 30)
    flags = [*FLAGS.split(), "--engine", "torch", "--hh", str(path), "--synthetic", "--profile"]
    assert main([*flags, "--output", str(output)]) == 0
    result: dict[str, Any] = json.loads(output.read_text())
    assert {"machine", "versions", "preloads", "matmul", "arguments"} <= result.keys()
    assert (result["engine"], result["device"], result["dtype"]) == ("torch", "cpu", "float32")
    assert result["flops_per_token"] == 6 * result["shape"]["layer_parameters"]
    assert result["workloads"].keys() == result["profiles"].keys() == {"hh", "synthetic"}
    printed = capsys.readouterr().out
    for workload in result["workloads"].values():
        assert workload["num_distinct_tokens"] < workload["num_tokens"]
        assert list(workload["peers"]) == list(PEERS)
        for peer, figures in workload["peers"].items():
            assert peer in printed
            assert len(figures["seconds"]) == 2
            for name, difference in figures["max_difference"].items():
                assert difference <= result["tolerance"][name] == 1e-4
            assert figures["peak_memory_bytes"] > figures["step_memory_bytes"] >= 0
            for name in ("pair_tokens_per_s", "share_of_matmul", "share_of_matmul_needed"):
                assert figures[name] > 0
        assert workload["peers"]["ours"]["ratio"] == {"median": 1, "min": 1, "max": 1, "iqr": 0}
    for profiled in result["profiles"].values():
        assert sum(profiled["kinds"].values()) == pytest.approx(profiled["seconds"])
        for kind in ("matrix products", "attention", "elementwise", "optimizer"):
            assert profiled["kinds"][kind] > 0


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--hh", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--pairs", "0"], "positive"),
        (["--prompt-tokens", "1000"], "a side may have 1256 tokens; 1024 fit"),
    ],
)
def test_a_bad_flag_is_said_before_anything_starts(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--shape", "tiny", "--engine", "torch", *flags])
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err
