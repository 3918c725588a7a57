# SPDX-License-Identifier: MIT
"""Transport: a stream socket on an asyncio loop, from which messages come and to which they go.

It reads and writes a bounded share in each turn of the loop, waits where the kernel says wait, and ends once. Which
messages answer which, and what they mean, is left to connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Sequence
from typing import Final

from udmabufd_base.errors import BusError, ConnectionLost, ProtocolError
from udmabufd_base.fd import OwnedFd
from udmabufd_base.inbox import Inbox, Incoming
from udmabufd_base.outbox import Outbox

_TURN_MESSAGES: Final = 64
_TURN_BYTES: Final = 1 << 16
"""What is read and handled before the loop lets others run."""

# Too many fds of this user are in flight (unix(7), ETOOMANYREFS), or the kernel is short of memory. The socket stays
# writable all the while, so there is only time to wait for.
_SHORTAGES: Final = frozenset({errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM})
_SHORTAGE_PAUSE: Final = 0.05


class Transport:
    """Owns the socket and both queues. Calls `deliver` with each message, to close, and `ended` once."""

    def __init__(
        self,
        sock: socket.socket,
        inbox: Inbox,
        outbox: Outbox,
        deliver: Callable[[Incoming], None],
        ended: Callable[[BusError], None],
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._inbox = inbox
        self._outbox = outbox
        self._deliver = deliver
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._paused = False
        self._more: asyncio.Handle | None = None
        self._writing = False
        self._retry: asyncio.TimerHandle | None = None
        self.lost: BusError | None = None
        """Why it ended, or None while it stands."""
        self.drained = asyncio.Event()
        """Set while nothing waits to be sent, and after the end."""
        self.drained.set()
        self._loop.add_reader(sock, self._readable)

    def check_standing(self) -> None:
        """Raise ConnectionLost if it has ended."""
        if self.lost is not None:
            raise ConnectionLost(str(self.lost)) from self.lost

    def send(self, data: bytes, fds: Sequence[OwnedFd]) -> None:
        """Send an encoded message, or queue it while the socket is full. Raises as Outbox.put; ConnectionLost."""
        self._outbox.put(data, fds)
        if not self._writing and self._retry is None:
            self._write()
            self.check_standing()

    def pause(self) -> None:
        """Stop reading."""
        if not self._paused and self.lost is None:
            self._paused = True
            self._loop.remove_reader(self._socket)
            self._cancel_more()

    def resume(self) -> None:
        """Read on."""
        if self._paused and self.lost is None:
            self._paused = False
            self._loop.add_reader(self._socket, self._readable)
            self._schedule_more()

    def end(self, reason: BusError) -> None:
        """Close the socket and all that waits. A second time does nothing."""
        if self.lost is not None:
            return
        self.lost = reason
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._cancel_more()
        if self._retry is not None:
            self._retry.cancel()
        self._inbox.close()
        self._outbox.close()
        with contextlib.suppress(OSError):
            # A child that inherited the socket would otherwise keep the connection, and what it holds, alive.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.drained.set()
        self._ended(reason)

    def _write(self) -> None:
        self._retry = None
        wait_for_socket = False
        try:
            self._outbox.write()
            wait_for_socket = self._outbox.backlog > 0
        except BlockingIOError:
            wait_for_socket = True
        except OSError as error:
            if error.errno not in _SHORTAGES:
                self.end(ConnectionLost(f"the connection to the bus broke: {error.strerror}"))
                return
            self._retry = self._loop.call_later(_SHORTAGE_PAUSE, self._write)
        if wait_for_socket != self._writing:
            self._writing = wait_for_socket
            if wait_for_socket:
                self._loop.add_writer(self._socket, self._write)
            else:
                self._loop.remove_writer(self._socket)
        if self._outbox.backlog:
            self.drained.clear()
        else:
            self.drained.set()

    def _readable(self) -> None:
        if self._more is None:
            self._read()

    def _schedule_more(self) -> None:
        if self._more is None:
            self._more = self._loop.call_soon(self._read)

    def _cancel_more(self) -> None:
        if self._more is not None:
            self._more.cancel()
            self._more = None

    def _read(self) -> None:
        """Receive and deliver one turn's share of messages."""
        self._more = None
        budget = _TURN_BYTES
        try:
            for _ in range(_TURN_MESSAGES):
                while (incoming := self._inbox.next()) is None:
                    if budget <= 0:
                        return  # the socket is still readable, and so calls again
                    received = self._inbox.receive()
                    if not received:
                        raise ConnectionLost("the bus closed the connection")
                    budget -= received
                self._deliver(incoming)
                if self._paused or self.lost is not None:
                    return
        except BlockingIOError:
            return
        except (ConnectionLost, ProtocolError) as error:
            self.end(error)
        except OSError as error:
            self.end(ConnectionLost(f"the connection to the bus broke: {error.strerror}"))
        else:
            # Complete messages may be left in the buffer, of which the socket does not tell.
            self._schedule_more()
