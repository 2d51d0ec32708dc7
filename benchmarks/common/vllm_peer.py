"""vLLM's pooling engine as a peer, in the settings that were fastest on this kind of machine.

vLLM is asked for through its offline API, without its server: the least that it can cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common.channel import Message
from benchmarks.common.peer import Peer, Sequences
from benchmarks.common.shapes import SHAPES

_NUM_SEQS = 512


def environment(threads: int, device: str, overrides: Mapping[str, Any]) -> dict[str, str]:
    """Environment variables of the vLLM child; upper-case `overrides` win."""
    variables = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if device == "cpu":
        variables |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": "4",
        }
    return variables | {k: str(v) for k, v in overrides.items() if k.isupper()}


def engine_arguments(order: Message) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; lower-case `order["vllm"]` win."""
    longest = max(order["longest"], 64)
    arguments: dict[str, Any] = {
        "dtype": order["dtype"],
        "max_model_len": min(longest, SHAPES[order["shape"]].max_position_embeddings),
        "max_num_seqs": _NUM_SEQS,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": True,
    }
    if order["device"] == "cpu":
        # vLLM's own 128 would share no prompt that is shorter; below 32 its kernels are slower.
        arguments |= {"enforce_eager": True, "block_size": 32}
    else:
        # The other peers live on the same GPU.
        arguments |= {"gpu_memory_utilization": 0.4}
    return arguments | {k: v for k, v in order["vllm"].items() if not k.isupper()}


def make_vllm(order: Message) -> Peer:
    """With its prefix cache cold, then again warm.

    The number of tokens that came from the cache shows that it was cold: within a cold run only
    what sequences share can come from it.
    """
    from vllm import LLM

    arguments = engine_arguments(order)
    model_dir = order["model_dir"]
    engine = LLM(model=model_dir, runner="pooling", disable_log_stats=True, **arguments)
    cached: Message = {}

    def score(name: str, sequences: Sequences) -> list[float]:
        prompts: Any = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        results = engine.classify(prompts, use_tqdm=False)
        cached["num_cached_tokens"] = sum(result.num_cached_tokens for result in results)
        return [float(result.outputs.probs[0]) for result in results]

    def empty_cache() -> None:
        if not engine.reset_prefix_cache():
            raise RuntimeError("vLLM could not empty its prefix cache")

    modes = {"vllm_cold": empty_cache, "vllm_warm": lambda: None}
    variables = environment(order["threads"], order["device"], order["vllm"])
    settings = {"arguments": arguments, "environment": variables}
    return Peer(score, modes, settings, details=lambda: dict(cached))
