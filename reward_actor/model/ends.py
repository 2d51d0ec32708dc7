"""Where the sequences of a model without a contract end: as in the system that trained it.

transformers, TRL  the whole suffix that the chat template writes after the last message; TRL ends a
                   text without a template with EOS ("Adding EOS", reward_trainer.py). Read is the
                   last token that is no pad: one before the end where the end is the pad.
OpenRLHF           newlines at the end are stripped, and what does not end with EOS gets a space and
                   EOS (datasets/reward_dataset.py); its service ends whatever it gets with EOS.
a reward token     the suffix and a token of its own (`reward_token_id`; InternLM2-Reward's
                   modeling_internlm2.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from reward_actor.contract import ScoringContract
from reward_actor.model.directory import architecture_of
from reward_actor.model.layouts import MAX_PICKLE_BYTES, OPENRLHF_CLASSES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from reward_actor.model.layouts import Layout

# Ends of completions: an end of the sequence that melts into one of these has no ids of its own.
_COMPLETIONS = ("x", "x.", "1", "x\n")

NOTHING = "none"
"""As `ends_with`: a sequence ends with its completion."""


System = Literal["OpenRLHF", "a reward token", "TRL", "probably TRL"]


def system_of(layout: Layout) -> System | None:
    """Whose training decided where a sequence ends, or None where nothing in the directory says so.
    Files are searched for a word at most, never unpickled."""
    if layout.head.rows:
        return None
    named = architecture_of(layout.config) in OPENRLHF_CLASSES
    # It writes both of these; a prefix alone may have been added by hand, to name the head.
    if named or {"value_head_prefix", "normalize_reward"} <= layout.config.keys():
        return "OpenRLHF"
    if type(layout.config.get("reward_token_id")) is int:
        return "a reward token"
    return _trl(layout.directory)


def _trl(directory: Path) -> Literal["TRL", "probably TRL"] | None:
    """Whether TRL's RewardTrainer saved a directory: by the tags of its model card, or by the class
    of the arguments that a trainer leaves; probably, if those do not say whose they are."""
    card = directory / "README.md"
    if card.is_file() and "reward-trainer" in _tags(card.read_text("utf-8", errors="replace")):
        return "TRL"
    arguments = directory / "training_args.bin"
    if not arguments.is_file() or arguments.stat().st_size > MAX_PICKLE_BYTES:
        return None
    pickled = arguments.read_bytes()
    if b"RewardConfig" in pickled:
        return "TRL"
    return None if b"TrainingArguments" in pickled else "probably TRL"


def _tags(card: str) -> list[Any]:
    """The tags in the YAML that begins a model card."""
    parts = card.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return []
    try:
        metadata = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError):  # a date that does not exist, for one
        return []
    tags = metadata.get("tags") if isinstance(metadata, dict) else None
    return tags if isinstance(tags, list) else []


@dataclass(frozen=True)
class Inferred:
    """A contract that nobody wrote down.

    reasons  why a sequence ends as it does, by the contract's field.
    doubt    what nothing in the directory settles and how to say it, or None.
    """

    contract: ScoringContract
    reasons: dict[str, str]
    doubt: str | None

    def lines(self) -> list[str]:
        """One for each field: its value and why."""
        return [
            f"{name} = {json.dumps(getattr(self.contract, name), ensure_ascii=False)}: {reason}"
            for name, reason in self.reasons.items()
        ]


def with_ends(
    contract: ScoringContract,
    layout: Layout,
    system: System | None,
    tokenizer: PreTrainedTokenizerFast,
    suffix: str,
    ends_with: str | None = None,
    append_eos: bool | None = None,
) -> Inferred:
    """`contract`, which holds no end but its turn_end, with the one of the system that trained it.

    suffix: what the chat template writes after a completion, "" without one. ends_with, append_eos:
    what the caller knows better; see `infer_contract`.
    """
    reasons = {}
    said = ends_with is not None or append_eos is not None
    eos = tokenizer.eos_token
    is_chat = contract.format == "chat"
    turn_end, end, final = contract.turn_end or suffix, suffix, None
    why = "what the chat template writes after the last message" if is_chat else ""
    appends = bool(append_eos)
    if ends_with is not None:
        end, why = "" if ends_with == NOTHING else ends_with, "as you said"
        turn_end = (turn_end_of(tokenizer, end) or end) if is_chat else ""
    elif system == "OpenRLHF" and append_eos is not False and eos:
        stripped = suffix.rstrip("\n")
        end = stripped if stripped.endswith(eos) else f"{stripped} {eos}"
        turn_end = contract.turn_end
        final, why = tokenizer.eos_token_id, "OpenRLHF ends a sequence with EOS, after a space"
    elif system in ("TRL", "probably TRL") and not is_chat and append_eos is None:
        appends = tokenizer.eos_token_id is not None
        reasons["append_eos"] = f"{system} trained it, which ends a text with EOS"
    if append_eos is not None:
        reasons["append_eos"] = "as you said"
    if system == "a reward token":
        final = layout.config["reward_token_id"]
        reasons["final_token_id"] = "reward_token_id in config.json: what its own code reads"
    elif final is not None:
        reasons["final_token_id"] = why
    rest = end.removeprefix(turn_end)
    end_ids = _ids(tokenizer, end)
    if appends and tokenizer.eos_token_id is not None and end_ids[-1:] != [tokenizer.eos_token_id]:
        end_ids = [*end_ids, tokenizer.eos_token_id]
    if is_chat or why:
        reasons["end_text"] = why
    # The old way of a turn_end and nothing behind it says the same, but where a text ends bare.
    says_more = rest or (ends_with is not None) or (is_chat and not turn_end)
    contract = replace(
        contract,
        turn_end=turn_end,
        end_text=rest if says_more else None,
        end_ids=end_ids,
        append_eos=appends,
        final_token_id=final,
    )
    pad = layout.config.get("pad_token_id")
    if layout.kind == "peft" and tokenizer.pad_token_id is not None:
        # An adapter comes without the configuration that it was trained with.
        pad = tokenizer.pad_token_id
    last = [final] if final is not None else end_ids[-1:]
    # A value head's system, and a language model, read by the mask or at the very end.
    by_pad = layout.kind in ("hf", "peft") and bool(layout.head.layers)
    if by_pad and not layout.head.is_value_head and pad is not None and last == [pad]:
        contract = replace(contract, drop_trailing_ids=[pad])
        reasons["drop_trailing_ids"] = (
            f"{tokenizer.convert_ids_to_tokens(pad)} ends a sequence and is its pad token, which "
            "transformers passes over when it looks for the token to read"
        )
    is_settled = system not in (None, "probably TRL") or said
    return Inferred(contract, reasons, None if is_settled else _doubt(layout, contract))


def _doubt(layout: Layout, contract: ScoringContract) -> str:
    convert = f"rayward convert {layout.directory} DST"
    if contract.format == "text":
        opposite = "--no-append-eos" if contract.append_eos else "--append-eos"
        ends = "is ended with EOS" if contract.append_eos else "is scored as it comes, without EOS"
        return f"a text {ends}; if its training did otherwise, say so: {convert} {opposite}"
    end = contract.turn_end + (contract.end_text or "")
    return (
        f"a sequence ends with {end!r}, as its chat template ends it; if its training ended it "
        f"otherwise, say how: {convert} --ends-with TEXT"
    )


def turn_end_of(tokenizer: PreTrainedTokenizerFast, suffix: str) -> str:
    """What a template writes after a completion, up to and with its first added token."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    ends = [suffix.find(token) + len(token) for token in added if token in suffix]
    return suffix[: min(ends)] if ends else suffix.rstrip()


def _ids(tokenizer: PreTrainedTokenizerFast, end: str) -> list[int]:
    """The ids of an end, whatever it ends; none where they depend on that."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    found = []
    for text in _COMPLETIONS:
        before, whole = encode(text), encode(text + end)
        found.append(whole[len(before) :] if whole[: len(before)] == before else [])
    return found[0] if all(ids == found[0] for ids in found) else []
