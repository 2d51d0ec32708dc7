"""An event loop in a thread, for code that waits without one."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class LoopThread:
    """Runs coroutines for any number of threads. The thread is a daemon."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="reward-client", daemon=True)
        self._thread.start()
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """False in a process that was forked off: threads stay behind."""
        return self._pid == os.getpid() and not self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The coroutine's result. It is cancelled when its caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def stop(self) -> None:
        """End the thread and its loop."""
        if self.is_here:
            self._loop.call_soon_threadsafe(self._loop.stop)
            if threading.current_thread() is not self._thread:
                self._thread.join()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        finally:
            self._loop.close()
