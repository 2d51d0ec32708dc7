"""HTTP/1.1 replies from the bytes of a connection: as little as a load generator must read."""

from __future__ import annotations

_HEAD_END = b"\r\n\r\n"
_MAX_HEAD_BYTES = 65_536


class ReplyParser:
    """The replies of one connection, one after the other; their bodies are dropped.

    A body ends by Content-Length, by chunks, or with the connection (RFC 9112, section 6).
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._status: int | None = None  # of the reply whose body comes
        self._left: int | None = None  # bytes of it to come; None: by chunks or until the end
        self._is_chunked = False
        self.keeps_alive = True

    def feed(self, data: bytes) -> int | None:
        """The status, once the reply is whole. Raises ValueError for what is no HTTP reply."""
        self._buffer += data
        if self._status is None and not self._read_head():
            return None
        if self._is_chunked:
            return self._whole() if self._skip_chunks() else None
        if self._left is None:
            self._buffer.clear()
            return None
        used = min(self._left, len(self._buffer))
        del self._buffer[:used]
        self._left -= used
        return self._whole() if not self._left else None

    def end(self) -> int | None:
        """The connection has ended: the status, if that is how this reply ends."""
        if self._status is not None and self._left is None and not self._is_chunked:
            return self._whole()
        return None

    def _whole(self) -> int | None:
        status, self._status, self._is_chunked = self._status, None, False
        return status

    def _read_head(self) -> bool:
        end = self._buffer.find(_HEAD_END)
        if end < 0:
            if len(self._buffer) > _MAX_HEAD_BYTES:
                raise ValueError("the head of the reply does not end")
            return False
        first, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + len(_HEAD_END)]
        protocol, _, status = first.partition(" ")
        if not protocol.startswith("HTTP/1.") or not status[:3].isdigit():
            raise ValueError("what came is not an HTTP/1 reply")
        split = (line.partition(":") for line in lines)
        fields = {name.lower(): value.strip().lower() for name, _, value in split}
        self._status = int(status[:3])
        self._is_chunked = "chunked" in fields.get("transfer-encoding", "")
        length = fields.get("content-length")
        self._left = None if self._is_chunked or length is None else int(length)
        ends_with_it = self._left is None and not self._is_chunked
        self.keeps_alive = fields.get("connection") != "close" and not ends_with_it
        return True

    def _skip_chunks(self) -> bool:
        """Drop what is whole of the chunks; True after the last one."""
        while (end := self._buffer.find(b"\r\n")) >= 0:
            size = int(bytes(self._buffer[:end]).split(b";")[0], 16)
            needed = end + 2 + size + 2
            if len(self._buffer) < needed:
                return False
            del self._buffer[:needed]
            if not size:  # no server here sends trailers
                return True
        return False
