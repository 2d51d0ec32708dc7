"""Where a training's data lie, how their columns are called, and what is done with odd rows.

pydantic only, as in `trainer.config.train`.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Columns(Section):
    """Where a row keeps what. All but chosen and rejected may be absent."""

    prompt_column: str = Field("prompt", description="absent: each side is a whole dialogue")
    chosen_column: str = Field("chosen", description="the preferred side: text or messages")
    rejected_column: str = Field("rejected", description="the other side: text or messages")
    margin_column: str = Field("margin", description="how much better chosen is")
    tie_column: str = Field("tie", description="true where neither side is preferred")
    completions_column: str = Field("completions", description="of a ranking: a list of texts")
    scores_column: str = Field(
        "scores", description="one for each completion, higher is better; absent: best first"
    )
    completion_column: str = Field("completion", description="of a row with attributes")
    attributes_column: str = Field(
        "attributes", description="{name: number} of the completion (a list for a list)"
    )
    subset_column: str = Field("subset", description="a name; evaluations show each by itself")
    tools_column: str = Field("tools", description="tool definitions for the chat template")
    template_args_column: str = Field(
        "chat_template_kwargs", description="more arguments for the chat template"
    )

    @property
    def named(self) -> dict[str, str]:
        """The columns that are not called as by default, by setting."""
        return {
            name: getattr(self, name)
            for name, field in Columns.model_fields.items()
            if getattr(self, name) != field.default
        }


class Source(Columns):
    """One of several data sets."""

    weight: float = Field(
        1.0,
        gt=0,
        description="how often its rows are used in an epoch; 0.5: a random half, another one in "
        "each epoch",
    )


class DataConfig(Columns):
    train: dict[str, Source] = Field(
        min_length=1,
        description=".jsonl, .jsonl.gz or .parquet file, or Hugging Face NAME[:SPLIT]; several "
        "as {name: weight} or {name: {weight: 1, chosen_column: ...}}",
    )
    eval: dict[str, Source] | None = Field(
        None, description="the same, for evaluation; none: a part of train is held out"
    )
    eval_fraction: float = Field(
        0.05, ge=0, lt=1, description="fraction of the prompts held out when there is no eval"
    )
    fold: str | None = Field(
        None,
        description="hold out this part of the prompts instead of eval_fraction: 2/5 is the second "
        "of five",
    )
    split_seed: int = Field(0, description="decides which prompts are held out")
    max_pairs: int | None = Field(
        None, gt=0, description="read only so many rows of each training set"
    )
    over_long: Literal["drop", "truncate_left", "error"] = Field(
        "drop",
        description="what happens to a row with a sequence of more than model.max_length tokens",
    )
    deduplicate: bool = Field(True, description="use rows of equal tokens and labels once")
    streaming: bool = Field(
        False,
        description="read and render through Ray Data into files below output_dir, for sets that "
        "are larger than memory",
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        """{name: 2} is short for {name: {weight: 2}}, and a name alone for {name: 1}."""
        if isinstance(value, str):
            value = {value: 1.0} if value else {}
        if not isinstance(value, dict):
            return value
        return {
            name: source if isinstance(source, dict | Source) else {"weight": source}
            for name, source in value.items()
        }

    @field_validator("fold")
    @classmethod
    def _part(cls, fold: str | None) -> str | None:
        if fold is not None:
            found = re.fullmatch(r"(\d+)/(\d+)", fold)
            if not found or not 1 <= int(found[1]) <= int(found[2]) >= 2:
                raise ValueError("a fold is one of two or more, such as 2/5")
        return fold

    def sources(self, which: Literal["train", "eval"]) -> dict[str, Source]:
        """The data sets of `train` or `eval` by name; what one leaves out is what `data` says."""
        value = self.train if which == "train" else self.eval
        columns = {name: getattr(self, name) for name in Columns.model_fields}
        return {
            name: Source.model_validate({**columns, **source.model_dump(exclude_unset=True)})
            for name, source in (value or {}).items()
        }
