"""Two workers that train under real DeepSpeed without Ray, to be killed or starved by tests.

`Victims(...)` starts them ahead of time, since their imports take seconds; `go()` lets them train.
As a program this file is one such worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

NUM_WORKERS = 2
TRAINED = 6  # steps of a schedule's warm-up and decay


@dataclass
class Victims:
    """Two workers. After every step the first one prints {"step", "num_failed"}."""

    python: str
    model: Path
    directory: Path
    changes: dict[str, Any] = field(default_factory=dict)
    last: int = 10_000
    paced: bool = False
    """Whether they wait for `go` before every step, and for its checkpoint after it."""

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        told = {
            "model": str(self.model), "directory": str(self.directory), "last": self.last,
            "paced": self.paced, "changes": self.changes,
        }  # fmt: skip
        # A file that others have met in would tell where those were.
        meeting = self.directory.with_name(f"{self.directory.name}-{uuid.uuid4().hex}")
        here = Path(__file__).parent
        self.processes = [
            subprocess.Popen(
                [self.python, __file__, json.dumps(told), str(rank), str(meeting)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(self.directory.with_suffix(f".{rank}.log")).open("a"),
                text=True,
                env={**os.environ, "PYTHONPATH": f"{here.parent}:{here}", "OMP_NUM_THREADS": "1"},
            )
            for rank in range(NUM_WORKERS)
        ]

    def go(self) -> None:
        for process in self.processes:
            _pipe(process.stdin).write("go\n")
            _pipe(process.stdin).flush()

    def heard(self) -> dict[str, Any]:
        """The next line of the first worker."""
        line = _pipe(self.processes[0].stdout).readline()
        assert line, f"a worker has ended: {[p.wait(60) for p in self.processes]}"
        values: dict[str, Any] = json.loads(line)
        return values

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()

    def finish(self) -> list[dict[str, Any]]:
        """What the first worker says until both are done."""
        out, _ = self.processes[0].communicate(timeout=120)
        self.processes[1].communicate(timeout=120)
        assert [process.returncode for process in self.processes] == [0, 0]
        return [json.loads(line) for line in out.splitlines()]


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def work(model: str, directory: str, last: int, paced: bool, changes: dict[str, Any]) -> None:
    """Go on to a step, saving after every one; the weights then lie beside the checkpoints."""
    said = sys.stdout
    sys.stdout = sys.stderr  # DeepSpeed prints
    import numpy as np
    import torch
    from torch import distributed as dist
    from trainer_runs import overrides, settings

    from trainer.checkpoints.checkpoints import Checkpoints
    from trainer.config.config_file import load_config
    from trainer.data.comparisons import Comparison, Comparisons
    from trainer.data.split import TrainingData
    from trainer.network import zero
    from trainer.step import Stepper

    rng = np.random.default_rng(0)
    items = []
    for row in range(32):
        prompt, *sides = (rng.integers(3, 250, rng.integers(4, 20)).tolist() for _ in range(3))
        items.append(Comparison([prompt + side for side in sides], (1.0, 0.0), str(row), row=row))
    comparisons = Comparisons.of(items, ["made up"])
    data = TrainingData(comparisons, comparisons, (1.0,), 0, has_ties=False)
    changes = {"training__global_batch_pairs": 4, **changes}
    config = load_config(None, overrides(settings(Path(model), Path(), Path(directory), **changes)))
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    input()
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank,
                            world_size=NUM_WORKERS)  # fmt: skip
    trainer = Stepper(zero.initialize(config, TRAINED), config, data)
    checkpoints = Checkpoints(trainer.engine, config)

    def say(step: int) -> None:
        if rank == 0:
            print(json.dumps({"step": step, "num_failed": checkpoints.num_failed}), file=said,
                  flush=True)  # fmt: skip

    start = checkpoints.restore()
    say(start)
    for step in range(start, last):
        if paced:
            input()
        trainer.step(step)
        checkpoints.save(step + 1)
        if paced:
            checkpoints.wait()
        say(step + 1)
        checkpoints.poll()
    checkpoints.close()
    weights = zero.whole_weights(trainer.engine)
    if rank == 0:
        torch.save(weights, Path(directory) / "weights.pt")


if __name__ == "__main__":
    os.environ.update(
        RANK=sys.argv[2], LOCAL_RANK=sys.argv[2], WORLD_SIZE=str(NUM_WORKERS),
        LOCAL_SIZE=str(NUM_WORKERS), MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    work(**json.loads(sys.argv[1]))
