# SPDX-License-Identifier: MIT
"""Inbox: from the bytes and fds of a stream socket to messages, in bounded memory.

It frames messages by the header alone, gives each its own fds, and skips what is too large as it streams in. Who
handles a message is left to connection, when to read on to transport, and to take the fds of some messages only to
selective.
"""

from __future__ import annotations

import array
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from udmabufd_base import codec
from udmabufd_base.errors import BodyTooLarge, ProtocolError
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_base.message import Header, parse_frame, parse_header

READ_SIZE: Final = 1 << 15
"""Bytes asked of one recv."""

MAX_HEADER: Final = 2 * READ_SIZE
"""Bytes of header. Object paths have no bound, so a peer can send more: such a message is dropped unread."""

SCM_MAX_FD: Final = 253
"""Fds in one sendmsg, by include/net/scm.h: the most that a message can carry."""

Discard: TypeAlias = Callable[[Header, list[OwnedFd]], None]
"""Takes ownership of fds that came with the message of that header and that nobody took."""


def close_at_once(header: Header, fds: list[OwnedFd]) -> None:
    """Discard by closing where we stand; with a descriptor of a file system that does not answer, that can hang."""
    close_all(fds)


class Incoming:
    """A received message: its header, its body on demand, and the fds that came with it."""

    __slots__ = ("_discard", "_fds", "_raw", "header", "oversize")

    def __init__(
        self, header: Header, raw: bytes | None, fds: list[OwnedFd], discard: Discard = close_at_once
    ) -> None:
        self.header = header
        self.oversize = raw is None
        """Whether the body was over the connection's bound. It was skipped, and the fds are closed."""
        self._raw = raw
        self._fds = fds
        self._discard = discard

    @property
    def fds(self) -> list[OwnedFd]:
        """The fds, still owned by this object: those that nobody takes are discarded when the handler returns.

        There are `header.unix_fds` of them, or none: the connection does not receive them, or not this message's.
        """
        return self._fds

    def take_fds(self) -> list[OwnedFd]:
        """Return the fds and stop owning them."""
        fds, self._fds = self._fds, []
        return fds

    def body(self) -> list[Any]:
        """Decode and return the body; see codec.decode_body. Raises ProtocolError, or BodyTooLarge when `oversize`.

        Look at `header.signature` first: a body with another signature than the member's need not be decoded.
        """
        if self._raw is None:
            raise BodyTooLarge(f"the message has {self.header.body_length} bytes of body, more than are taken")
        return codec.decode_body(self._raw, self.header)

    def close(self) -> None:
        """Discard the fds that nobody took."""
        if self._fds:
            self._discard(self.header, self.take_fds())


class Inbox:
    """Reads messages off a stream socket. It owns the fds that no message has claimed yet.

    Without `receive_fds` there is no control buffer, so that the kernel drops the fds of a peer before they are ours.
    """

    def __init__(self, sock: socket.socket, *, receive_fds: bool, max_body: int) -> None:
        self._socket = sock
        self._receive_fds = receive_fds
        self._max_body = max_body
        self._buffer = bytearray()
        self._fds: deque[OwnedFd] = deque()
        self._skip = 0
        """Bytes of the message at hand that are still to be skipped."""
        self._skipped: Header | None = None
        """Its header, if that was small enough to be read."""

    def receive(self) -> int:
        """Read once and return the number of bytes; 0 at the end of the stream.

        Call it only when next() has returned None: that is what bounds the buffer. Raises OSError (BlockingIOError
        when there is nothing to read) and ProtocolError.
        """
        # Not beyond what is skipped: fds that came until then are then known to be the skipped message's.
        size = min(self._skip or READ_SIZE, READ_SIZE)
        data = self._receive_with_fds(size) if self._receive_fds else self._socket.recv(size, socket.MSG_DONTWAIT)
        self._buffer += data
        return len(data)

    def _receive_with_fds(self, size: int) -> bytes:
        # Every complete message has claimed its fds, so all that wait belong to one.
        if len(self._fds) > SCM_MAX_FD:
            raise ProtocolError(f"a message with more than {SCM_MAX_FD} file descriptors")
        data, truncated = self._recvmsg(size)
        if truncated:
            raise ProtocolError("the kernel dropped file descriptors on the way; is RLIMIT_NOFILE too low?")
        return data

    def _recvmsg(self, size: int) -> tuple[bytes, bool]:
        """Read once, add the fds that came to those that wait, and tell whether the kernel had to drop some."""
        numbers = array.array("i")
        data, ancillary, flags, _ = self._socket.recvmsg(
            size,
            socket.CMSG_SPACE(SCM_MAX_FD * numbers.itemsize),
            socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
        )
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers.frombytes(payload[: len(payload) // numbers.itemsize * numbers.itemsize])
        self._fds.extend(OwnedFd(number) for number in numbers)
        return data, bool(flags & socket.MSG_CTRUNC)

    def next(self) -> Incoming | None:
        """Return the next complete message, or None until more was received. Raises ProtocolError."""
        while True:
            if self._skip:
                step = min(self._skip, len(self._buffer))
                del self._buffer[:step]
                self._skip -= step
                if self._skip:
                    return None
                skipped = self._end_skip()
                if skipped:
                    return skipped
            frame = parse_frame(self._buffer)
            if frame is None:
                if self._fds and not self._buffer:
                    raise ProtocolError("file descriptors that no message announced")
                return None
            if frame.body_start > MAX_HEADER:
                self._skip = frame.total_length
            elif frame.total_length - frame.body_start > self._max_body:
                self._skipped = parse_header(self._buffer)
                if self._skipped is None:
                    return None
                self._skip = frame.total_length
            elif len(self._buffer) < frame.total_length:
                return None
            else:
                return self._cut(frame.total_length)

    def _cut(self, size: int) -> Incoming:
        raw = self._pop(size)
        header = parse_header(raw)
        assert header is not None
        return Incoming(header, raw, self._claim(header.unix_fds))

    def _pop(self, size: int) -> bytes:
        raw = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return raw

    def _end_skip(self) -> Incoming | None:
        header, self._skipped = self._skipped, None
        if header is None:
            # MAX_HEADER is larger than what one read can have brought, and reads stop where the skipped message does.
            close_all(self._claim(len(self._fds)))
            return None
        close_all(self._claim(header.unix_fds))
        return Incoming(header, None, [])

    def _claim(self, count: int) -> list[OwnedFd]:
        if not self._receive_fds:
            return []
        if count > len(self._fds):
            raise ProtocolError(f"a message announces {count} file descriptors and came with {len(self._fds)}")
        return [self._fds.popleft() for _ in range(count)]

    def close(self) -> None:
        """Forget what was received and close the fds of it."""
        self._buffer.clear()
        close_all(self._fds)
        self._fds.clear()
