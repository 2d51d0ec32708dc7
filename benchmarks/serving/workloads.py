"""What is asked of the servers, and in the words of whose protocol.

A request is one group: token ids (`groups`, `empty`) or texts, of which `singles` sends one a
request.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.shapes import Shape
from benchmarks.common.workloads import Range, grpo
from benchmarks.serving.load import Request
from reward_actor import binary
from reward_actor.groups import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_JSON = "application/json"


@dataclass(frozen=True)
class Asked:
    """One request's group, and the tokens of all its sequences, unshared."""

    group: Group
    num_tokens: int


@dataclass(frozen=True)
class Protocol:
    """How a group becomes a request of `path`, and a reply its rewards.

    Raises ValueError (a KeyError or TypeError, too) for a reply that has no reward.
    """

    path: str
    encode: Callable[[Group], bytes]
    decode: Callable[[bytes, Group], Sequence[float | None]]
    content_type: str = _JSON

    def request(self, asked: Asked) -> Request:
        body = self.encode(asked.group)
        return Request(self.path, self.content_type, body, asked.num_tokens)


def _sequences(group: Group) -> list[list[int]]:
    assert group.prompt_ids is not None
    return [[*group.prompt_ids, *ids] for ids in group.completion_ids]


def _texts(group: Group) -> list[str]:
    assert isinstance(group.prompt, str)
    return [group.prompt + str(completion) for completion in group.completions]


def _dump(**body: Any) -> bytes:
    return json.dumps(body).encode()


def _native(group: Group) -> bytes:
    if group.prompt_ids is None:
        return _dump(groups=[{"prompt": group.prompt, "completions": group.completions}])
    ids = {"prompt_ids": group.prompt_ids, "completion_ids": group.completion_ids}
    return _dump(groups=[ids])


def _vllm(group: Group) -> bytes:
    return _dump(input=_texts(group) if group.prompt_ids is None else _sequences(group))


def _openrlhf(group: Group) -> bytes:
    texts = _texts(group)
    return _dump(query=texts, prompts=[group.prompt] * len(texts), labels=[""] * len(texts))


def _plain(group: Group) -> bytes:
    if group.prompt_ids is None:
        return _dump(texts=_texts(group))
    return _dump(input_ids=_sequences(group))


def _rewards(body: bytes, group: Group) -> list[float]:
    rewards: list[float] = json.loads(body)["rewards"]
    return rewards


def _of_native(body: bytes, group: Group) -> list[float | None]:
    [result] = json.loads(body)["results"]
    rewards: list[float | None] = result["rewards"]
    return rewards


def _of_binary(body: bytes, group: Group) -> list[float | None]:
    _, [scores] = binary.decode_reply(body, [len(group)])
    return scores.rewards


def _of_vllm(body: bytes, group: Group) -> list[float]:
    rows = sorted(json.loads(body)["data"], key=lambda row: row["index"])
    return [row["probs"][0] for row in rows]


PROTOCOLS = {
    "native": Protocol("/v1/score", _native, _of_native),
    "binary": Protocol(
        "/v1/score", lambda g: binary.encode_request([g]), _of_binary, binary.MEDIA_TYPE
    ),
    "openrlhf": Protocol("/get_reward", _openrlhf, _rewards),
    "vllm": Protocol("/classify", _vllm, _of_vllm),
    "plain": Protocol("/", _plain, _rewards),
}


def id_groups(
    shape: Shape, num_groups: int, size: int, prompt: Range, completion: Range, name: str
) -> list[Asked]:
    """Groups of random ids, as `benchmarks.common.workloads.grpo` draws them."""
    sequences = grpo(shape, num_groups, size, prompt, completion, name=name).sequences
    asked = []
    for start in range(0, len(sequences), size):
        rows = sequences[start : start + size]
        shared = _shared_prefix(rows)
        group = Group(prompt_ids=rows[0][:shared], completion_ids=[row[shared:] for row in rows])
        asked.append(Asked(group, sum(map(len, rows))))
    return asked


def _shared_prefix(rows: Sequence[list[int]]) -> int:
    """Of all rows, leaving each of them at least its last token."""
    least, most = min(rows), max(rows)
    limit = min(map(len, rows)) - 1
    return next((i for i in range(limit) if least[i] != most[i]), limit)


def text_requests(tokenizer: PreTrainedTokenizerFast, groups: Sequence[Group]) -> list[Asked]:
    """One request for each group of texts."""
    return [Asked(group, sum(map(len, tokenizer(_texts(group))["input_ids"]))) for group in groups]


def singles(tokenizer: PreTrainedTokenizerFast, groups: Sequence[Group]) -> list[Asked]:
    """One request for each completion; those of a group follow one another."""
    alone = [Group(group.prompt, [text]) for group in groups for text in group.completions]
    return text_requests(tokenizer, alone)


def write_requests(path: Path, asked: Sequence[Asked], protocol: Protocol) -> None:
    """The file that the load generator reads."""
    with path.open("w", encoding="ascii") as file:
        file.writelines(protocol.request(each).to_line() + "\n" for each in asked)
