"""A checkpoint for another number of workers, through DeepSpeed's universal format.

ZeRO cuts the optimizer's state and the float32 weights into one part for each worker. The universal
format has them whole, by parameter, and every number of workers cuts its own parts out of it.
(Lian et al., arXiv:2406.18820.) Only AdamW's state is known to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import distributed as dist

from trainer.checkpoints.manifest import TAG, Problem, SavedState, fetched
from trainer.checkpoints.storage import Storage
from trainer.deepspeed_internals import to_universal
from trainer.network.collectives import from_all, wait_until


@contextlib.contextmanager
def reshaped(
    storage: Storage, state: SavedState, is_sharded: bool, staging: Path
) -> Iterator[tuple[Path, Problem | None]]:
    """A local folder to load a checkpoint of another number of workers from, on all at once, and
    what is wrong with it. The first worker of every node makes it.

    `is_sharded`: whether any of the state is in parts; otherwise it is only fetched.
    """

    def prepare() -> tuple[Path, Problem | None]:
        place, problem = stack.enter_context(fetched(storage, state, staging=staging))
        if problem is not None or not is_sharded:
            return place, problem
        folder = TemporaryDirectory(prefix="rayward-universal-", dir=staging)
        target = Path(stack.enter_context(folder))
        return target, _convert(place / TAG, target / TAG)

    node, problem = os.environ["NODE_RANK"], None
    mine: tuple[str, Path] | None = None
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(max_workers=1) as thread:
        task = thread.submit(prepare) if int(os.environ["LOCAL_RANK"]) == 0 else None
        wait_until(lambda: all(from_all(task is None or task.done())))
        if task is not None:
            place, problem = task.result()
            mine = node, place
        places = dict(found for found in from_all(mine) if found is not None)
        yield places[node], problem
        dist.barrier()  # others may still read what the first of the node deletes


def _convert(source: Path, target: Path) -> Problem | None:
    try:
        to_universal(source, target)
    # Whatever DeepSpeed or a full disk says: the other workers wait to hear of it.
    except Exception as error:
        text = f"cannot be cut up anew: {type(error).__name__}: {error}"
        return Problem(text, is_damage=False)
    return None
