"""SGLang's engine as a peer, through its offline API: without its server, the least it can cost.

It scores in processes of its own, whose memory is not measured.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common.channel import Message
from benchmarks.common.peer import Peer, Sequences
from benchmarks.common.shapes import SHAPES


def engine_arguments(order: Message) -> dict[str, Any]:
    """Arguments of `sglang.Engine`."""
    longest = max(order["longest"], 64)
    return {
        "model_path": order["model_dir"],
        "is_embedding": True,  # its name for whatever is no generation, reward models too
        "dtype": order["dtype"],
        "device": order["device"].partition(":")[0],
        "context_length": min(longest + 1, SHAPES[order["shape"]].max_position_embeddings),
        "mem_fraction_static": 0.4,  # the other peers live on the same GPU
        "log_level": "error",
    }


def make_sglang(order: Message) -> Peer:
    """With its prefix cache cold, then again warm."""
    from sglang import Engine
    from sglang.srt.managers.io_struct import EmbeddingReqInput

    arguments = engine_arguments(order)
    engine = Engine(**arguments)
    cached: Message = {}

    async def encode(sequences: list[list[int]]) -> list[Message]:
        # What `Engine.encode` does (0.5.23), which takes texts only.
        request = EmbeddingReqInput(input_ids=sequences)
        found: list[Message] = await anext(engine.tokenizer_manager.generate_request(request, None))
        return found

    def score(name: str, sequences: Sequences) -> list[float]:
        results = engine.loop.run_until_complete(encode([list(ids) for ids in sequences]))
        cached["num_cached_tokens"] = sum(r["meta_info"].get("cached_tokens", 0) for r in results)
        return [float(result["embedding"][0]) for result in results]

    def empty_cache() -> None:
        if not engine.flush_cache().success:
            raise RuntimeError("SGLang could not empty its prefix cache")

    modes = {"sglang_cold": empty_cache, "sglang_warm": lambda: None}
    settings = {"arguments": arguments}
    return Peer(score, modes, settings, details=lambda: dict(cached), is_elsewhere=True)
