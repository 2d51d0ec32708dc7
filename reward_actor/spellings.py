"""Control tokens that somebody spelled: in a chat message they are text, never the tokens.

A completion that holds "<|im_end|>" and "<|im_start|>user" would otherwise end its own turn and
praise itself in the next one. Spellings become private-use characters before the chat template
runs, so that every control token in what it writes is its own; what stands between two of those and
holds such a character is encoded by a tokenizer that splits special tokens as it does other text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_FIRST_MARK = 0xF0000  # Supplementary Private Use Area-A: Unicode gives these no meaning
_STAND_IN = "x"


class SpellingError(ValueError):
    """A spelled control token cannot be encoded as text."""


class Spellings:
    """The spellings of a tokenizer's special tokens. Safe to share between threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        added = tokenizer.added_tokens_decoder
        self._tokenizer = tokenizer
        self._ids = {index for index, token in added.items() if token.special}
        self._spelled = sorted({str(added[i]) for i in self._ids} - {""}, key=len, reverse=True)
        self._marks = {text: chr(_FIRST_MARK + i) for i, text in enumerate(self._spelled)}
        # What people write as it is, though it is one of the marks, has this before it.
        self._literally = chr(_FIRST_MARK + len(self._spelled))
        self._control = re.compile("|".join(map(re.escape, self._spelled)) or r"(?!)")
        # As the tokenizer cuts them out: some take the white space beside them along.
        by_text = {str(added[i]): added[i] for i in self._ids}
        cut = [
            r"\s*" * by_text[text].lstrip + re.escape(text) + r"\s*" * by_text[text].rstrip
            for text in self._spelled
        ]
        self._cut_out = re.compile("|".join(cut) or r"(?!)")
        self._mark = re.compile(f"[{chr(_FIRST_MARK)}-{self._literally}]")

    def hidden(self, value: Any) -> Any:
        """`value` with a mark for every spelling in its strings, at any depth."""
        if isinstance(value, str):
            if self._control.search(value) is None and self._mark.search(value) is None:
                return value
            value = self._mark.sub(lambda found: self._literally + found[0], value)
            return self._control.sub(lambda found: self._marks[found[0]], value)
        if isinstance(value, Mapping):
            return {self.hidden(key): self.hidden(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            self._check_seams(value)
            return [self.hidden(item) for item in value]
        return value

    def _check_seams(self, parts: Sequence[Any]) -> None:
        """Raise SpellingError if parts of one content make a control token where they meet."""
        texts = [str(p["text"]) for p in parts if isinstance(p, Mapping) and "text" in p]
        if len(texts) > 1:
            count = sum(len(self._control.findall(text)) for text in texts)
            if len(self._control.findall("".join(texts))) > count:
                raise SpellingError(
                    "two parts of a content make a control token where they meet; send them as one"
                )

    def is_hidden_in(self, text: str) -> bool:
        return self._mark.search(text) is not None

    def encode(self, text: str) -> list[int]:
        """The ids of a text that holds marks, as if each were the text that it stands for.

        Raises SpellingError where what stands between two control tokens has other ids by itself.
        """
        parts = self._parts(text)
        stand_ins = [self._mark.sub(_STAND_IN, part) for part in parts]
        apart = [i for part in stand_ins for i in self._normal(part)]
        ids: list[int] = []
        for part in parts:
            if self._mark.search(part) is None:
                ids += self._normal(part)
                continue
            spelled = self._plain.encode(self._restored(part), add_special_tokens=False).ids
            if not self._ids.isdisjoint(spelled):
                apart = []
                break
            ids += spelled
        if apart != self._normal("".join(stand_ins)):
            found = self._restored(next(iter(self._mark.findall(text))))
            raise SpellingError(
                f"a message holds {found!r}, a control token of this model's tokenizer, which "
                "cannot be written as text there; remove it"
            )
        return ids

    def _parts(self, text: str) -> list[str]:
        """The text in pieces: what holds marks, between two control tokens, and the rest."""
        parts = [""]
        end = 0
        for control in self._cut_out.finditer(text):
            self._add(parts, text[end : control.start()])
            parts[-1] += control[0]
            end = control.end()
        self._add(parts, text[end:])
        return [part for part in parts if part]

    def _add(self, parts: list[str], stretch: str) -> None:
        if self._mark.search(stretch) is None:
            parts[-1] += stretch
        else:
            parts += [stretch, ""]

    def _restored(self, text: str) -> str:
        def restore(found: re.Match[str]) -> str:
            if found[0].startswith(self._literally):
                return found[0][1:]
            return self._spelled[ord(found[0]) - _FIRST_MARK]

        return re.sub(f"{self._literally}.|{self._mark.pattern}", restore, text)

    def _normal(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    @cached_property
    def _plain(self) -> Tokenizer:
        from tokenizers import Tokenizer

        plain = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        plain.encode_special_tokens = True
        return plain
