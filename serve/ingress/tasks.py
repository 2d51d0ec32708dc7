"""Work that belongs to no request.

When a caller hangs up, Ray Serve ends every call to a replica that was made in the context of its
request, and tasks inherit the context in which they are created. A message that holds the sequences
of several callers, a swap, or what watches the replicas must not end with whoever was the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, TypeVar

Result = TypeVar("Result")


def detached(work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """A task in a context of its own."""
    return asyncio.get_running_loop().create_task(work, context=Context())
