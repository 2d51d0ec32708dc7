"""A child that scores: one peer, one network, one workload at a time.

A peer is a function from sequences to rewards. All of them hold the same random weights; those
of `transformers` have their head in float32, as ours does.
"""

from __future__ import annotations

import gc
import inspect
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.common import machine
from benchmarks.common.channel import Answer, Message, serve
from benchmarks.common.peer import Peer, Sequences
from benchmarks.common.shapes import SHAPES, build_network
from reward_actor.model.reward_model import RewardModel, get_reward, head_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The tokens that `flash` concatenates for one forward pass.
_FLASH_BATCH_TOKENS = 65_536
_PADDED_BATCH_SIZE = 16
_SORTED_BATCH_SIZES = (8, 16)


def _nothing() -> None:
    return None


def load(order: Message) -> tuple[Message, Answer]:
    """order: peer, shape, dtype, device, threads, workloads (a file), and what engines of
    others load: model_dir, longest, and vllm for that peer."""
    workloads: dict[str, list[list[int]]] = json.loads(Path(order["workloads"]).read_text())
    device = order["device"]
    torch.set_num_threads(order["threads"])
    peer = _make(order)

    def answer(message: Message) -> Message:
        name = message["workload"]
        sequences = workloads[name]
        if "warm_up" in message:
            (peer.warm_up or peer.score)(name, sequences[: max(1, len(sequences) // 8)])
            return {"settings": peer.settings}
        return {
            mode: _measure(peer, name, sequences, before, device)
            for mode, before in peer.modes.items()
        }

    return {"settings": peer.settings}, answer


def _measure(
    peer: Peer, name: str, sequences: Sequences, before: Callable[[], None], device: str
) -> Message:
    on_cuda = device != "cpu"
    if on_cuda:
        peer.score(name, sequences)  # rounds are short: bring the clocks up, the memory in
        torch.cuda.reset_peak_memory_stats()
    gc.collect()
    is_measured = machine.reset_peak_memory()
    before()
    start, start_cpu = time.perf_counter(), time.process_time()
    rewards = peer.score(name, sequences)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    peak: int | None = machine.peak_memory_bytes() if is_measured else None
    if on_cuda:
        peak = torch.cuda.max_memory_allocated()
    if peer.is_elsewhere:
        peak = None
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_memory_bytes": peak,
        "rewards": rewards,
        **peer.details(),
    }


def _make(order: Message) -> Peer:
    name = order["peer"]
    if name == "vllm":
        from benchmarks.common.vllm_peer import make_vllm

        return make_vllm(order)
    if name == "sglang":
        from benchmarks.common.sglang_peer import make_sglang

        return make_sglang(order)
    network = build_network(SHAPES[order["shape"]], getattr(torch, order["dtype"]), order["device"])
    model = RewardModel(network)
    match name:
        case "ours":
            return _ours(model)
        case "padded_16":
            return _padded(network)
        case "padded_sorted":
            return _padded_sorted(network)
        case "flash":
            return _flash(network)
    raise ValueError(f"no peer is called {name!r}")


def _ours(model: RewardModel) -> Peer:
    from reward_actor.engine.engine import Engine

    engine = Engine(model, attention="auto", max_batch_tokens=None)
    engine.freeze()

    def score(name: str, sequences: Sequences) -> list[float]:
        return [float(reward) for reward in engine.raw_scores(sequences)[:, 0]]

    return Peer(score, {"ours": _nothing}, {"path": engine.path})


def _padded(network: PreTrainedModel) -> Peer:
    def score(name: str, sequences: Sequences) -> list[float]:
        return _score_padded(network, sequences, range(len(sequences)), _PADDED_BATCH_SIZE)

    settings = {"batch_size": _PADDED_BATCH_SIZE, "order": "as given"}
    return Peer(score, {"padded_16": _nothing}, settings)


def _padded_sorted(network: PreTrainedModel) -> Peer:
    """Longest first; the batch size is the one of two that is faster on a part of the workload."""
    batch_sizes: dict[str, int] = {}

    def score(name: str, sequences: Sequences, batch_size: int | None = None) -> list[float]:
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        return _score_padded(network, sequences, order, batch_size or batch_sizes[name])

    def warm_up(name: str, sequences: Sequences) -> None:
        sample = list(sequences)
        while len(sample) < max(_SORTED_BATCH_SIZES):
            sample += sequences
        score(name, sample, min(_SORTED_BATCH_SIZES))
        seconds = {}
        for batch_size in _SORTED_BATCH_SIZES:
            start = time.perf_counter()
            score(name, sample, batch_size)
            seconds[batch_size] = time.perf_counter() - start
        batch_sizes[name] = min(seconds, key=lambda size: seconds[size])

    settings = {"batch_size": batch_sizes, "order": "longest first"}
    return Peer(score, {"padded_sorted": _nothing}, settings, warm_up)


@torch.inference_mode()
def _score_padded(
    network: PreTrainedModel, sequences: Sequences, order: Sequence[int], batch_size: int
) -> list[float]:
    device = network.device
    rewards = torch.zeros(len(sequences))
    for start in range(0, len(order), batch_size):
        chosen = list(order[start : start + batch_size])
        width = max(len(sequences[i]) for i in chosen)
        input_ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, i in enumerate(chosen):
            input_ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
            mask[row, : len(sequences[i])] = 1
        _, scores, _ = get_reward(network, input_ids.to(device), 0, 0, mask.to(device))
        rewards[chosen] = scores.cpu()
    return rewards.tolist()


def _flash(network: PreTrainedModel) -> Peer:
    """Sequences end to end, one variable-length attention call a layer, nothing shared (CUDA)."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    takes_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        cu_seq_lens_q: Tensor,
        max_length_q: int,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        # (1, heads, T, D) of transformers -> (T, heads, D) of the kernel, and back as (1, T, ...).
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        more: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}  # causal
        if takes_gqa:
            more["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        out = varlen_attn(
            query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **more
        )
        assert isinstance(out, Tensor)  # a pair only where it is asked for more
        return out.unsqueeze(0), None

    AttentionInterface.register("varlen_unshared", attend)
    network.set_attn_implementation("varlen_unshared")
    backbone = getattr(network, network.base_model_prefix)
    head = getattr(network, head_name(network))

    @torch.inference_mode()
    def score(name: str, sequences: Sequences) -> list[float]:
        rewards: list[Tensor] = []
        for batch in _consecutive(sequences, _FLASH_BATCH_TOKENS):
            lengths = [len(sequence) for sequence in batch]
            ends = torch.tensor([0, *lengths]).cumsum(0)
            row = {
                "input_ids": [token for sequence in batch for token in sequence],
                "position_ids": [place for length in lengths for place in range(length)],
            }
            hidden = backbone(
                **{k: torch.tensor([ids], device=network.device) for k, ids in row.items()},
                use_cache=False,
                cu_seq_lens_q=ends.to(network.device, torch.int32),
                max_length_q=max(lengths),
            ).last_hidden_state
            rewards.append(head(hidden[0, ends[1:].to(network.device) - 1]).squeeze(-1))
        return [float(reward) for reward in torch.cat(rewards).cpu()]

    settings = {"batch_tokens": _FLASH_BATCH_TOKENS, "kernel_shares_kv_heads": takes_gqa}
    return Peer(score, {"flash": _nothing}, settings)


def _consecutive(sequences: Sequences, max_tokens: int) -> list[list[Sequence[int]]]:
    """Neighbours together, each batch within `max_tokens` unless one sequence alone is longer."""
    batches: list[list[Sequence[int]]] = []
    room = 0
    for sequence in sequences:
        if not batches or len(sequence) > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(sequence)
        room -= len(sequence)
    return batches


if __name__ == "__main__":
    serve(load)
