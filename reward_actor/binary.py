"""The compact body of `POST /v1/score` for token ids: a third of JSON's bytes.

All numbers are little-endian. A request is

    offset  type              what
    0       4 bytes           "RWQ1"
    4       uint32            flags: 1 asks for token rewards
    8       uint32            G, the number of groups
    12      uint32            n, the number of completions of all groups
    16      uint32[G]         completions of each group
            uint32[G]         tokens of each group's prompt
            uint32[n]         tokens of each completion
            int32[...]        of each group the ids of its prompt, then those of its completions

and a reply

    0       4 bytes           "RWR1"
    4       uint32            flags: 1 token rewards follow, 2 named rewards, 4 their spread
    8       uint32            n
    12      uint32            J, bytes of JSON
    16      J bytes           {"model", "model_version", "timings_ms",
                               "errors": {"<index>": {"type", "message"}}, "others": {...}}: other
                              fields of `GroupScores` that say something, each a list of n
            float32[n]        rewards, NaN where there is an error
            float32[n]        raw scores, likewise
            uint32[n]         tokens that were scored, 0 likewise
            float32[...]      with flag 1: of each sample without an error, a reward a token
            uint32, float32[n, K]   with flag 2: K, and the named rewards in the order of the
                              JSON's `names`, NaN where there is none
            float32[n]        with flag 4: their spread

An error of the whole request is the JSON of every other route. Neither torch nor ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_actor.groups import Group, GroupScores, SampleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEDIA_TYPE = "application/vnd.rayward.ids"

_REQUEST, _REPLY = b"RWQ1", b"RWR1"
_TOKEN_REWARDS, _NAMED, _SPREAD = 1, 2, 4
_FIELDS = {field.name for field in fields(GroupScores)} - {"model_version", "named_rewards"}
# What has a place of its own in a reply; every other field goes into its JSON.
_COLUMNS = {
    "rewards", "raw_scores", "num_tokens", "errors", "token_rewards", "spread",
}  # fmt: skip
_KNOWN_TO_SENDERS = {"tokens", "num_prompt_tokens"}  # of ids: they are not sent back
_UINT, _INT, _FLOAT = np.dtype("<u4"), np.dtype("<i4"), np.dtype("<f4")


def encode_request(groups: Sequence[Group], token_rewards: bool = False) -> bytes:
    """The body for groups of token ids. Raises ValueError for a group of text, or an id that is
    none (an integer of 0 to 2**31 - 1)."""
    ids: list[Sequence[int]] = []
    for group in groups:
        if group.prompt_ids is None:
            raise ValueError("a binary body holds token ids; this group has text")
        ids += [group.prompt_ids, *group.completion_ids]
    completions = [completion for group in groups for completion in group.completion_ids]
    head = [
        int(token_rewards) * _TOKEN_REWARDS,
        len(groups),
        len(completions),
        *map(len, groups),
        *(len(group.prompt_ids or ()) for group in groups),
        *map(len, completions),
    ]
    flat = np.array(list(chain.from_iterable(ids)))
    if flat.size and (flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() >= 2**31):
        raise ValueError("token ids must be integers of 0 to 2**31 - 1")
    return _REQUEST + np.array(head, _UINT).tobytes() + flat.astype(_INT).tobytes()


def decode_request(body: bytes) -> tuple[list[Group], bool]:
    """The groups, and whether token rewards are asked for. Raises ValueError."""
    reader = _Reader(body, _REQUEST)
    flags, num_groups, num_completions = (int(n) for n in reader.take(_UINT, 3))
    if flags & ~_TOKEN_REWARDS:
        raise ValueError("the body has flags that this version does not know")
    sizes = reader.take(_UINT, num_groups)
    prompts = reader.take(_UINT, num_groups)
    lengths = reader.take(_UINT, num_completions)
    if int(sizes.sum(dtype=np.uint64)) != num_completions:
        raise ValueError("the groups' completions do not add up to those of the body")
    num_ids = int(prompts.sum(dtype=np.uint64)) + int(lengths.sum(dtype=np.uint64))
    ids = reader.take(_INT, num_ids)
    reader.end()
    if num_ids and int(ids.min()) < 0:
        raise ValueError("a token id is below 0")
    rows = iter(ids.tolist())
    of_completions = iter(lengths.tolist())
    groups = []
    for size, prompt in zip(sizes.tolist(), prompts.tolist(), strict=True):
        prompt_ids = _next(rows, prompt)
        completion_ids = [_next(rows, next(of_completions)) for _ in range(size)]
        groups.append(Group(prompt_ids=prompt_ids, completion_ids=completion_ids))
    return groups, bool(flags & _TOKEN_REWARDS)


def encode_reply(model: str, scores: Sequence[GroupScores], head: Mapping[str, Any]) -> bytes:
    """head: what JSON's reply holds alongside the model's name and the scores."""
    errors = {i: e for i, e in enumerate(e for group in scores for e in group.errors) if e}
    columns = {name: _joined(scores, name) for name in _FIELDS}
    others = {
        name: values
        for name, values in columns.items()
        if name not in _COLUMNS | _KNOWN_TO_SENDERS and values is not None and any(values)
    }
    names = list((scores[0].named_rewards if scores else None) or ())
    described = {
        "model": model,
        **head,
        "errors": {str(i): vars(error) for i, error in errors.items()},
        **({"others": others} if others else {}),
        **({"names": names} if names else {}),
    }
    text = json.dumps(described).encode("ascii")
    tokens, spread = columns["token_rewards"], columns["spread"]
    flags = _TOKEN_REWARDS * (tokens is not None) + _NAMED * bool(names)
    flags += _SPREAD * (spread is not None)
    num_tokens = columns["num_tokens"] or []
    parts = [
        _REPLY,
        np.array([flags, len(num_tokens), len(text)], _UINT).tobytes(),
        text,
        _floats(columns["rewards"]),
        _floats(columns["raw_scores"]),
        np.array(num_tokens, _UINT).tobytes(),
    ]
    if tokens is not None:
        flat = chain.from_iterable(row or [] for row in tokens)
        parts.append(np.fromiter(flat, _FLOAT).tobytes())
    if names:
        of_samples = [
            row for each in scores for row in zip(*(each.named_rewards or {}).values(), strict=True)
        ]
        parts += [np.array([len(names)], _UINT).tobytes(), _floats(chain.from_iterable(of_samples))]
    if spread is not None:
        parts.append(_floats(spread))
    return b"".join(parts)


def decode_reply(body: bytes, sizes: Sequence[int]) -> tuple[dict[str, Any], list[GroupScores]]:
    """What stands at the head, and the scores of groups of these sizes. Raises ValueError."""
    reader = _Reader(body, _REPLY)
    flags, n, num_bytes = (int(x) for x in reader.take(_UINT, 3))
    if n != sum(sizes):
        raise ValueError(f"the reply has {n} rewards for {sum(sizes)} completions")
    head, errors, others = _head(reader.take(np.dtype("u1"), num_bytes).tobytes())

    def known(values: Iterable[Any]) -> list[Any]:
        return [None if i in errors else value for i, value in enumerate(values)]

    columns = {name: known(reader.take(_FLOAT, n).tolist()) for name in ("rewards", "raw_scores")}
    columns["num_tokens"] = reader.take(_UINT, n).tolist()
    columns["truncated"] = [False] * n
    columns["errors"] = [errors.get(i) for i in range(n)]
    if flags & _TOKEN_REWARDS:
        widths = [0 if i in errors else width for i, width in enumerate(columns["num_tokens"])]
        values = iter(reader.take(_FLOAT, sum(widths)).tolist())
        columns["token_rewards"] = known([_next(values, width) for width in widths])
    names = head.pop("names", [])
    named: dict[str, list[Any]] = {}
    if flags & _NAMED:
        k = int(reader.take(_UINT, 1)[0])
        if not isinstance(names, list) or len(set(map(str, names))) != k:
            raise ValueError("the reply's JSON is damaged (names)")
        matrix = reader.take(_FLOAT, n * k).reshape(n, k).T.tolist()
        named = {
            str(name): known(None if np.isnan(value) else value for value in values)
            for name, values in zip(names, matrix, strict=True)
        }
    if flags & _SPREAD:
        columns["spread"] = known(reader.take(_FLOAT, n).tolist())
    reader.end()
    for name in _FIELDS & others.keys() - _COLUMNS:
        columns[name] = others[name]
        if not isinstance(columns[name], list) or len(columns[name]) != n:
            raise ValueError(f"the reply's JSON is damaged ({name})")
    scores, first = [], 0
    for size in sizes:
        some = slice(first, first + size)
        of_group = {name: values[some] for name, values in columns.items()}
        of_names = {name: values[some] for name, values in named.items()} or None
        version = head["model_version"]
        scores.append(GroupScores(**of_group, model_version=version, named_rewards=of_names))
        first += size
    return head, scores


def _joined(scores: Sequence[GroupScores], name: str) -> list[Any] | None:
    """A field of all groups, one value for each sample; None where they do not have it."""
    values = [getattr(group, name) for group in scores]
    has_none = not values or all(value is None for value in values)
    return None if has_none else [v for value in values for v in value or []]


def _floats(values: Iterable[float | None] | None) -> bytes:
    return np.array([np.nan if v is None else v for v in values or []], _FLOAT).tobytes()


def _head(text: bytes) -> tuple[dict[str, Any], dict[int, SampleError], dict[str, Any]]:
    """The JSON of a reply; from it the errors by index, and other fields of the scores. Raises
    ValueError."""
    try:
        head: dict[str, Any] = json.loads(text)
        errors = {int(i): SampleError(**error) for i, error in head.pop("errors").items()}
        others = dict(head.pop("others", {}))
        head["model_version"]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the reply's JSON is damaged ({type(error).__name__})") from None
    return head, errors, others


class _Reader:
    """A body from its beginning to its end. Raises ValueError where it is too short or too long."""

    def __init__(self, body: bytes, magic: bytes) -> None:
        if body[:4] != magic:
            raise ValueError(f"the body does not begin with {magic.decode()!r}")
        self._body = body
        self._at = 4

    def take(self, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        end = self._at + count * dtype.itemsize
        if end > len(self._body):
            raise ValueError(
                f"the body ends after {len(self._body)} bytes; what it announces needs {end}"
            )
        values = np.frombuffer(self._body, dtype, count, self._at)
        self._at = end
        return values

    def end(self) -> None:
        if self._at != len(self._body):
            raise ValueError(f"the body goes on after its {self._at} bytes")


def _next(values: Any, count: int) -> list[Any]:
    return list(islice(values, count))
