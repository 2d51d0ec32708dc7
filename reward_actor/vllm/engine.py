"""vLLM's pooling engine, in processes of its own, asked from ordinary threads. No Ray.

`vllm.LLM` would do but for two things (0.32): it waits for ever when its engine core is killed, and
it takes one pooling task only. `AsyncLLM` reports the death and takes the task with each request.
Legend: n sequences, K heads, T tokens of one sequence.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from reward_actor.errors import EngineDied
from reward_actor.reaper import Reaper

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Scores = NDArray[np.float32]

Result = TypeVar("Result")
Task = Literal["classify", "token_classify"]

# On a CPU: vLLM would take gpu_memory_utilization of the machine's memory.
_CPU_CACHE_BYTES = 2**30
# Longer than its workers take to give back what they share; what is there then is killed.
_SHUTDOWN_S = 15.0
# The environment belongs to the whole process.
_STARTING = threading.Lock()


class VllmEngine:
    """One model in one engine, on one GPU or several of this machine, or on the CPU.

    Safe to share between threads. The engine's processes end with `close`, and with this process.
    """

    def __init__(
        self,
        directory: Path,
        *,
        dtype: str,
        max_length: int,
        tensor_parallel: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_batch_tokens: int | None = None,
    ) -> None:
        """max_batch_tokens: of one forward pass; None: vLLM's choice.

        Raises ValueError if vLLM does not take the model or cannot start.
        """
        self._num_requests = 0
        self._pending: set[asyncio.Task[Any]] = set()
        self._is_closed = False
        self._closing = threading.Lock()
        self._reaper = Reaper()
        resource_tracker.ensure_running()  # this process's own, so not one of the engine's
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True).start()
        arguments: dict[str, Any] = {
            "model": str(directory),
            "runner": "pooling",
            "dtype": dtype,
            "max_model_len": max_length,
            "max_num_batched_tokens": max_batch_tokens,
            "tensor_parallel_size": tensor_parallel,
            # In a Ray actor vLLM would otherwise look for a placement group. Workers that are
            # plain processes end with the engine core.
            "distributed_executor_backend": "mp" if tensor_parallel > 1 else None,
            "load_format": "safetensors",
            "skip_tokenizer_init": True,  # ids go in
            "disable_log_stats": True,
            # Prefix caching is left to vLLM: on, wherever attention is causal.
        }
        environment = self._reaper.environment | {
            "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // tensor_parallel))
        }
        try:
            with _STARTING, _environment(environment):
                before = multiprocessing.active_children()
                self._engine = self._wait(_start(arguments, gpu_memory_utilization))
                now = multiprocessing.active_children()
            self._processes = [process for process in now if process not in before]
        except (RuntimeError, ValueError, TimeoutError) as error:
            self._end()
            raise ValueError(_why(directory, error)) from error
        except BaseException:
            self._end()
            raise

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of one forward pass."""
        return int(self._engine.vllm_config.scheduler_config.max_num_batched_tokens)

    def pooled(self, sequences: Sequence[list[int]], task: Task) -> list[Scores]:
        """What the head says, without any activation: (K,) of the last token of each sequence
        ("classify"), or (T, K) of every token ("token_classify"), in the order of the sequences.

        Raises EngineDied, and RuntimeError for what vLLM could not do.
        """
        from vllm.exceptions import VLLMServerError

        with self._closing:  # what comes too late for the loop would wait for ever
            self.check()
            work = asyncio.run_coroutine_threadsafe(self._pooled(sequences, task), self._loop)
        try:
            pooled: list[Scores] = work.result()
        except CancelledError:
            raise EngineDied("vLLM's engine was closed") from None
        except VLLMServerError as error:
            self.check()
            raise RuntimeError(f"vLLM could not score: {error.__cause__ or error}") from error
        return pooled

    def offload(self) -> bool:
        """Move the weights to host memory and drop the cache (vLLM's sleep mode, level 1), until
        `restore`; False on a platform without that mode. Raises as `restore` does."""
        if not self._engine.vllm_config.model_config.enable_sleep_mode:
            return False
        self._utility("sleep", level=1)
        return True

    def restore(self) -> None:
        """Move them back. Raises EngineDied, and RuntimeError if the device has no room for them;
        the engine is of no use then."""
        self._utility("wake_up")

    def check(self) -> None:
        """Raise EngineDied if the engine's processes are not there any more."""
        if self._is_closed or self._engine.errored:
            raise EngineDied("vLLM's engine core has ended")

    def close(self) -> None:
        """End the engine's processes; whoever waits for scores gets EngineDied."""
        with self._closing:
            if not self._is_closed:
                self._is_closed = True
                self._wait(self._shut_down())
                self._end()
                for process in self._processes:
                    process.join()

    async def _pooled(self, sequences: Sequence[list[int]], task: Task) -> list[Scores]:
        this = asyncio.current_task()
        assert this is not None
        self._pending.add(this)
        try:
            found = await asyncio.gather(
                *(self._pool(ids, task) for ids in sequences), return_exceptions=True
            )
        finally:
            self._pending.discard(this)
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return [each for each in found if not isinstance(each, BaseException)]

    async def _pool(self, ids: list[int], task: Task) -> Scores:
        from vllm import PoolingParams

        self._num_requests += 1
        final: Any = None
        async for output in self._engine.encode(
            {"prompt_token_ids": ids},
            PoolingParams(task=task, use_activation=False),
            str(self._num_requests),
        ):
            final = output
        scores: Scores = final.outputs.data.float().numpy()
        return scores

    async def _shut_down(self) -> None:
        pending = list(self._pending)
        self._engine.shutdown(timeout=_SHUTDOWN_S)
        for each in pending:  # vLLM tells those who wait for its output nothing
            each.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._reaper.close()

    def _utility(self, name: str, **arguments: Any) -> None:
        self.check()
        try:
            self._wait(getattr(self._engine, name)(**arguments))
        except Exception as error:  # vLLM raises a plain Exception for what fails in its core
            self.check()
            raise RuntimeError(f"vLLM could not {name}: {error}") from error

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _start(arguments: dict[str, Any], gpu_memory_utilization: float) -> Any:
    """The engine, in a loop: it watches its core only then."""
    from vllm import AsyncEngineArgs
    from vllm.config import PoolerConfig
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    if current_platform.is_cpu():
        arguments["enforce_eager"] = True  # compiling costs more than it gains
        if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    else:
        arguments["gpu_memory_utilization"] = gpu_memory_utilization
        # Of some builds the platform has that mode, but not the allocator that it needs.
        arguments["enable_sleep_mode"] = (
            current_platform.is_sleep_mode_available()
            and current_platform.is_cumem_allocator_available()
        )
    # As the contract says, whatever the directory does.
    arguments["pooler_config"] = PoolerConfig(seq_pooling_type="LAST", tok_pooling_type="ALL")
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """What vLLM and its processes take from the environment alone, as long as they start."""
    changes = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        **more,
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _why(directory: Path, error: Exception) -> str:
    """In one line."""
    if isinstance(error, ValueError):
        return f"{directory}: vLLM does not take this model: {' '.join(str(error).split())}"
    return (
        f"{directory}: vLLM's engine could not start; why stands in this process's log. Most often "
        "its memory is too small for the model and one sequence of the contract's max_length "
        "(gpu_memory_utilization, on a CPU VLLM_CPU_KVCACHE_SPACE in GiB), or vLLM does not know "
        "the network as a sequence classifier (then use engine forest)"
    )
