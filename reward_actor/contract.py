"""The scoring contract: what must be equal for a reward to be equal.

It is saved as `scoring_contract.json` inside every checkpoint and read by everything that scores.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from reward_actor.json_files import json_object

CONTRACT_FILE = "scoring_contract.json"

# Absolute for |reward| <= 1, relative above it: float32 carries seven digits, whatever the scale.
FLOAT32_TOLERANCE = 1e-5

DTYPES = ("float32", "bfloat16", "float16")

# The minimum, the percentiles 1 to 99 and the maximum.
NUM_QUANTILES = 101

# Fields that came later, left out of the JSON where they say nothing.
_LATER = (
    "held_out", "head_means", "head_weights", "end_text", "end_ids", "final_token_id",
    "drop_trailing_ids", "parse_arguments", "plain_content", "template_args",
)  # fmt: skip

# What `apply_chat_template` takes for itself: an argument must not change how it renders.
_RESERVED_ARGS = frozenset((
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "tokenizer_kwargs", "return_assistant_tokens_mask",
    "return_dict", "return_tensors", "padding", "truncation", "max_length", "strftime_now",
))  # fmt: skip

Combine = Literal["mean", "min", "mean_minus_std"]
"""How several rewards of one sample become one; `reward_actor.readout` has the formulas."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class ContractError(ValueError):
    """The checkpoint does not score as its contract says."""


@dataclass(frozen=True)
class GoldenSample:
    """A fixed text with the token ids that it must render to."""

    prompt: str
    completion: str
    input_ids: list[int]


@dataclass(frozen=True)
class Golden:
    """Fixed samples and, for every dtype that is allowed, their raw scores and the tolerance.

    `tolerance[dtype]` bounds |score - expected| / max(1, |expected|).
    """

    samples: list[GoldenSample] = field(default_factory=list)
    raw_scores: dict[str, list[float]] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """How the raw scores of held-out sequences are distributed: what live ones are compared with.

    quantiles           101 raw scores: the minimum, the percentiles 1 to 99, the maximum.
    length_correlation  Pearson's, of raw score and number of tokens; None: one of them is constant.
    num_scores          of how many sequences.
    """

    quantiles: list[float]
    length_correlation: float | None
    num_scores: int

    def __post_init__(self) -> None:
        quantiles, correlation = self.quantiles, self.length_correlation
        if len(quantiles) != NUM_QUANTILES or sorted(quantiles) != quantiles:
            raise ContractError(
                f"held_out.quantiles are {len(quantiles)} numbers; they must be {NUM_QUANTILES} "
                "in ascending order"
            )
        if not all(map(math.isfinite, quantiles)):
            raise ContractError("held_out.quantiles must be finite")
        if correlation is not None and not abs(correlation) <= 1:
            raise ContractError(
                f"held_out.length_correlation is {correlation}; it must be from -1 to 1"
            )
        if self.num_scores < 1:
            raise ContractError(f"held_out.num_scores is {self.num_scores}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How text becomes token ids, alongside tokenizer, chat template and date.

    turn_end            what ends a completion under "chat"; what the template writes behind it is
                        not scored, unless end_text says so.
    end_text            what text ends with after turn_end, in place of what the template writes
                        there; under "text" in place of newlines, unless EOS is there already.
                        None: nothing, and white space at the end of a template without a turn_end
                        goes, too.
    end_ids             what the ids of a prompt and a completion end with; what is missing of it
                        is appended. Whole sequences keep the end that they have.
    final_token_id      what every sequence ends with, whole ones, too: a token that a network is
                        read at (InternLM2's reward token), or OpenRLHF's EOS.
    drop_trailing_ids   what is taken off the end of every sequence: a pad that ends a turn, too,
                        which `transformers` never pools at.
    add_special_tokens  whether the tokenizer adds its own (a BOS, say) when it encodes text.
    append_eos          whether a completion given as text is ended by EOS under "text".
    plain_content       under "chat": a special token that a message spells is text. False, as
                        before this field existed: it is that token.
    parse_arguments     under "chat": the arguments of a call that are JSON text, OpenAI's form, are
                        the object that they say when they reach the template. False, as before this
                        field existed: text.
    template_args       arguments of the chat template where a sample does not give its own.
    """

    turn_end: str
    end_text: str | None = None
    end_ids: list[int] = field(default_factory=list)
    final_token_id: int | None = None
    drop_trailing_ids: list[int] = field(default_factory=list)
    plain_content: bool = False
    parse_arguments: bool = False
    template_args: dict[str, Any] = field(default_factory=dict)
    add_special_tokens: bool
    append_eos: bool


@dataclass(frozen=True, kw_only=True)
class ScoringContract(Rendering):
    """How text becomes token ids, which of them is pooled, and what the head's output means.

    format              "chat" (the chat template frames prompt and completion) or "text".
    chat_template       the template's source, None under "text".
    template_date       what a template that writes the date writes, YYYY-MM-DD; None: it does not.
    pooling             the last real token, by length, never by token id.
    over_long           a sample over max_length tokens is an error for that sample.
    dtype               of the body when nothing else is asked for; the head is always float32.
    heads               names of the head's outputs; several are an ensemble in one network.
    combine, combine_k  how the rewards of several heads become one, and k of mean_minus_std.
    head_weights        of the heads' rewards, whose weighted sum is the reward, in place of that.
    mean, std           reward = (raw score - mean) / std, for every head.
    head_means          the mean of each head, where they differ, in place of that one.
    held_out            how the raw scores of held-out data are distributed, where it was measured.
    """

    format: Literal["chat", "text"]
    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    max_length: int
    vocab_size: int
    template_date: str | None = None
    dtype: str = "float32"
    head_dtype: Literal["float32"] = "float32"
    pooling: Literal["last_token"] = "last_token"
    over_long: Literal["error"] = "error"
    heads: list[str] = field(default_factory=lambda: ["reward"])
    combine: Combine = "mean"
    combine_k: float = 1.0
    head_weights: list[float] = field(default_factory=list)
    head_means: list[float] = field(default_factory=list)
    mean: float = 0.0
    std: float = 1.0
    golden: Golden = field(default_factory=Golden)
    held_out: HeldOut | None = None
    contract_version: int = 1

    def __post_init__(self) -> None:
        if self.format not in ("chat", "text"):
            raise ContractError(f"format is {self.format!r}; it must be 'chat' or 'text'")
        if self.format == "chat" and not self.chat_template:
            raise ContractError("format is 'chat' but the contract holds no chat_template")
        check_template_args(self.template_args)
        if self.format == "text" and self.template_args:
            raise ContractError(
                "template_args are for a chat template, but format is 'text'; remove them or use "
                "format 'chat'"
            )
        if self.dtype not in DTYPES:
            raise ContractError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.max_length < 1:
            raise ContractError(f"max_length is {self.max_length}; it must be at least 1")
        if not self.std > 0:
            raise ContractError(f"std is {self.std}; it must be above 0")
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise ContractError(f"heads is {self.heads!r}; every output needs a name of its own")
        check_rule(self.combine, self.combine_k, "combine_k")
        check_numbers("head_weights", self.head_weights, self.heads)
        check_numbers("head_means", self.head_means, self.heads)
        for name, known in (("pooling", "last_token"), ("over_long", "error")):
            if getattr(self, name) != known:
                raise ContractError(
                    f"{name} is {getattr(self, name)!r}; this version knows only {known!r}"
                )
        if self.contract_version != 1:
            raise ContractError(
                f"contract_version is {self.contract_version}; this version of Rayward reads 1. "
                "Use the version that exported the checkpoint, or export it again."
            )

    @property
    def rendering(self) -> Rendering:
        return Rendering(**{of.name: getattr(self, of.name) for of in fields(Rendering)})

    @property
    def chat_template_sha256(self) -> str | None:
        return None if self.chat_template is None else sha256_text(self.chat_template)

    def to_json(self) -> dict[str, Any]:
        found = {**asdict(self), "chat_template_sha256": self.chat_template_sha256}
        for name in _LATER:  # exports from before a field existed keep their model_version
            if found[name] is None or found[name] is False or found[name] in ([], {}):
                del found[name]
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScoringContract:
        """Raises ContractError for a missing or unknown key, or a template that was edited."""
        values = dict(data)
        template_hash = values.pop("chat_template_sha256", None)
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ContractError(f"unknown key in the scoring contract: {sorted(unknown)[0]!r}")
        golden, held_out = values.pop("golden", None) or {}, values.pop("held_out", None)
        try:
            samples = [GoldenSample(**sample) for sample in golden.get("samples", [])]
            contract = cls(
                **values,
                golden=Golden(samples, golden.get("raw_scores", {}), golden.get("tolerance", {})),
                held_out=None if held_out is None else HeldOut(**held_out),
            )
        except TypeError as error:
            raise ContractError(f"the scoring contract is not complete: {error}") from error
        if contract.chat_template_sha256 != template_hash:
            raise ContractError(
                "the contract's chat_template does not have the hash that the contract gives; "
                "it was edited by hand. Export the checkpoint again."
            )
        return contract

    def save(self, directory: Path) -> None:
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, sort_keys=True)
        (directory / CONTRACT_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> ScoringContract | None:
        """The directory's contract, or None where there is none."""
        path = directory / CONTRACT_FILE
        if not path.exists():
            return None
        return cls.from_json(json_object(path, ContractError))


def check_rule(combine: object, k: object, k_name: str = "k") -> None:
    """Raise ContractError unless `combine` is a known rule and `k` a finite number, at least 0."""
    if combine not in get_args(Combine):
        known = ", ".join(get_args(Combine))
        raise ContractError(f"combine is {combine!r}; it must be one of {known}")
    is_number = isinstance(k, (int, float)) and not isinstance(k, bool)
    if not is_number or not math.isfinite(k) or k < 0:  # type: ignore[arg-type,operator]
        raise ContractError(f"{k_name} is {k!r}; it must be a finite number of at least 0")


def check_numbers(field: str, numbers: object, heads: list[str]) -> None:
    """Raise ContractError unless there are none, or a finite number for each head."""
    are_finite = isinstance(numbers, list) and all(
        isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n)
        for n in numbers
    )
    if not are_finite or (numbers and len(numbers) != len(heads)):  # type: ignore[arg-type]
        raise ContractError(
            f"{field} is {numbers!r}; it must be empty, or a finite number for each of the heads "
            f"({', '.join(heads)})"
        )


def check_template_args(args: object) -> None:
    """Raise ContractError unless these can be a contract's `template_args`."""
    try:
        is_json = isinstance(args, dict) and json.loads(json.dumps(args, allow_nan=False)) == args
    except (TypeError, ValueError, RecursionError):
        is_json = False
    if not is_json:
        raise ContractError(
            "template_args must be a JSON object; give texts, finite numbers, true, false, null, "
            "lists and objects with text as keys"
        )
    check_arg_names(cast("dict[str, Any]", args))


def check_arg_names(args: Mapping[str, Any]) -> None:
    """Raise ContractError for a name that `apply_chat_template` takes for itself."""
    reserved = sorted(_RESERVED_ARGS.intersection(args))
    if reserved:
        raise ContractError(f"a template argument must not be named {reserved[0]!r}; remove it")


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file that decides a reward: weights, network configuration, tokenizer."""
    files = [
        *weight_files(directory),
        *(directory / name for name in ("config.json", *TOKENIZER_FILES)),
    ]
    return {path.name: sha256_file(path) for path in files if path.exists()}


def model_version(file_digests: Mapping[str, str], contract: ScoringContract, dtype: str) -> str:
    """The name of a reward function: equal versions give equal rewards.

    sha256 over the files' digests and the canonical contract with the dtype in effect.
    """
    canonical = json.dumps(
        {"files": dict(file_digests), "contract": {**contract.to_json(), "dtype": dtype}},
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
    )
    return f"sha256:{sha256_text(canonical)}"


def check_scores(contract: ScoringContract, dtype: str, scores: list[float], path: str) -> None:
    """Raise ContractError unless `scores` are the golden raw scores, within the tolerance.

    `path` names what computed them, for the message.
    """
    expected = contract.golden.raw_scores.get(dtype)
    if expected is None:
        allowed = ", ".join(contract.golden.raw_scores) or "none"
        raise ContractError(
            f"the contract records no golden rewards for dtype {dtype} (it has: {allowed}); "
            "choose one of those or export the checkpoint again"
        )
    tolerance = contract.golden.tolerance[dtype]
    for index, (want, got) in enumerate(zip(expected, scores, strict=True)):
        if not abs(got - want) <= tolerance * max(1.0, abs(want)):  # a NaN must fail, too
            raise ContractError(
                f"golden sample {index} scores {got:.7g} through {path} in {dtype}, but the "
                f"contract expects {want:.7g} (tolerance {tolerance:.2g}). The weights, the "
                "tokenizer or the software differ from the export's; do not trust this model. "
                "rayward score DIR INPUT --explain ROW shows what becomes of a row"
            )
