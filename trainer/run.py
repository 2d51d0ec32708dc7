"""`train(config)`: from a config to an exported reward model, on a Ray cluster."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_actor.contract import sha256_file, sha256_text
from trainer import resume
from trainer.batches import steps_per_epoch
from trainer.config import TrainConfig
from trainer.data import Row, check_source, is_file_name, read_rows
from trainer.pairs import PairSet, Prepared, choose_format, render_rows, split_by_prompt

if TYPE_CHECKING:
    from reward_actor.contract import ScoringContract

DEFAULT_MAX_LENGTH = 2048

# Beside the checkpoints: the base model of a training that was given none.
SCRATCH_DIR = "base"
_SCRATCH_VOCAB_SIZE = 8192


@dataclass(frozen=True)
class TrainResult:
    """`metrics` are `heldout_*` numbers, empty when nothing was held out."""

    export_dir: Path
    steps: int
    num_pairs: int
    metrics: dict[str, float]
    seconds: float


def train(config: TrainConfig, say: Callable[[str], None] = print) -> TrainResult:
    """Train and export; goes on from the last checkpoint of the same run in `output_dir`.

    Raises ValueError for a config, data or a cluster that cannot work, before any training;
    TrainingError if the training itself fails. An interrupt leaves the last checkpoint usable.
    """
    began = time.perf_counter()
    config = resolve_paths(config)
    output_dir = Path(config.output_dir)
    prepared, contract = prepare(config)
    for line in prepared.report(contract.max_length):
        say(line)
    num_steps = config.training.max_steps or config.training.num_epochs * steps_per_epoch(
        len(prepared.train), config.training.global_batch_pairs
    )
    facts = {
        "num_pairs": len(prepared.train),
        "num_steps": num_steps,
        "num_dropped": prepared.dropped.count,
        "dropped": str(prepared.dropped),
    }
    data = sha256_text(prepared.train.digest() + prepared.heldout.digest())
    resume.check_identity(output_dir, resume.identity(config, _model_digest(config), data))
    with _locked(output_dir):
        result = finished(output_dir)
        if result is None:
            states = resume.tidy(output_dir / resume.RUN_NAME)
            start = states[0].step if states else 0
            if start:
                say(f"going on after step {start} of {num_steps}")
            from trainer.launch import launch  # Ray is not needed, nor imported, before this

            result = launch(config, contract, prepared, facts, start, say)
        else:
            say("this run is finished already; nothing to do")
    say(f"the reward model is in {output_dir / 'export'}")
    metrics = {key: value for key, value in result.items() if key.startswith("heldout_")}
    seconds = round(time.perf_counter() - began, 1)
    return TrainResult(output_dir / "export", num_steps, len(prepared.train), metrics, seconds)


def resolve_paths(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths, since workers run in other directories. Reads no data.

    Raises ValueError for files that are missing and an output_dir that cannot be written, or that
    is relative inside a Ray job, whose working directory is deleted with the job.
    """
    output_dir = Path(config.output_dir).expanduser()
    # ray/_private/runtime_env/working_dir.py unpacks a job's working directory there.
    if not output_dir.is_absolute() and "working_dir_files" in Path.cwd().parts:
        raise ValueError(
            f"output_dir: {output_dir} is relative, but a Ray job's working directory is deleted "
            "when the job ends; give an absolute path on storage that all nodes share"
        )
    output_dir = output_dir.absolute()
    existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"output_dir: {output_dir} cannot be written ({existing} is in the way)")
    resolved = config.model_copy(deep=True)
    resolved.output_dir = str(output_dir)
    if config.model.path is None:
        resolved.model.path = str(output_dir / SCRATCH_DIR)
    else:
        resolved.model.path = _resolve_model(config.model.path)
    check_source(config.data.train, "data.train")
    if is_file_name(config.data.train):
        resolved.data.train = str(Path(config.data.train).expanduser().absolute())
    if config.data.eval is not None:
        check_source(config.data.eval, "data.eval")
        if is_file_name(config.data.eval):
            resolved.data.eval = str(Path(config.data.eval).expanduser().absolute())
    return resolved


def _resolve_model(path: str) -> str:
    """An absolute directory that holds a model, or a Hugging Face name as it is."""
    model = Path(path).expanduser()
    if not (model.exists() or model.is_absolute() or path.startswith(".")):
        return path
    if not (model / "config.json").is_file():
        raise ValueError(f"model.path: {model.absolute()} is not a directory with a model")
    if not any(model.glob("*.safetensors")):
        raise ValueError(f"model.path: {model.absolute()} holds no .safetensors weights")
    return str(model.absolute())


def _make_base(directory: Path, rows: Sequence[Row], seed: int) -> None:
    """A small network from scratch, its tokenizer trained on the texts of `rows`."""
    from trainer.init_model import init_model, texts_of

    sides = (side for row in rows for side in (row.chosen, row.rejected))
    texts = (text for side in sides for text in texts_of([side.prompt, side.completion]))
    init_model(directory, texts, vocab_size=_SCRATCH_VOCAB_SIZE, seed=seed)


def prepare(config: TrainConfig) -> tuple[Prepared, ScoringContract]:
    """Read, check, render and split the data, and say how it is scored. Raises ValueError."""
    rows = read_rows(config.data.train, config.data, config.data.max_pairs)
    eval_rows = read_rows(config.data.eval, config.data) if config.data.eval else None
    base = Path(config.model.directory)
    if base == Path(config.output_dir) / SCRATCH_DIR and not (base / "config.json").exists():
        _make_base(base, rows, config.training.seed)
    # Only now, so that an unreadable file is told at once.
    from reward_actor.checkpoint import load_tokenizer
    from reward_actor.render import Renderer, contract_for
    from trainer.network import base_config

    network = base_config(config.model.directory)
    tokenizer = load_tokenizer(base)
    limit = contract_for(tokenizer, network, format="text").max_length
    contract = contract_for(
        tokenizer,
        network,
        format=choose_format(config.model.format, rows, tokenizer.chat_template is not None),
        max_length=config.model.max_length or min(limit, DEFAULT_MAX_LENGTH),
        dtype=config.model.dtype,
    )
    renderer = Renderer(tokenizer, contract)
    pairs, dropped = render_rows(rows, renderer, config.data.train)
    if eval_rows is None:
        train_pairs, heldout = split_by_prompt(
            pairs, config.data.eval_fraction, config.data.split_seed
        )
    else:
        assert config.data.eval is not None
        train_pairs = pairs
        heldout, _ = render_rows(eval_rows, renderer, config.data.eval)
    return (
        Prepared(PairSet.of(train_pairs), PairSet.of(heldout), len(rows), dropped),
        contract,
    )


def finished(output_dir: Path) -> dict[str, Any] | None:
    """The result of a run whose export is there and whole, else None."""
    from reward_actor.checkpoint import CheckpointError, check_manifest

    path = output_dir / "result.json"
    if not path.exists() or not (output_dir / "export" / "MANIFEST.json").exists():
        return None
    try:
        check_manifest(output_dir / "export")
    except CheckpointError:
        return None  # it is written again from the last checkpoint
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    """Held while a process trains into a directory. Raises ValueError if another one does."""
    with (output_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"output_dir: {output_dir} is in use by another training") from None
        yield


def _model_digest(config: TrainConfig) -> str:
    """Tells two base models apart without reading gigabytes: the configuration, names and sizes."""
    directory = Path(config.model.directory)
    if not directory.is_dir():
        return config.model.directory
    sizes = sorted((p.name, p.stat().st_size) for p in directory.glob("*.safetensors"))
    return sha256_text(f"{sha256_file(directory / 'config.json')} {sizes}")
