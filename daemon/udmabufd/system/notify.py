# SPDX-License-Identifier: MIT
"""Tells the service manager how the service is: the protocol of sd_notify(3).

One datagram per message on the socket that $NOTIFY_SOCKET names; never blocks, whatever the service manager does. What
is said, and when, is left to the callers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from udmabufd.system import notify_socket

if TYPE_CHECKING:
    from collections.abc import MutableMapping

log = logging.getLogger(__name__)

MAX_WAITING: Final = 16
"""Messages kept while the service manager does not read; the oldest STATUS goes first."""


class Notifier:
    """One connection to the service manager; without one every message is dropped, and `enabled` is False."""

    def __init__(self, address: str | None) -> None:
        """Take the address as $NOTIFY_SOCKET has it: an absolute path, or `@` and an abstract name; None is nobody.

        Raises ValueError for any other address, and OSError when there is no such socket.
        """
        self._address = b""
        self._socket: socket.socket | None = None
        self._waiting: deque[bytes] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.address: str | None = address
        """As $NOTIFY_SOCKET had it, for others who talk to the service manager: None when there is nobody."""
        if address is not None:
            self._address = notify_socket.encoded(address)
            self._connect()

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] | None = None) -> Notifier:
        """Return the notifier that $NOTIFY_SOCKET asks for, and remove the variable, so that no child inherits it.

        An unusable address is logged: a service that serves is worth more than one that reports.
        """
        variables = os.environ if environ is None else environ
        address = variables.pop("NOTIFY_SOCKET", None)
        try:
            return cls(address or None)
        except (OSError, ValueError) as error:
            log.warning("The service manager is not told anything: %s", error)
            return cls(None)

    @property
    def enabled(self) -> bool:
        """Whether there is a service manager to tell."""
        return self._socket is not None

    def ready(self, status: str = "") -> None:
        """Say that the start, or a reload, is complete."""
        self._send(["READY=1", *_status(status)])

    def status(self, text: str) -> None:
        """Show one line of text in `systemctl status`."""
        self._send(_status(text))

    def stopping(self, status: str = "") -> None:
        """Say that the service has begun to stop."""
        self._send(["STOPPING=1", *_status(status)])

    def reloading(self) -> None:
        """Say that a reload has begun; `ready()` ends it. The time stamp is what Type=notify-reload needs."""
        self._send(["RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"])

    def failed(self, status: str, *, number: int = 0, bus_error: str = "") -> None:
        """Say why the service is about to fail: an errno value, or the name of a D-Bus error."""
        lines = _status(status)
        if number:
            lines.append(f"ERRNO={number}")
        if bus_error:
            lines.append(f"BUSERROR={_one_line(bus_error)}")
        self._send(lines)

    def watchdog(self) -> None:
        """Say that the service is alive. Not kept when it cannot be said now: later it may no longer be true."""
        self._send(["WATCHDOG=1"], keep=False)

    def close(self) -> None:
        """Close the socket; what still waits is lost. Harmless when repeated."""
        self._stop_writing()
        self._waiting.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> None:
        connection = notify_socket.connect(self._address)
        if self._socket is not None:
            self._stop_writing()
            self._socket.close()
        self._socket = connection

    def _send(self, lines: list[str], *, keep: bool = True) -> None:
        if self._socket is None or not lines:
            return
        datagram = "\n".join(lines).encode("utf-8", "backslashreplace")
        # Later messages must not overtake earlier ones: STATUS would go back in time.
        self._flush()
        if not self._waiting and self._write(datagram):
            return
        if not keep:
            return
        if len(self._waiting) >= MAX_WAITING:
            status = next((message for message in self._waiting if message.startswith(b"STATUS=")), None)
            if status is None:
                log.error("The service manager does not read its notification socket; a message is lost")
                return
            self._waiting.remove(status)
        self._waiting.append(datagram)
        self._start_writing()

    def _write(self, datagram: bytes) -> bool:
        """Send now; return False when the service manager has no room for it at the moment."""
        for attempt in (1, 2):
            assert self._socket is not None
            try:
                self._socket.send(datagram, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            except OSError as error:
                # The socket may have been made anew under the same name since we connected.
                if attempt == 1 and error.errno in notify_socket.GONE:
                    try:
                        self._connect()
                    except OSError as again:
                        error = again
                    else:
                        continue
                log.warning("The service manager could not be told: %s", error)
            return True
        return True

    def _start_writing(self) -> None:
        if self._loop is not None or self._socket is None:
            return
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # before the loop runs, the next message takes the waiting ones along
        self._loop.add_writer(self._socket.fileno(), self._flush)

    def _stop_writing(self) -> None:
        if self._loop is not None and self._socket is not None:
            self._loop.remove_writer(self._socket.fileno())
        self._loop = None

    def _flush(self) -> None:
        while self._waiting and self._write(self._waiting[0]):
            self._waiting.popleft()
        if not self._waiting:
            self._stop_writing()


def _status(text: str) -> list[str]:
    return [f"STATUS={_one_line(text)}"] if text else []


def _one_line(text: str) -> str:
    """Return `text` without line ends: each line of a datagram is an assignment of its own."""
    return " ".join(text.split())
