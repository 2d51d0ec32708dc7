"""Replicas that sleep instead of scoring, behind what an ingress takes for a Ray Serve handle.

Each has a real `Batcher`; its work takes a given time per token. They live in an event loop of
their own, on threads of their own, so that their CPU time can be told from the ingress's. A message
goes to the less busy of two replicas drawn at random, as Ray Serve's router sends it. What Ray
itself costs is not simulated.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Coroutine, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.serving.model import make_contract, make_tokenizer
from reward_actor.model.tokenizer import identity, tokenizer_fingerprint
from reward_actor.readout import Readout
from reward_actor.schema import ModelInfo
from serve.replica.batcher import Batcher
from serve.wire import Description, FlatSequences, ReplicaReply

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from benchmarks.common.shapes import Shape

_MAX_BATCH_TOKENS = 65_536
_GENERATION = 0
# What the threads of the replicas are called: of their loop, and of each batcher.
_THREADS = ("replicas", "scorer", "preparer")


def describe(shape: Shape, directory: Path) -> Description:
    """What a replica of this shape would say; its tokenizer is saved in the directory."""
    tokenizer = make_tokenizer(shape)
    tokenizer.save_pretrained(directory)
    contract = make_contract(shape, tokenizer)
    return Description(
        replica="simulated",
        generation=_GENERATION,
        name="simulated",
        directory=str(directory),
        tokenizer=identity(tokenizer),
        max_batch_tokens=_MAX_BATCH_TOKENS,
        contract=contract.to_json(),
        readout=Readout.of(contract),
        info=ModelInfo(
            model_version="sha256:simulated",
            dtype="float32",
            path="simulated",
            fallback_reason=None,
            format=contract.format,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer, contract),
            template_date=None,
            normalisation={},
            versions={},
        ),
    )


class Sleep:
    """Work of the batcher: so many seconds for each token of the unshared sequences."""

    def __init__(self, s_per_token: float) -> None:
        self._s_per_token = s_per_token

    def prepare(self, sequences: Sequence[Any]) -> list[int]:
        return [len(sequence) for sequence in sequences]

    def run(self, lengths: list[int]) -> tuple[NDArray[np.float32], float]:
        time.sleep(sum(lengths) * self._s_per_token)
        return np.zeros((len(lengths), 1), np.float32), 1.0


class SimulatedReplica:
    """`Replica` without Ray and without a model."""

    def __init__(self, description: Description, s_per_token: float) -> None:
        self._work = Sleep(s_per_token)
        self._batcher = Batcher(
            max_batch_tokens=description.max_batch_tokens, max_queued_tokens=2**31
        )
        self.num_ongoing = 0

    async def score(self, message: FlatSequences) -> ReplicaReply:
        rows = message.rows()
        scored = await self._batcher.submit(rows, message.num_tokens, self._work)
        return ReplicaReply(
            "ok",
            _GENERATION,
            raw_scores=scored.results,
            score_s=scored.score_s,
            tokens_per_s=self._batcher.rate.tokens_per_s,
        )


class _Response:
    """What a call of a handle returns: awaitable, and it can be cancelled."""

    def __init__(self, answer: asyncio.Future[Any]) -> None:
        self._answer = answer

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer.__await__()

    def cancel(self) -> None:
        self._answer.cancel()


class _Method:
    def __init__(self, call: Any) -> None:
        self.remote = call


class _Broadcast:
    def __init__(self, answers: list[Description]) -> None:
        self._answers = answers

    async def _fetch_replica_results_async(self) -> list[_Answer]:
        return [_Answer(each) for each in self._answers]


class _Answer:
    def __init__(self, value: Description) -> None:
        self._value = value

    async def get_async(self) -> Description:
        return self._value


class SimulatedReplicas:
    """Replicas under the methods that `serve.ingress.replicas` calls of a DeploymentHandle."""

    is_initialized = True

    def __init__(self, description: Description, num_replicas: int, s_per_token: float) -> None:
        self._description = description
        self._random = random.Random(num_replicas)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=_THREADS[0])
        self._thread.start()
        self._replicas = self._run(self._make(num_replicas, s_per_token)).result()
        self.score = _Method(self._score)
        self.describe = _Method(lambda: _Response(_done(description)))

    def broadcast(self, method: str) -> _Broadcast:
        assert method == "describe", method
        return _Broadcast([self._description] * len(self._replicas))

    def cpu_seconds(self) -> float:
        """CPU time of the replicas' threads so far."""
        return sum(
            time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            for thread in threading.enumerate()
            if thread.name.startswith(_THREADS) and thread.ident is not None
        )

    def close(self) -> None:
        """End the replicas, with what they still score."""
        self._run(self._cancel_all()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _make(self, num_replicas: int, s_per_token: float) -> list[SimulatedReplica]:
        return [SimulatedReplica(self._description, s_per_token) for _ in range(num_replicas)]

    async def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _score(self, message: FlatSequences, *_: Any) -> _Response:
        few = min(2, len(self._replicas))
        replica = min(self._random.sample(self._replicas, few), key=lambda r: r.num_ongoing)
        replica.num_ongoing += 1
        answer = asyncio.wrap_future(self._run(replica.score(message)))

        def one_less(_: asyncio.Future[ReplicaReply]) -> None:
            replica.num_ongoing -= 1

        answer.add_done_callback(one_less)
        return _Response(answer)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _done(value: Any) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future
