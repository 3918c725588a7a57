# SPDX-License-Identifier: MIT
"""From an address to an authenticated socket: connect, SASL EXTERNAL, NEGOTIATE_UNIX_FD, BEGIN. Messages come after.

Source: D-Bus specification, "Authentication Protocol". Time-outs are the caller's: each wait can be cancelled.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Final

from udmabufd_base.address import socket_names
from udmabufd_base.errors import AuthError, ConnectionLost

_MAX_LINE: Final = 4096
_BACKLOG_PAUSE: Final = 0.01


async def connect(address: str) -> socket.socket:
    """Return a non-blocking socket connected to the first name of `address` that answers.

    Raises ConnectionLost when none does, ValueError on a malformed address.
    """
    failures = []
    for name in socket_names(address):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await _connect(sock, name)
        except OSError as error:
            sock.close()
            failures.append(f"{_readable(name)}: {error.strerror}")
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise ConnectionLost(f"cannot connect to the bus ({'; '.join(failures)}); is it running?")


def _readable(name: bytes) -> str:
    return os.fsdecode(name).replace("\0", "@")


async def _connect(sock: socket.socket, name: bytes) -> None:
    while True:
        try:
            sock.connect(name)
        except BlockingIOError:
            # The listener's backlog is full. AF_UNIX connects at once or not at all, and offers nothing to wait on.
            await asyncio.sleep(_BACKLOG_PAUSE)
        else:
            return


async def authenticate(sock: socket.socket) -> None:
    """Tell the bus who we are, by the credentials that the kernel attaches, and that we pass fds.

    Raises AuthError when it refuses or hangs up.
    """
    uid = str(os.geteuid()).encode().hex()
    if not (await _exchange(sock, f"\0AUTH EXTERNAL {uid}\r\n")).startswith("OK"):
        raise AuthError(f"the bus refused the credentials of uid {os.geteuid()}; its policy must allow this user")
    if await _exchange(sock, "NEGOTIATE_UNIX_FD\r\n") != "AGREE_UNIX_FD":
        raise AuthError("the bus does not pass file descriptors; it must listen on a unix socket")
    await _send(sock, "BEGIN\r\n")


async def _exchange(sock: socket.socket, command: str) -> str:
    """Send one line and return the answer, which is one line and nothing else."""
    await _send(sock, command)
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\r\n"):
        try:
            received = await loop.sock_recv(sock, _MAX_LINE)
        except OSError as error:
            raise AuthError(f"the bus closed the connection during authentication: {error.strerror}") from error
        if not received:
            raise AuthError("the bus closed the connection during authentication")
        line += received
        if len(line) > _MAX_LINE or b"\n" in line[:-1]:
            raise AuthError("the bus answered authentication with something that is not one line")
    return line.decode("ascii", "replace").strip()


async def _send(sock: socket.socket, text: str) -> None:
    try:
        await asyncio.get_running_loop().sock_sendall(sock, text.encode())
    except OSError as error:
        raise AuthError(f"the bus closed the connection during authentication: {error.strerror}") from error
