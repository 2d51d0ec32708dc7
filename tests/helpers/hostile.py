"""Requests that nobody means well: bodies, headers and framings, made from an OpenAPI document."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from reward_actor import binary

# It is in everything that a request can hold, and must be in no error. A key that reads as the name
# of a field may be; this does not.
CANARY = "canary:9d41"
JSON = "application/json"
_LONG = 200_000


def _nested(opening: str, closing: str) -> Any:
    """As deep as fits where the parser's own limit (200) still lets a body in."""
    return json.loads(opening * 180 + f'"{CANARY}"' + closing * 180)


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    fields: tuple[str, ...]
    example: Any


@dataclass(frozen=True)
class Hostile:
    content: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": JSON})


def routes_of(document: dict[str, Any]) -> list[Route]:
    """Every operation, with the fields that its body can have and a body that fits its schema."""
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get(JSON, {}).get("schema", {})
            fields = tuple(sorted(set(_fields(schema, document, set()))))
            example = _example(schema, document)
            filled = path.replace("{name}", "reward_model")  # a KServe model that there is
            found.append(Route(method.upper(), filled, fields, example))
    return found


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    found: dict[str, Any] = document["components"]["schemas"][reference.rpartition("/")[2]]
    return found


def _fields(schema: dict[str, Any], document: dict[str, Any], seen: set[str]) -> Iterator[str]:
    reference = schema.get("$ref", "")
    if reference and reference in seen:
        return
    seen.add(reference)
    here = _resolved(schema, document)
    for name, inner in here.get("properties", {}).items():
        yield name
        yield from _fields(inner, document, seen)
    for inner in (here.get("items"), *here.get("anyOf", ()), *here.get("oneOf", ())):
        if isinstance(inner, dict):
            yield from _fields(inner, document, seen)


def _example(schema: dict[str, Any], document: dict[str, Any], depth: int = 0) -> Any:
    here = _resolved(schema, document)
    if "examples" in here:
        return here["examples"][0]
    for choices in ("anyOf", "oneOf"):
        if choices in here:
            return _example(here[choices][0], document, depth)
    match here.get("type"):
        case "object" if depth < 6:
            properties = here.get("properties", {})
            return {
                name: _example(inner, document, depth + 1) for name, inner in properties.items()
            }
        case "array":
            return [_example(here.get("items", {}), document, depth + 1)]
        case "string":
            return CANARY
        case "integer" | "number":
            return 1
        case "boolean":
            return False
    return here.get("const", {})


WRONG: list[Any] = [
    *(None, True, 0, -1, 1.5, 10**400, -(2**63), 2**31, float("nan"), float("inf"), 1e-320),
    *("", CANARY, CANARY * 100, "\x00" + CANARY, "\ud800" + CANARY, "\U0010ffff", CANARY * 5000),
    *([], {}, [[]], [{}], [None], [CANARY], {CANARY: CANARY}, [[CANARY]], [[[[CANARY]]]]),
    *([0] * 5000, [-1], [10**30], [1.5], [[10**9]], [[1], [CANARY]], [{"role": CANARY}]),
    *(_nested("[", "]"), _nested('{"a":', "}"), [_nested('{"a":', "}")]),
    *([{"role": "user", "content": 7}], [{"role": CANARY * 9, "content": CANARY, CANARY: 1}]),
]  # fmt: skip


def field_by_field(route: Route) -> Iterator[Hostile]:
    """The example with one value after another in place of each of its values, or missing."""
    if not isinstance(route.example, dict):
        return
    for name in {*route.example, *route.fields}:
        for value in WRONG:
            yield _json(route.example | {name: value})
        yield _json({key: value for key, value in route.example.items() if key != name})
        for inside in _replaced(route.example, name):
            yield _json(inside)


def _replaced(value: Any, name: str) -> Iterator[Any]:
    """The value with each wrong value at the places, further in, that have this name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == name and value is not None:
                yield from ({**value, key: wrong} for wrong in WRONG)
            yield from ({**value, key: deeper} for deeper in _replaced(inner, name))
    elif isinstance(value, list) and value:
        yield from ([deeper, *value[1:]] for deeper in _replaced(value[0], name))


def _json(value: Any) -> Hostile:
    return Hostile(json.dumps(value).encode())


def whole_bodies(route: Route) -> Iterator[Hostile]:
    """Bodies that are wrong as a whole, whatever the route."""
    good = json.dumps(route.example).encode()
    for value in WRONG:
        yield _json(value)
    for depth in (10, 70, 150, 1_000, 100_000):
        for left, right in ((b"[", b"]"), (b'{"a":', b"}"), (b'{"groups":[', b"]}")):
            yield Hostile(left * depth + right * depth)
            yield Hostile(left * depth)
    texts = [
        b"",
        b" ",
        b"\x00",
        b"null",
        b"{",
        b"}",
        b'"',
        b"{]",
        b"[1,]",
        b"{'a': 1}",
        b"//",
        b"-",
    ]
    texts += [b"NaN", b"Infinity", b"-Infinity", b"1e999999", b"9" * 5000, b"0x10", b"01", b"tru"]
    texts += [b'{"a": 1} {"a": 2}', b'{"a":1}garbage', b'{"a" 1}', b'{"\\ud800": 1}', b'"\\ud800"']
    texts += [b'"\\u0000"', b'"\\x41"', b'"\xff\xfe"', b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80"]
    texts += [CANARY.encode(), b"<xml>" + CANARY.encode() + b"</xml>", b"a=" + CANARY.encode()]
    texts += [b'{"' + CANARY.encode() * 2000 + b'": 1}', b"\xef\xbb\xbf" + good, b"  \n\t" + good]
    texts += [good[: len(good) // 2], good[:-1], good + b"}", good.replace(b'"', b"'"), good * 2]
    texts += [good.decode().encode(each) for each in ("utf-16", "utf-16-be", "utf-32", "cp037")]
    texts += [b'{"model": "a", "model": "%s", "groups": [], "groups": 1}' % CANARY.encode()]
    texts += [b'{"model": "' + b"a" * _LONG, b'{"model": "' + CANARY.encode() * 9000 + b'"}']
    texts += [b'{"x": ' + b"[]," * 5000 + b"}", b"[" + b"1," * 50_000 + b"1]", b"\\" * 1000]
    yield from map(Hostile, texts)
    for media_type in (
        *(
            "",
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data",
            "image/png",
        ),
        *("application/json; charset=utf-16", "application/json;" * 50, binary.MEDIA_TYPE),
        *("multipart/form-data; boundary=" + "x" * 300, "application/octet-stream", CANARY),
    ):
        yield Hostile(good, {"Content-Type": media_type})
        yield Hostile(CANARY.encode(), {"Content-Type": media_type})
    for encoding in ("gzip", "deflate", "br", CANARY):
        yield Hostile(gzip.compress(good), {"Content-Type": JSON, "Content-Encoding": encoding})
    for accept in ("application/xml", "*/*;q=0", CANARY, "x" * 5000):
        yield Hostile(b"{", {"Content-Type": JSON, "Accept": accept})
    for length in ("0", "1", "7", "99999999", "-1", "1e9", "x", "9" * 400, CANARY):
        yield Hostile(good, {"Content-Type": JSON, "Inference-Header-Content-Length": length})
        yield Hostile(b"\xff" * 50, {"Inference-Header-Content-Length": length})
    yield from lying_binaries()


def lying_binaries() -> Iterator[Hostile]:
    """The compact body of token ids with counts that do not hold."""
    big = 2**32 - 1
    heads = [(), (0,), (0, 0), (0, 0, 0), (1, 0, 0), (2, 0, 0), (big, big, big), (0, 1, 0)]
    heads += [(0, big, 0), (0, 0, big), (0, 1, 1), (0, 1, 1, 1, big, big), (0, 1, 1, 1, 1, 1, 5)]
    heads += [(0, 1, 1, 1, 1, 1, big, big), (0, 2, 1, 1, 1, 0, 0, 1), (0, 1, 1, 0, 1, 1, 1, 1)]
    heads += [(0, 1, 1, 1, 1, 1, 5, 6, 7), (0, 1, 1, 1, 0, 0), (0, 1, 2, 2, 1, 1, 1, 5, 6, 2**31)]
    heads += [(0, 1, 3, 3, 1, 2**31, 2**31, 2**31), (0, 3, 3, big, 1, 3, 1, 1, 1, 1, 1, 1)]
    for numbers in heads:
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        for content in (b"RWQ1" + packed, b"RWQ1" + packed + b"\x00", b"RWQ2" + packed, packed):
            yield Hostile(content, {"Content-Type": binary.MEDIA_TYPE})


def framings(method: str, path: str) -> list[bytes]:
    """Requests whose framing is broken, as they go over the wire."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Test: {CANARY}\r\n".encode()
    chunked = head + b"Transfer-Encoding: chunked\r\n"
    canary = CANARY.encode()
    return [
        head + b"Content-Length: 5\r\n\r\n{}",
        head + b"Content-Length: 1\r\n\r\n{}" + canary,
        head + b"Content-Length: -1\r\n\r\n{}",
        head + b"Content-Length: x\r\n\r\n{}",
        head + b"Content-Length: 99999999999999999999\r\n\r\n{}",
        head + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        head + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        chunked + b"\r\nzz\r\n{}\r\n0\r\n\r\n",
        chunked + b"\r\n5\r\n{}\r\n0\r\n\r\n",
        chunked + b"\r\n2\r\n{}\r\n",
        chunked + b"\r\nffffffffffffffff\r\n{}\r\n0\r\n\r\n",
        chunked + b"\r\n-2\r\n{}\r\n0\r\n\r\n",
        head + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        head + b"Transfer-Encoding: " + canary + b"\r\n\r\n{}",
        head + b"Expect: " + canary + b"\r\nContent-Length: 2\r\n\r\n{}",
        head + b"Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\n{}",
        head + b"X-Long: " + canary * 5000 + b"\r\n\r\n",
        head + b"X\x00Y: 1\r\n\r\n",
        head + b" folded: 1\r\n\r\n",
        f"{method} {path}?{CANARY}={CANARY} HTTP/9.9\r\n\r\n".encode(),
        f"{method} {path}\r\n\r\n".encode(),
        canary + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + canary,
    ]


def _values(fields: tuple[str, ...]) -> st.SearchStrategy[Any]:
    keys = st.sampled_from(fields) if fields else st.just(CANARY)
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(WRONG),
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(keys | st.text(max_size=5), inner, max_size=4)
            | st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=10,
    )


def made_up(route: Route) -> st.SearchStrategy[Hostile]:
    """Bodies that look more or less like those of the route."""
    example = route.example if isinstance(route.example, dict) else {}
    values = _values(route.fields)
    changes = st.dictionaries(st.sampled_from(route.fields or (CANARY,)), values, max_size=3)
    ids = st.binary(max_size=120).map(
        lambda tail: Hostile(b"RWQ1" + tail, {"Content-Type": binary.MEDIA_TYPE})
    )
    return st.one_of(
        changes.map(lambda changed: _json(example | changed)),
        values.map(_json),
        st.binary(max_size=200).map(Hostile),
        ids,
    )
