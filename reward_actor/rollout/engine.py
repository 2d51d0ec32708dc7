"""A policy in vLLM's engine, whose processes end with this one. Asked from one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from reward_actor.errors import EngineDied
from reward_actor.reaper import Reaper
from reward_actor.rollout.records import Sampling, Turn, VllmSettings
from reward_actor.rollout.vllm_worker import PolicyWorker

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

Running = Literal["finish", "resume"]
"""What becomes of requests that run while weights are updated: they finish on the version that
they began with, which the update waits for, or are resumed on the new one, with their keys and
values computed again."""

Weights = str | NDArray[np.uint8]
"""A directory with safetensors, or the bytes of one such file."""

_CPU_BATCH_TOKENS = 8192
_SHARED_MEMORY = Path("/dev/shm")
_SHUTDOWN_S = 15.0


class PolicyEngine:
    """One policy in one vLLM engine, on a GPU or several of this machine, or on the CPU."""

    def __init__(self, settings: VllmSettings, max_length: int) -> None:
        """Raises ValueError if vLLM does not take the model or cannot start."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._num_requests = 0
        self._num_adapters = 0
        self._adapters: dict[str, tuple[LoRARequest, int]] = {}
        self._reaper = Reaper()
        os.environ.update(self._reaper.environment)  # read by the processes that it starts
        arguments: dict[str, Any] = {
            "model": settings.model,
            "dtype": settings.dtype,
            "max_model_len": max_length,
            "disable_log_stats": True,
            # vLLM's default is the logits' own distribution, whatever the temperature.
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": f"{PolicyWorker.__module__}.{PolicyWorker.__qualname__}",
        }
        if settings.max_adapters:
            arguments |= {
                "enable_lora": True,
                "max_lora_rank": settings.max_adapter_rank,
                "max_loras": settings.max_adapters + 1,  # while one takes another's place
            }
        if settings.num_gpus:
            arguments |= {
                "tensor_parallel_size": settings.num_gpus,
                "gpu_memory_utilization": settings.gpu_memory_utilization,
                "enable_sleep_mode": settings.sleeps,
                # In a Ray actor vLLM would otherwise look for its own placement group.
                "distributed_executor_backend": "mp" if settings.num_gpus > 1 else None,
            }
        else:
            arguments |= {
                "enforce_eager": True,  # compiling costs more than a CPU run gains
                # vLLM 0.32 rewinds the generator of a seeded request whose prompt is only half
                # read, and PyTorch's CPU generator cannot be rewound: the engine would die.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(_CPU_BATCH_TOKENS, max_length),
            }
        try:
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        except (RuntimeError, ValueError, TimeoutError) as error:
            self._reaper.close()
            raise ValueError(_why(settings.model, error)) from error
        generation = self._engine.model_config.try_get_generation_config()
        self._eos_ids = _as_set(generation.get("eos_token_id"))

    async def sample(
        self, prompt_ids: list[int], sampling: Sampling, seed: int, max_tokens: int
    ) -> list[Turn]:
        """The n completions of a prompt. Raises EngineDied, and ValueError for a sampling that vLLM
        does not take and an adapter that is not loaded."""
        from vllm.v1.engine.exceptions import EngineDeadError

        parameters = parameters_of(sampling, seed, max_tokens)
        if sampling.adapter is not None and sampling.adapter not in self._adapters:
            raise ValueError(f"no adapter {sampling.adapter!r} is loaded; update_weights loads one")
        adapter, version = self._adapters.get(sampling.adapter or "", (None, None))
        self._num_requests += 1
        final: Any = None
        try:
            async for output in self._engine.generate(
                {"prompt_token_ids": prompt_ids},
                parameters,
                f"rollout-{self._num_requests}",
                lora_request=adapter,
            ):
                final = output
        except EngineDeadError as error:
            raise EngineDied("vLLM's engine core has ended") from error
        outputs = sorted(final.outputs, key=lambda output: output.index)
        return [
            Turn(
                prompt_ids,
                output.text,
                list(output.token_ids),
                _log_probs(output),
                _versions(output) if version is None else [version] * len(output.token_ids),
                output.finish_reason,
                ended_with_eos(output, self._eos_ids),
            )
            for output in outputs
        ]

    async def answer(self) -> None:
        """Return once the engine core does. Raises EngineDied."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.is_paused()
        except EngineDeadError as error:
            raise EngineDied("vLLM's engine core has ended") from error

    async def update_weights(self, weights: Weights, version: int, running: Running) -> None:
        """Continue with other weights of the same shapes, and an empty prefix cache."""
        with contextlib.ExitStack() as stack:
            if isinstance(weights, str):
                directory = weights
            else:  # written in a thread: what is being sampled goes on
                directory = stack.enter_context(_directory_for(weights.nbytes))
                await asyncio.to_thread(weights.tofile, Path(directory, "model.safetensors"))
            await self._engine.pause_generation(mode="wait" if running == "finish" else "keep")
            try:
                await self._engine.collective_rpc("reload_policy", args=(directory,))
                await self._engine.update_weight_version(str(version))
            finally:
                await self._engine.resume_generation()

    async def load_adapter(self, name: str, directory: str, version: int) -> None:
        """Sample with this LoRA adapter where one is asked for by this name; what runs finishes on
        the one before. Raises ValueError for one that vLLM does not take."""
        from vllm.lora.request import LoRARequest

        self._num_adapters += 1  # vLLM knows them, and what was cached of them, by number
        adapter = LoRARequest(name, self._num_adapters, directory)
        try:
            await self._engine.add_lora(adapter)
        except Exception as error:  # whatever its process raised comes as a plain one
            raise ValueError(f"{directory}: vLLM does not take this adapter: {error}") from error
        self._adapters[name] = adapter, version

    async def set_version(self, version: int) -> None:
        """Of the weights that it has."""
        await self._engine.update_weight_version(str(version))

    async def sleep(self) -> None:
        """Once what runs has finished, put the weights into the host's memory, and forget keys and
        values. On a GPU, with `VllmSettings.sleeps`."""
        await self._engine.sleep(level=1, mode="wait")

    async def wake(self) -> None:
        await self._engine.wake_up()

    def close(self) -> None:
        self._engine.shutdown(timeout=_SHUTDOWN_S)
        self._reaper.close()


def parameters_of(sampling: Sampling, seed: int, max_tokens: int) -> Any:
    """As vLLM has them. Raises ValueError for what it does not take."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    try:
        return SamplingParams(
            n=sampling.num_completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=max_tokens,
            seed=seed,
            stop=list(sampling.stop),
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **sampling.other,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"vLLM does not take this sampling: {error}") from error


def _log_probs(output: Any) -> list[float]:
    return [
        float(at_token[token].logprob)
        for token, at_token in zip(output.token_ids, output.logprobs, strict=True)
    ]


def _versions(output: Any) -> list[int]:
    return [
        int(span.version) for span in output.weight_versions for _ in range(span.start, span.end)
    ]


def ended_with_eos(output: Any, eos_ids: frozenset[int]) -> bool:
    """Of vLLM's CompletionOutput: whether the policy ended it by itself.

    vLLM gives no reason for the tokenizer's end-of-sequence token, but the token for any other that
    the generation config has (Gemma's end of turn), as for one of `stop_token_ids`.
    """
    reason = output.stop_reason
    return output.finish_reason == "stop" and (reason is None or reason in eos_ids)


def _as_set(ids: int | list[int] | None) -> frozenset[int]:
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def _directory_for(num_bytes: int) -> tempfile.TemporaryDirectory[str]:
    """In memory, where there is a file system for it that has room."""
    has_room = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 1.1 * num_bytes
    return tempfile.TemporaryDirectory(
        prefix="rayward-weights-", dir=_SHARED_MEMORY if has_room else None
    )


def _why(model: str, error: Exception) -> str:
    """In one line."""
    if isinstance(error, ValueError):
        return f"{model}: vLLM does not take this policy: {' '.join(str(error).split())}"
    return (
        f"{model}: vLLM's engine could not start; its own lines say why. Most often its memory is "
        "too small for the model and one sequence of max_model_len (gpu_memory_utilization, on a "
        "CPU cpu_kv_cache_gib)"
    )
