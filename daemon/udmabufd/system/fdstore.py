# SPDX-License-Identifier: MIT
"""Descriptors that outlive this process: the service manager's store, as sd_pid_notify_with_fds(3) describes it.

Every message is a datagram on the socket that $NOTIFY_SOCKET names. Whose message is next is store_queue.py's matter;
how fast, this module's: the service manager compares each new descriptor with all that it holds, so no more than a few
dozen messages are ever on their way to it. Which descriptors are kept, and what they are after a restart, is left to
the callers.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from typing import TYPE_CHECKING, Final

from udmabufd.core.events import Event, emit
from udmabufd.system import listen_fds
from udmabufd.system.hardening import started_by_systemd
from udmabufd.system.store_names import StoreNames
from udmabufd.system.store_queue import ANYBODY, Message, StoreQueue
from udmabufd.system.store_socket import StoreSocket

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping, Sequence

    from udmabufd_base.fd import OwnedFd

log = logging.getLogger(__name__)

RATE: Final = 500.0
BURST: Final = 512
"""Puts of one uid: so many a second, and so many at once."""

STRIDE: Final = 16
"""Messages from one barrier to the next."""

MAX_BARRIERS: Final = 2
"""Barriers on their way: STRIDE messages before each, and as many after the last, are all that PID 1 has before it."""

DELAY: Final = 1.0
"""Seconds without room for the next message after which that is told of."""

MAX_FDS: Final = 253
"""SCM_MAX_FD: descriptors in a datagram."""


class FdStore:
    """The store of the service manager; without one nothing is kept, and `enabled` is False."""

    def __init__(
        self,
        address: str | None,
        *,
        rate: float = RATE,
        burst: int = BURST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connect to `address`, as $NOTIFY_SOCKET has it; None is nobody. `rate` and `burst`: puts of one uid.

        Raises ValueError for an address of another kind, and OSError when there is no such socket.
        """
        self._socket = None if address is None else StoreSocket(address, self._pump)
        self._names = StoreNames()
        # Names that may have something stored under them: to drop another takes no message.
        self._stored: set[str] = set()
        self._queue = StoreQueue(rate, burst)
        self._clock = clock
        # Counts of messages: sent so far, sent when the last barrier was, known to be handled, to be known of.
        self._sent = self._marked = self._handled = self._awaited = 0
        self._barriers: dict[int, int] = {}
        """Read end of a barrier's pipe -> the messages that were sent before it."""
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        # For puts that are not due yet.
        self._timer: asyncio.TimerHandle | None = None
        # For a service manager that takes nothing more.
        self._delay: asyncio.TimerHandle | None = None

    @classmethod
    def from_environment(cls, address: str | None, environ: Mapping[str, str] | None = None) -> FdStore:
        """Return the store at `address` (Notifier.address), as far as the environment says that there is one.

        systemd 254 and later tell the store's size in $FDSTORE; earlier ones have it only if they started this very
        process, which $SYSTEMD_EXEC_PID tells. An unusable address is logged: then nothing outlives the process.
        """
        variables = os.environ if environ is None else environ
        size = variables.get("FDSTORE")
        offered = size != "0" if size is not None else started_by_systemd(variables)
        try:
            return cls(address if offered else None)
        except (OSError, ValueError) as error:
            log.warning("Buffers will end with this process; the service manager cannot be reached: %s", error)
            return cls(None)

    @property
    def enabled(self) -> bool:
        """Whether what is put here outlives the process."""
        return self._socket is not None

    def inherited(self, environ: MutableMapping[str, str] | None = None) -> dict[str, list[OwnedFd]]:
        """Return what was stored when the process started, by name and in no order; the caller owns it.

        Descriptors of other origin (of socket units) are among it. Once: removes the variables that announce it.
        """
        found = listen_fds.take(environ)
        for name in found:
            self._names.reserve(name)
        self._stored.update(found)
        return found

    def take_name(self) -> str:
        """Return a name that nothing is stored under, the caller's until drop(). RuntimeError when there is none."""
        return self._names.take() if self.enabled else ""

    async def put(self, name: str, fds: Sequence[OwnedFd], uid: int) -> None:
        """Store `fds` (borrowed, at most 253) under `name` on behalf of `uid`; more than one put may add to a name.

        Returns once the service manager's socket has them, which keeps them even if this process ends now. Raises
        OSError when they cannot be stored. When it is cancelled they may be stored or not: drop() the name.
        """
        if self._socket is None:
            return
        if not 0 < len(fds) <= MAX_FDS:
            raise ValueError(f"{len(fds)} descriptors do not fit into one message, 1 to {MAX_FDS} do")
        self._stored.add(name)
        await self._add(name, fds, uid)

    def drop(self, name: str) -> None:
        """Forget everything stored under `name`, in order behind what was put before, and free the name.

        Never blocks. The name is free from when the message was sent, for what is put under it then comes later.
        """
        if self._socket is None:
            return
        if name not in self._stored:
            self._names.free(name)
            return
        self._stored.discard(name)
        self._add(name, None, ANYBODY)

    async def settled(self, name: str = "") -> None:
        """Wait until the service manager has handled what was put and dropped under `name` so far, or everything.

        Raises OSError when it cannot be asked.
        """
        waiting = [message.done for message in self._queue if name in ("", message.name)]
        if waiting:
            await asyncio.wait(waiting)
        if self._socket is None or self._handled >= self._sent:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append((self._sent, waiter))
        self._awaited = self._sent
        self._pump()
        await waiter

    def close(self) -> None:
        """Close the socket; what still waits is not stored, and whoever waits is told so. Harmless when repeated.

        To be called on the loop, if anything was put or dropped.
        """
        self._moving()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        closed = OSError(errno.ESHUTDOWN, "the service is stopping")
        for message in list(self._queue):
            self._give_up(message, closed)
        for reader in list(self._barriers):
            self._end_barrier(reader)
        self._fail_waiters(closed)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # ---- sending ------------------------------------------------------------------------------------------------

    def _add(self, name: str, fds: Sequence[OwnedFd] | None, uid: int) -> asyncio.Future[None]:
        message = Message(name, fds, uid, asyncio.get_running_loop().create_future())
        self._queue.add(message)
        self._pump()
        return message.done

    def _pump(self) -> None:
        """Send what may be sent now, and arrange to be called again when more may be."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # What waits for room in the socket waits for the same.
        while self._socket is not None and not self._socket.waiting:
            full = self._sent - self._marked >= STRIDE
            if (full or self._awaited > self._marked) and len(self._barriers) < MAX_BARRIERS:
                self._send_barrier(self._socket)
                continue
            if full:
                break  # until a barrier is through
            now = self._clock()
            message = self._queue.first(now)
            if message is None:
                wait = self._queue.wait(now)
                if wait is not None:
                    self._timer = asyncio.get_running_loop().call_later(wait, self._pump)
                return
            self._send_message(self._socket, message, now)
        if self._delay is None and self._socket is not None and self._queue:
            self._delay = asyncio.get_running_loop().call_later(DELAY, self._delayed)

    def _moving(self) -> None:
        if self._delay is not None:
            self._delay.cancel()
            self._delay = None

    def _delayed(self) -> None:
        # Once: until something moves, the handle stays.
        emit(log, Event.STORE_DELAYED, seconds=DELAY)

    def _send_message(self, connection: StoreSocket, message: Message, now: float) -> None:
        """Send it, or give it up for an error; one that has to wait stays where it is."""
        if message.done.cancelled():
            # Nobody waits for it any more, and its descriptors may be closed.
            self._queue.remove(message)
            return
        if message.fds is None:
            text = f"FDSTOREREMOVE=1\nFDNAME={message.name}"
        else:
            # Not to be polled: a dma-buf whose fences signal an error would be thrown out.
            text = f"FDSTORE=1\nFDNAME={message.name}\nFDPOLL=0"
        try:
            if not connection.send(text.encode("ascii"), [fd.fileno() for fd in message.fds or ()]):
                return
        except (OSError, ValueError) as error:
            self._give_up(message, error)
            return
        self._queue.sent(message, now)
        self._sent += 1
        self._moving()
        if message.fds is None and message.name not in self._stored:
            self._names.free(message.name)
        message.done.set_result(None)

    def _send_barrier(self, connection: StoreSocket) -> None:
        """Send one end of a pipe, which is closed when all that was sent before has been handled."""
        reader = writer = -1
        sent = False
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            sent = connection.send(b"BARRIER=1", [writer])
        except OSError as error:
            self._no_barrier(connection, error)
        finally:
            for end in (writer, reader)[: 1 if sent else 2]:
                if end >= 0:
                    os.close(end)
        if sent:
            self._marked = self._barriers[reader] = self._sent
            asyncio.get_running_loop().add_reader(reader, self._barrier_passed, reader)

    def _no_barrier(self, connection: StoreSocket, error: OSError) -> None:
        try:
            connection.retry(error)
        except OSError:
            log.warning("The service manager cannot be asked what it has stored: %s", error)
            # Whatever is sent next finds out whether that stays so.
            self._marked = self._handled = self._sent
            self._fail_waiters(error)

    def _barrier_passed(self, reader: int) -> None:
        self._handled = max(self._handled, self._end_barrier(reader))
        waiters, self._waiters = self._waiters, []
        for target, waiter in waiters:
            if target > self._handled:
                self._waiters.append((target, waiter))
            elif not waiter.done():
                waiter.set_result(None)
        self._pump()

    def _end_barrier(self, reader: int) -> int:
        asyncio.get_running_loop().remove_reader(reader)
        os.close(reader)
        return self._barriers.pop(reader)

    def _give_up(self, message: Message, error: OSError | ValueError) -> None:
        self._queue.remove(message)
        if message.fds is None:
            # Its name stays taken, for something is stored under it.
            log.error("What is stored as %s could not be removed: %s", message.name, error)
            message.done.set_result(None)
        elif not message.done.cancelled():
            log.warning("Descriptors could not be stored: %s", error)
            message.done.set_exception(error)

    def _fail_waiters(self, error: OSError) -> None:
        waiters, self._waiters = self._waiters, []
        for _, waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)
