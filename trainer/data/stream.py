"""Data sets that are larger than memory: Ray Data reads and renders, files take the tokens.

The result is the same as in memory, bit for bit. What grows with the data in this process is its
labels and digests, about a hundred bytes for each comparison.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from pydantic import TypeAdapter

from reward_actor.cluster import connect
from reward_actor.contract import ScoringContract, sha256_text
from reward_actor.sources import SPLIT_BYTES, Split, fingerprint, is_blank, read_split, splits
from trainer.config.data import Source
from trainer.config.train import TrainConfig
from trainer.data.columns import RenderedPart, from_row, to_row
from trainer.data.comparisons import Comparisons
from trainer.data.gather import gather, take
from trainer.data.parse import parse_line
from trainer.data.render import BLOCK_ROWS, Block, Rules, Tally, render_block
from trainer.data.rows import Row
from trainer.data.split import Prepared, Summary, decide, rules_of

if TYPE_CHECKING:
    import pyarrow as pa

    from reward_actor.render import Renderer

DATA_DIR = "data"
_SUMMARY_FILE = "summary.json"
_VERSION = 3  # of the files, and of how rows become what is in them


@dataclass(frozen=True)
class RenderTask:
    """What one task reads and renders: splits of one source."""

    source: int
    splits: list[Split]
    columns: Source
    max_rows: int | None


@dataclass(frozen=True)
class RenderSettings:
    """What every task needs: a model's directory or name, the contract as JSON, the rules."""

    model: str
    contract: str
    rules: Rules
    names: tuple[str, ...]


def prepare_stream(
    config: TrainConfig, contract: ScoringContract, split_bytes: int = SPLIT_BYTES
) -> Prepared:
    """Read, render and split the data of a training into `output_dir`/data, on a Ray cluster.

    The directory there is complete or absent, and used again by a run whose files, settings and
    contract are the same. A task reads about `split_bytes` at a time, or one .jsonl.gz file.
    Raises ValueError for data that cannot be used.
    """
    wanted = _identity(config, contract)
    home = Path(config.output_dir) / DATA_DIR
    home.mkdir(parents=True, exist_ok=True)
    directory = home / sha256_text(json.dumps(wanted, sort_keys=True))[:16]
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be writing the same
        if not directory.exists():
            partial = directory.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            try:
                _write(partial, config, contract, split_bytes)
                partial.rename(directory)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    summary = TypeAdapter(Summary).validate_json((directory / _SUMMARY_FILE).read_bytes())
    train, heldout = (Comparisons.open(directory / name) for name in ("train", "heldout"))
    return Prepared.of(train, heldout, summary, config.data, config.training.seed)


def _identity(config: TrainConfig, contract: ScoringContract) -> dict[str, Any]:
    """What decides the files: sources, the settings that choose among their rows, the rendering."""
    from reward_actor.model.tokenizer import load_tokenizer, tokenizer_fingerprint

    def described(sources: Mapping[str, Source]) -> list[Any]:
        return [
            [name, source.model_dump(exclude={"weight"}), fingerprint(name)]
            for name, source in sources.items()
        ]

    data = config.data
    return {
        "version": _VERSION,
        "train": described(data.sources("train")),
        "eval": described(data.sources("eval")),
        "eval_fraction": data.eval_fraction,
        "fold": data.fold,
        "max_pairs": data.max_pairs,
        "deduplicate": data.deduplicate,
        "rules": asdict(rules_of(data, config.loss.attributes)),
        "contract": contract.to_json(),
        "tokenizer": tokenizer_fingerprint(load_tokenizer(Path(config.model.directory)), contract),
    }


def _write(
    directory: Path, config: TrainConfig, contract: ScoringContract, split_bytes: int
) -> None:
    staged = directory / "staged"
    staged.mkdir()
    was_connected = ray.is_initialized()
    connect(2)
    try:
        gathered = []
        for which in ("train", "eval") if config.data.eval else ("train",):
            sources = config.data.sources(which)  # type: ignore[arg-type]
            max_rows = config.data.max_pairs if which == "train" else None
            rendering = RenderSettings(
                config.model.directory,
                json.dumps(contract.to_json()),
                rules_of(config.data, config.loss.attributes),
                tuple(sources),
            )
            jobs, names = _tasks(sources, max_rows, split_bytes), list(sources)
            with closing(_rendered(jobs, rendering)) as parts:
                blocks, file = _numbered(parts, len(names)), staged / f"{which}.ids"
                gathered.append(gather(blocks, names, contract.max_length, file))
    finally:
        if not was_connected:
            ray.shutdown()
    train, heldout, summary = decide(gathered, config.data, config.loss.attributes, contract)
    take(gathered[0].comparisons, train, directory / "train")
    take(gathered[-1].comparisons, heldout, directory / "heldout")
    shutil.rmtree(staged)
    text = json.dumps(asdict(summary), indent=2) + "\n"
    (directory / _SUMMARY_FILE).write_text(text, encoding="utf-8")


def _tasks(
    sources: Mapping[str, Source], max_rows: int | None, split_bytes: int
) -> list[RenderTask]:
    jobs = []
    for number, (name, columns) in enumerate(sources.items()):
        whole = splits(name, split_bytes)
        # The first rows of a source can only be told by reading it from its beginning.
        for some in [[split] for split in whole] if max_rows is None else [whole]:
            jobs.append(RenderTask(number, some, columns, max_rows))
    return jobs


def _rendered(jobs: Sequence[RenderTask], rendering: RenderSettings) -> Generator[RenderedPart]:
    """The parts of all jobs in their order, computed on the cluster as they are asked for."""
    if not jobs:
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data: Any = ray.data.range(len(jobs), override_num_blocks=len(jobs))
    data.context.execution_options.preserve_order = True
    data.context.enable_progress_bars = False
    data = data.map_batches(
        _run_job,
        batch_size=1,
        batch_format="pyarrow",
        fn_kwargs={"jobs": jobs, "rendering": rendering},
    )
    num_attributes = len(rendering.rules.attributes)
    for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in table.to_batches(max_chunksize=1):
            yield from_row(row, rendering.names, num_attributes)


def _run_job(
    row: pa.Table, jobs: Sequence[RenderTask], rendering: RenderSettings
) -> Iterator[pa.Table]:
    yield from map(to_row, _parts(jobs[row["id"][0].as_py()], rendering))


def _parts(job: RenderTask, rendering: RenderSettings) -> Iterator[RenderedPart]:
    renderer = _renderer(rendering.model, rendering.contract)
    lines = (raw for split in job.splits for raw in read_split(split))
    left = job.max_rows
    while left is None or left > 0:
        try:
            some = list(islice(lines, BLOCK_ROWS if left is None else min(left, BLOCK_ROWS)))
        except ValueError as error:
            yield RenderedPart(job.source, 0, _block([], job, renderer, rendering), str(error))
            return
        if not some:
            return
        block = _block(some, job, renderer, rendering)
        left = None if left is None else left - block.tally.num_rows
        yield RenderedPart(job.source, len(some), block)


def _block(
    lines: list[Any], job: RenderTask, renderer: Renderer, rendering: RenderSettings
) -> Block:
    rows: list[Row] = []
    bad: list[tuple[int, str]] = []
    for number, raw in enumerate(lines, start=1):
        try:
            if not is_blank(raw):
                rows.append(parse_line(number, raw, job.columns))
        except ValueError as error:
            bad.append((number, str(error)))
    block = render_block(rows, renderer, rendering.rules, job.source, rendering.names)
    tally = block.tally + Tally(num_rows=len(bad))
    return replace(block, tally=tally, bad=sorted([*bad, *block.bad]))


@lru_cache(maxsize=1)
def _renderer(model: str, contract: str) -> Renderer:
    """Of this process, which runs one task after another."""
    from reward_actor.model.tokenizer import load_tokenizer
    from reward_actor.render import Renderer

    return Renderer(load_tokenizer(Path(model)), ScoringContract.from_json(json.loads(contract)))


def _numbered(parts: Iterator[RenderedPart], num_sources: int) -> Iterator[tuple[int, Block]]:
    """Each part's block with its source, its rows numbered as in the whole source."""
    lines = [0] * num_sources
    for part in parts:
        if part.failure:
            raise ValueError(part.failure)
        before, block = lines[part.source], part.block
        lines[part.source] += part.num_lines
        rows = block.comparisons.rows + before
        bad = [(number + before, why) for number, why in block.bad]
        comparisons = replace(block.comparisons, rows=rows)
        yield part.source, replace(block, comparisons=comparisons, bad=bad)
