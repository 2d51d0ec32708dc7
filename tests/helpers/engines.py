"""DeepSpeed engines for tests: processes of their own that run a test's functions on every rank.

torch.distributed and DeepSpeed keep state for the life of a process, and take seconds to import.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isolation import free_port

if TYPE_CHECKING:
    from reward_actor.contract import ScoringContract
    from trainer.config.train import TrainConfig
    from trainer.data.comparisons import Comparisons
    from trainer.data.split import TrainingData
    from trainer.step import Stepper


OnWorkers = Callable[..., list[Any]]
"""`on_workers`, as the fixture gives it."""

_TIME_LIMIT_S = 240


class Workers:
    """Groups of processes that run functions of test modules on every rank, by their number.

    What they exchange is pickled here: a Connection's own pickling of a tensor passes a file
    descriptor, and asks for one authentication key in all processes.
    """

    def __init__(self, python: str) -> None:
        self._python = python
        self._groups: dict[int, list[tuple[subprocess.Popen[bytes], Connection]]] = {}

    def __call__(self, num_workers: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)`, of a test module, returns on every rank.

        Raises RuntimeError with what a rank raised, or if one gives no answer in time; the
        processes, which then may wait for each other, are replaced.
        """
        if num_workers not in self._groups:
            self._groups[num_workers] = self._start(num_workers)
        pipes = [pipe for _, pipe in self._groups[num_workers]]
        for pipe in pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        results: list[Any] = [None] * num_workers
        problem, waiting = "", dict(zip(pipes, range(num_workers), strict=True))
        while waiting:
            # A rank that failed may leave the others waiting for it.
            ready = wait(list(waiting), 10 if problem else _TIME_LIMIT_S)
            if not ready:
                break
            for pipe in pipes:
                if pipe in ready:
                    results[waiting[pipe]], found = pickle.loads(pipe.recv_bytes())
                    problem = problem or (found and f"rank {waiting[pipe]}: {found}")
                    del waiting[pipe]
        if waiting:
            for process, _ in self._groups.pop(num_workers):
                process.kill()
        if problem or waiting:
            raise RuntimeError(problem or f"no answer from ranks {sorted(waiting.values())}")
        return results

    def _start(self, num_workers: int) -> list[tuple[subprocess.Popen[bytes], Connection]]:
        port = free_port()
        group: list[tuple[subprocess.Popen[bytes], Connection]] = []
        for rank in range(num_workers):
            environment = {
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_workers),
                "LOCAL_SIZE": str(num_workers),
                "NODE_RANK": "0",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                # DeepSpeed compiles with ninja, which may not be on the PATH.
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            }
            with Listener(family="AF_UNIX") as listener:
                process = subprocess.Popen(
                    [self._python, __file__, str(listener.address)], env=environment
                )
                group.append((process, listener.accept()))
        return group

    def close(self) -> None:
        for group in self._groups.values():
            for process, pipe in group:
                pipe.close()
                process.wait(30)


def _serve(address: str) -> None:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    pipe = Client(address)
    torch.distributed.init_process_group("gloo")
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over
            return
        try:
            answer = pickle.dumps((function(*args), ""))
        except Exception:
            answer = pickle.dumps((None, traceback.format_exc()))
        pipe.send_bytes(answer)


def comparisons(num: int = 32, seed: int = 0) -> Comparisons:
    """Random pairs of 6 to 40 tokens that share a prompt; a chosen side ends low, a rejected one
    high, so that there is something to learn."""
    import numpy as np

    from trainer.data.comparisons import Comparison, Comparisons

    draw = np.random.default_rng(seed)
    items = []
    for row in range(num):
        prompt = draw.integers(3, 200, draw.integers(5, 20)).tolist()
        sides = [
            [*prompt, *draw.integers(3, 200, draw.integers(1, 20)).tolist(), int(end)]
            for end in (draw.integers(3, 9), draw.integers(190, 199))
        ]
        items.append(Comparison(sides, (1.0, 0.0), str(row), row=row + 1))
    return Comparisons.of(items, ["pairs"])


def settings(model: Path | str, **changes: Any) -> TrainConfig:
    """A small training in float32; `changes` use __ for the dot."""
    from trainer.config.config_file import load_config

    values = {
        "model.path": model,
        "model.dtype": "float32",
        "data.train": "unread",
        "optimizer.learning_rate": 0.003,
        "optimizer.warmup_fraction": 0,
        "training.global_batch_pairs": 8,
        "training.micro_batch_tokens": 150,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return load_config(None, [(key, str(value)) for key, value in values.items()])


def train_without_ray(
    config: TrainConfig, contract: ScoringContract, data: TrainingData, num_steps: int
) -> dict[str, Any]:
    """The whole loop of a training on the ranks of this pool; Ray would only carry the data."""
    import trainer.loop as loop
    from trainer.job import Job, RunFacts

    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    facts = RunFacts(len(data.train), 0, num_steps, 0, "none", 0, data.train.counts(), "chat")
    found, loop.ray.get = loop.ray.get, lambda given: given
    try:
        return loop.training_loop(Job(config, contract, data, facts, {}))  # type: ignore[arg-type]
    finally:
        loop.ray.get = found


def trainer(config: TrainConfig, num_steps: int = 20, weight: float = 1.0) -> Stepper:
    """An engine of this process' rank, with data; release its engine after use."""
    from trainer.data.split import TrainingData
    from trainer.network import zero
    from trainer.step import Stepper

    data = comparisons()
    engine = zero.initialize(config, num_steps)
    return Stepper(engine, config, TrainingData(data, data, (weight,), 0, has_ties=False))


if __name__ == "__main__":
    _serve(sys.argv[1])
