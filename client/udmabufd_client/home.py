# SPDX-License-Identifier: MIT
"""The event loop and the process that a client belongs to, and how other threads reach that loop.

Knows nothing of what is done there.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, TypeVar

from udmabufd_client.errors import CallTimedOut, ServiceUnavailable

T = TypeVar("T")


class Home:
    """The running loop, in this process."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()

    @property
    def ours(self) -> bool:
        """Whether this is the process that it was made in, and no child of it."""
        return os.getpid() == self._pid

    @property
    def here(self) -> bool:
        """Whether the caller runs on the loop, and so must not wait for what happens there."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def countdown(self, seconds: float) -> Callable[[], float]:
        """Return what tells how many of `seconds` are left, for what takes several calls; for any thread."""
        deadline = self._loop.time() + seconds
        return lambda: max(deadline - self._loop.time(), 0.0)

    def soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Run `callback` on the loop: at once when this is the loop's thread."""
        if self.here:
            callback(*args)
        else:
            # A closed loop has no connection any more: nothing is left to be done on it.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(callback, *args)

    def wait(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """Run `work` on the loop and wait for it, in another thread than the loop's.

        Raises what `work` does, CallTimedOut after `seconds`, and ServiceUnavailable when the loop has ended.
        """
        try:
            done = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise ServiceUnavailable("This client is closed: connect anew.") from None
        try:
            return done.result(seconds)
        except CancelledError:
            raise ServiceUnavailable("This client was closed during the call: connect anew.") from None
        except TimeoutError:
            if done.done():
                raise
            done.cancel()
            raise CallTimedOut(f"The client's event loop did not answer within {seconds:g} s.") from None
        except BaseException:
            done.cancel()
            raise
