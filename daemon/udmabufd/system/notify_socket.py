# SPDX-License-Identifier: MIT
"""The socket that $NOTIFY_SOCKET names, as sd_notify(3) describes it: its address, and a connection to it.

What is said on it is left to notify.py (how the service is) and fdstore.py (descriptors to keep).
"""

from __future__ import annotations

import errno
import os
import socket

GONE = frozenset({errno.ECONNREFUSED, errno.ENOTCONN, errno.ECONNRESET})
"""Errors of send() after which the socket may have been made anew under the same name: connect again."""


def encoded(address: str) -> bytes:
    """Return `address`, an absolute path or `@` and an abstract name, as connect() takes it. Raises ValueError."""
    if address[:1] not in ("/", "@") or len(address) < 2 or "\0" in address:
        raise ValueError(f"NOTIFY_SOCKET is neither an absolute path nor an abstract name: {address!r}")
    name = os.fsencode(address)
    return b"\0" + name[1:] if name.startswith(b"@") else name


def connect(address: bytes) -> socket.socket:
    """Return a non-blocking, close-on-exec datagram socket connected to `address`. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection
