# SPDX-License-Identifier: MIT
"""An event loop on a thread of its own, on which blocking callers run coroutines.

Knows nothing of what runs there. A result that its caller no longer wants (Ctrl-C while it waited) is disposed of.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from udmabufd_client.errors import ServiceUnavailable

T = TypeVar("T")


class LoopThread:
    """A running loop. run() may be called from any thread but its own.

    The thread is a daemon thread: it does not keep the interpreter from ending. After fork() there is no thread in
    the child, and run() says so instead of waiting for ever.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._stopping = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], dispose: Callable[[T], None] | None = None) -> T:
        """Run `coroutine` on the loop and return its result, or raise what it raises.

        When the wait ends by an exception in this thread, the coroutine is cancelled; a result that it has by then
        goes to `dispose`. Raises ServiceUnavailable when the loop has ended, RuntimeError on the loop's own thread.
        """
        done: Future[T] = Future()

        def start() -> None:
            task = self._loop.create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(finish)

        def finish(task: asyncio.Task[T]) -> None:
            self._tasks.discard(task)
            try:
                if task.cancelled():
                    done.set_exception(ServiceUnavailable("This client was closed during the call: connect anew."))
                elif (error := task.exception()) is not None:
                    done.set_exception(error)
                else:
                    done.set_result(task.result())
            except InvalidStateError:
                if not task.cancelled() and task.exception() is None and dispose is not None:
                    dispose(task.result())

        scheduled = True
        try:
            try:
                self._submit(start)
            except (ServiceUnavailable, RuntimeError):
                scheduled = False
                coroutine.close()
                raise
            return done.result()
        except BaseException:
            # Ctrl-C can come at any point, also when the coroutine runs already and _submit() has not returned.
            if scheduled and done.cancel():
                # Nobody will look at `done`: finish() finds it cancelled and disposes.
                self._call_soon(self._cancel, coroutine)
            elif done.done() and not done.cancelled() and done.exception() is None and dispose is not None:
                self._call_soon(dispose, done.result())
            raise

    def stop(self, last: Callable[[], None]) -> None:
        """Run `last` on the loop, end what still runs, and wait for the thread unless this is it."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            self._loop.call_soon_threadsafe(self._stop, last)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _submit(self, start: Callable[[], None]) -> None:
        if os.getpid() != self._pid:
            raise ServiceUnavailable("This client was made before fork(): connect anew in the child.")
        if threading.current_thread() is self._thread:
            raise RuntimeError("a blocking call on the client's own thread would wait for itself: make it in another")
        with self._lock:
            if self._stopping:
                raise ServiceUnavailable("This client is closed: connect anew.")
            self._loop.call_soon_threadsafe(start)

    def _call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        with self._lock:
            if not self._stopping:
                self._loop.call_soon_threadsafe(callback, *args)

    def _cancel(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        tasks = [task for task in self._tasks if task.get_coro() is coroutine]
        for task in tasks:
            task.cancel()
        if not tasks:
            coroutine.close()

    def _stop(self, last: Callable[[], None]) -> None:
        try:
            last()
        finally:
            self._loop.stop()

    def _main(self) -> None:
        # A signal that this thread took would not wake the one that blocks in run(), and Ctrl-C would be late.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            # Also those that the coroutines themselves have started.
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            # What was scheduled by their ends, such as the disposal of a result.
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()
