# SPDX-License-Identifier: MIT
"""Sends log records to systemd's journal, with fields that can be searched for.

The native protocol: one datagram per record to journald's socket, or a sealed memfd for a record that no datagram
holds (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/). Never blocks: what journald has no room for is dropped, counted
and told of later. Which records there are, and where else they may go, is left to `logcontrol`.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import socket
from typing import Final

SOCKET: Final = "/run/systemd/journal/socket"

FIELDS: Final[dict[str, str]] = {
    "message_id": "MESSAGE_ID",
    "allocator": "UDMABUFD_ALLOCATOR",
    "application": "UDMABUFD_APPLICATION",
    "buffer": "UDMABUFD_BUFFER",
    "client": "UDMABUFD_CLIENT",
    "count": "UDMABUFD_COUNT",
    "device": "UDMABUFD_DEVICE",
    "error": "UDMABUFD_ERROR",
    "former": "UDMABUFD_FORMER",
    "holders": "UDMABUFD_HOLDERS",
    "limit": "UDMABUFD_LIMIT",
    "maximum": "UDMABUFD_MAXIMUM",
    "member": "UDMABUFD_MEMBER",
    "present": "UDMABUFD_PRESENT",
    "reason": "UDMABUFD_REASON",
    "seconds": "UDMABUFD_SECONDS",
    "size": "UDMABUFD_SIZE",
    "suppressed": "UDMABUFD_SUPPRESSED",
    "uid": "UDMABUFD_UID",
}
"""Key of a log call's `extra=` -> field of the journal. A key that is absent or None makes no field."""

SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

_CONTROL: Final = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code != 0x09}
_CONTROL[0x0A] = "\\n"


def priority(level: int) -> int:
    """Return syslog's priority (0 emergency .. 7 debug) for a level of `logging`."""
    for threshold, number in ((70, 0), (60, 1), (50, 2), (40, 3), (30, 4), (25, 5), (20, 6)):
        if level >= threshold:
            return number
    return 7


def text_of(record: logging.LogRecord) -> str:
    """Return the record's message on one line, and its traceback on indented lines of its own.

    Control characters of the message are escaped: it may carry what a client sent, and must not look like two records.
    """
    text = record.getMessage().translate(_CONTROL)
    details = []
    if record.exc_info and record.exc_info[0] is not None:
        details.append(logging.Formatter().formatException(record.exc_info))
    if record.stack_info:
        details.append(record.stack_info)
    lines = "\n".join(details).splitlines()
    return "\n".join([text, *(f"    {line.translate(_CONTROL)}" for line in lines)])


def encode(fields: dict[str, str]) -> bytes:
    """Return the fields in the journal's native form. A value with a line end is framed by its length."""
    parts = []
    for name, value in fields.items():
        data = value.encode("utf-8", "backslashreplace")
        if b"\n" in data:
            parts.append(name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n")
        else:
            parts.append(name.encode() + b"=" + data + b"\n")
    return b"".join(parts)


class JournalHandler(logging.Handler):
    """A handler of `logging` that writes to the journal."""

    def __init__(self, identifier: str, path: str = SOCKET) -> None:
        """Connect to journald. Raises OSError when it cannot be reached."""
        super().__init__()
        self._identifier = identifier
        self._path = path
        self._dropped = 0
        self._socket = self._connect()

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        try:
            if self._dropped and self._send(self._loss()):
                self._dropped = 0
            if not self._send(encode(self._fields(record))):
                self._dropped += 1
        except Exception:
            # logging's own last resort: to stderr, and never into the caller.
            self.handleError(record)

    def close(self) -> None:
        """Close the socket. Harmless when repeated."""
        self._socket.close()
        super().close()

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            connection.connect(self._path)
        except OSError:
            connection.close()
            raise
        return connection

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        fields = {
            "MESSAGE": text_of(record),
            "PRIORITY": str(priority(record.levelno)),
            "SYSLOG_IDENTIFIER": self._identifier,
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
        }
        for key, name in FIELDS.items():
            value = getattr(record, key, None)
            if value is not None:
                fields[name] = str(value)
        return fields

    def _loss(self) -> bytes:
        return encode(
            {
                "MESSAGE": f"{self._dropped} messages were lost: the journal did not take them in time",
                "PRIORITY": str(priority(logging.WARNING)),
                "SYSLOG_IDENTIFIER": self._identifier,
            }
        )

    def _send(self, datagram: bytes) -> bool:
        """Return whether journald has it; False when its queue is full. Raises OSError when it is not there."""
        for attempt in (1, 2):
            try:
                self._socket.send(datagram, socket.MSG_NOSIGNAL)
                return True
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in (errno.EMSGSIZE, errno.ENOBUFS):
                    return self._send_memfd(datagram)
                if attempt == 2 or error.errno not in (errno.ECONNREFUSED, errno.ENOTCONN, errno.ECONNRESET):
                    raise
                # journald's socket was made anew.
                self._socket.close()
                self._socket = self._connect()
        return False

    def _send_memfd(self, datagram: bytes) -> bool:
        # Without MFD_NOEXEC_SEAL: journald before systemd 254 takes exactly these seals, F_SEAL_EXEC is one too many.
        memfd = os.memfd_create("udmabufd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(memfd, "wb", closefd=False) as file:
                file.write(datagram)
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [memfd]))
            self._socket.sendmsg([], [rights], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        finally:
            os.close(memfd)
        return True
