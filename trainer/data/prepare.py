"""From the config's data to what a training uses: read, checked, rendered, split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reward_actor.atomic import replace_text
from trainer.config.data import DataConfig
from trainer.config.train import TrainConfig
from trainer.data.gather import take
from trainer.data.load import (
    check_columns,
    choose_format,
    explain_format,
    gather_rows,
    iterate_rows,
    read_rows,
)
from trainer.data.rows import Row, Side
from trainer.data.split import Prepared, decide, rules_of

if TYPE_CHECKING:
    from reward_actor.contract import ScoringContract
    from reward_actor.render import Renderer

DEFAULT_MAX_LENGTH = 2048

# The day that a chat template writes, if it writes one.
_DATE_FILE = "template_date.txt"


def _make_base(directory: Path, rows: Iterable[Row], seed: int) -> None:
    """A small network from scratch, its tokenizer trained on the texts of `rows`."""
    from trainer.init_model import init_model, texts_of

    sides = (side for row in rows for side in _texts(row))
    texts = (text for side in sides for text in texts_of([side.prompt, side.completion]))
    # One layer: from some thousand pairs two of them learn the texts by heart.
    init_model(directory, texts, vocab_size=8192, num_layers=1, intermediate_size=128, seed=seed)


def _texts(row: Row) -> Sequence[Side]:
    if row.ids:
        raise ValueError("model.path: rows of token ids need the model whose tokenizer made them")
    return row.sides


def prepare(config: TrainConfig) -> tuple[Prepared, ScoringContract]:
    """Read, check, render and split the data, and say how it is scored. Raises ValueError."""
    data = config.data
    sources = data.sources("train")
    loaded: list[dict[str, list[Row]]] = []  # now, so that an unreadable file is told at once
    if not data.streaming:
        loaded = [{name: read_rows(name, sources[name], data.max_pairs) for name in sources}]
        if data.eval is not None:
            loaded += [{name: read_rows(name, of) for name, of in data.sources("eval").items()}]

    def rows() -> Iterator[Row]:
        for name, source in sources.items():
            yield from loaded[0][name] if loaded else iterate_rows(name, source, data.max_pairs)

    _check_columns(data)
    base = Path(config.model.directory)
    if config.is_from_scratch and not (base / "config.json").exists():
        _make_base(base, rows(), config.training.seed)
    renderer = _renderer(config, rows())
    contract = renderer.contract
    row_format = explain_format(
        config.model.format, contract.format, renderer.tokenizer.chat_template is not None
    )
    if data.streaming:
        from trainer.data.stream import prepare_stream

        return replace(prepare_stream(config, contract), row_format=row_format), contract
    attributes = config.loss.attributes
    rules = rules_of(data, attributes)
    everything = [gather_rows(some, renderer, rules) for some in loaded]
    train, heldout, summary = decide(everything, data, attributes, contract)
    kept = take(everything[0].comparisons, train), take(everything[-1].comparisons, heldout)
    prepared = Prepared.of(*kept, summary, data, config.training.seed)
    return replace(prepared, row_format=row_format), contract


def _check_columns(data: DataConfig) -> None:
    """A column of all data sets must be in one of them, one of a data set in that."""
    sources = [(*source, data.max_pairs) for source in data.sources("train").items()]
    sources += [(*source, None) for source in data.sources("eval").items()]
    for setting, column in data.named.items():
        users = [name for name, source, _ in sources if getattr(source, setting) == column]
        check_columns(users, {setting: column})
    for name, source, rows in sources:
        own = {key: of for key, of in source.named.items() if data.named.get(key) != of}
        check_columns([name], own, rows)


def _renderer(config: TrainConfig, rows: Iterable[Row]) -> Renderer:
    """How the rows are rendered, and by the contract how the export will be scored."""
    from reward_actor.model.inferred import contract_for
    from reward_actor.model.tokenizer import load_tokenizer
    from reward_actor.render import Renderer
    from trainer.network.base_config import base_config

    network = base_config(config.model.directory)
    tokenizer = load_tokenizer(Path(config.model.directory))
    limit = contract_for(tokenizer, network, format="text").max_length
    contract = contract_for(
        tokenizer,
        network,
        format=choose_format(config.model.format, rows, tokenizer.chat_template is not None),
        max_length=config.model.max_length or min(limit, DEFAULT_MAX_LENGTH),
        plain_content=config.model.plain_content,
        template_args=config.model.template_args,
        dtype=config.model.dtype,
    )
    if contract.template_date is not None:
        # A run that goes on tomorrow must see the same tokens.
        file = Path(config.output_dir) / _DATE_FILE
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, contract.template_date)
        contract = replace(contract, template_date=file.read_text(encoding="utf-8"))
    return Renderer(tokenizer, contract)
