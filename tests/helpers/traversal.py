"""Names that are none: ways out of a directory, to other machines, and around a check."""

from __future__ import annotations

from itertools import product

_UP = (
    "../",
    "..\\",
    "%2e%2e%2f",
    "..%2f",
    "%2e%2e/",
    "..%5c",
    "..%c0%af",
    "%252e%252e%252f",
    "....//",
)
_TARGETS = ("first", "etc/passwd", "first/export", "../registry/first", "")
_WHOLE = [
    *("", " ", ".", "..", "...", ".hidden", "~", "~root", "-", "_", "first/", "/first"),
    *("first/.",),
    *("./first", "first/../first", "first/..", "first//", "first\\", "\\first", "sub/first"),
    *("/", "//", "/etc", "/etc/passwd", "/tmp", "/proc/self/environ", "/dev/null"),
    *("\\\\host\\share",),
    *("//host/share", "\\\\?\\C:\\", "C:\\first", "C:first", "C:/first", "file:first"),
    *("file:///etc/passwd", "http://127.0.0.1/first", "https://evil.example/model"),
    *("s3://b/first",),
    *("gs://b/first", "hf://o/first", "ftp://h/first", "hdfs://h/first", "data:,first"),
    *("git+ssh://h",),
    *("organisation/model", "first@main", "first:latest", "first?x=1", "first#x"),
    *("first;x", "first&x"),
    *("first|x", "first`x`", "$(first)", "${first}", "$HOME", "%HOME%", "first*", "fir?t"),
    *("[f]irst",),
    *("{first}", "first\n", "\nfirst", "first\r\n", "first\t", " first", "first ", "first\x00"),
    *("first\x00.json", "\x00first", "\x7ffirst", "\x1bfirst", "\u202efirst", "\u200bfirst"),
    *("\ufefffirst", "first\u2028", "\u2024\u2024/first", "\uff0e\uff0e\uff0ffirst"),
    *("\u2025/first",),
    *("\uff0ffirst", "first\u2215x", "\u2044first", "fırst", "ｆｉｒｓｔ", "first\u0301"),
    *("fi\u00adrst",),
    *("日本語", "☀️", "\U0001f600", "\ud800", "first\udfff", "a" * 129, "a" * 1000, "a" * 100_000),
    *("../" * 1000, "/" * 1000, "." * 129, "first" + "/x" * 100, "None", "null", "true"),
    *("0", "con"),
    *("nul.", "aux:", "first::$DATA", "first.", "FIRST ", "first'"),
    *('first"', "<first>", "first,first"),
]  # fmt: skip
_WRAPPED = [f"{up * n}{target}" for up, n, target in product(_UP, (1, 2, 6), _TARGETS)]

NAMES = list(dict.fromkeys(_WHOLE + _WRAPPED))
assert len(NAMES) >= 200
