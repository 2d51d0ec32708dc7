"""A small real HTTP proxy, which passes requests and tunnels on to one port or refuses them all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Proxy:
    """port: where everything goes. status: what it answers instead."""

    port: int
    status: int | None = None
    url: str = ""
    asked: list[str] = field(default_factory=list)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        line, _, rest = head.decode("latin-1").partition("\r\n")
        self.asked.append(line)
        method, target, version = line.split()
        if self.status is not None:
            reply = (
                f"HTTP/1.1 {self.status} Secret\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
            writer.write(reply.encode())
            await writer.drain()
        else:
            theirs, ours = await asyncio.open_connection("127.0.0.1", self.port)
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                ours.write(
                    f"{method} {urlsplit(target).path} {version}\r\n{rest}".encode("latin-1")
                )
            await asyncio.gather(pipe(reader, ours), pipe(theirs, writer))
        writer.close()


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65_536):
        writer.write(chunk)
        await writer.drain()
    writer.close()


@contextmanager
def proxy(port: int = 0, status: int | None = None) -> Iterator[Proxy]:
    found = Proxy(port, status)
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(found.answer, "127.0.0.1"))
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def end() -> None:
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    try:
        yield found
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
