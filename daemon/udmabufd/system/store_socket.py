# SPDX-License-Identifier: MIT
"""The way to the service manager's store: datagrams with descriptors, which never block.

What is said, and in which order, is left to fdstore.py.
"""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import socket
from typing import TYPE_CHECKING, Final

from udmabufd.system import notify_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

RETRY: Final = 0.05
"""Seconds until the next try when this machine is short of something."""

_SHORT: Final = frozenset({errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM, errno.EMFILE, errno.ENFILE})


class StoreSocket:
    """A connection to the socket that $NOTIFY_SOCKET names."""

    def __init__(self, address: str, resume: Callable[[], None]) -> None:
        """Connect. `resume` is called when what could not be sent may be tried again.

        Raises ValueError for an address that is neither a path nor an abstract name, and OSError when it is nobody's.
        """
        self._address = notify_socket.encoded(address)
        self._socket = notify_socket.connect(self._address)
        self._resume = resume
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """The loop that watches for room in the socket."""

    @property
    def waiting(self) -> bool:
        """Whether there is no use in trying before `resume` is called."""
        return self._loop is not None or self._timer is not None

    def send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send one datagram with at most 253 descriptors; False when it has to wait for `resume`. Raises OSError."""
        try:
            self._send(data, fds)
        except BlockingIOError:
            self._loop = asyncio.get_running_loop()
            self._loop.add_writer(self._socket.fileno(), self._again)
            return False
        except OSError as error:
            return self.retry(error)
        return True

    def retry(self, error: OSError) -> bool:
        """Return False, and call `resume` soon, when `error` is a shortage that passes; raise it otherwise."""
        if error.errno not in _SHORT:
            raise error
        log.warning("The service manager's store is tried again in %d ms: %s", RETRY * 1000, error)
        self._timer = asyncio.get_running_loop().call_later(RETRY, self._again)
        return False

    def close(self) -> None:
        """Close the socket; `resume` is not called any more."""
        self._stop_waiting()
        self._socket.close()

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([data], control, socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno not in notify_socket.GONE:
                raise
            connection = notify_socket.connect(self._address)
            self._socket.close()
            self._socket = connection
            self._socket.sendmsg([data], control, socket.MSG_NOSIGNAL)

    def _again(self) -> None:
        self._stop_waiting()
        self._resume()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._loop is not None:
            self._loop.remove_writer(self._socket.fileno())
            self._loop = None
