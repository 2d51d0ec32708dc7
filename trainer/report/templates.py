"""The templates of the report and of the card, `report.html` and `card.md`."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup


def _visible(value: object) -> object:
    """Text that can be written as UTF-8: lone surrogates and control characters become visible."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", value.replace("\r\n", "\n"))
    # U+2400 and on are the pictures of the control characters.
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return re.sub(r"[\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def _cell(text: str) -> str:
    """Text inside a Markdown table: no markup, no end of the cell or of the line."""
    return re.sub(r"([\\`*_{}\[\]<>|#!])", r"\\\1", " ".join(text.split()))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    finalize=_visible,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {
    "cell": _cell,
    "percent": lambda share: f"{100 * share:.1f} %",
    "thousands": lambda number: f"{number:,}",
}
