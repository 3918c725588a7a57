# SPDX-License-Identifier: MIT
"""SelectiveInbox: an Inbox that takes the fds of the messages that are wanted, and of no others.

An fd, once received, can hang whoever closes it. So each message is looked at where it begins (MSG_PEEK) before it is
read, and only one that is wanted is read with a control buffer: the kernel drops the fds of the others before they are
ours. Which are wanted, and how fds are got rid of that nobody took, is left to the owner.

Facts (net/unix/af_unix.c, unix_stream_read_generic): a read takes the fds that ride with any byte that it reads, and
ends behind the buffer that carried them; it may begin with bytes of buffers before that one. So a read never crosses
the end of a message but for messages that were seen to be without fds. A look takes nothing, and ends likewise: what
is behind a buffer with fds shows only when that buffer was read.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias

from udmabufd_base.errors import ProtocolError
from udmabufd_base.fd import OwnedFd
from udmabufd_base.inbox import READ_SIZE, SCM_MAX_FD, Discard, Inbox, Incoming, close_at_once
from udmabufd_base.message import FIXED_SIZE, Header, parse_frame, parse_header

ReceiveFds: TypeAlias = bool | Callable[[Header], bool]
"""Whether the fds of messages are received: of all, of none, or of those for which the function returns true."""

_BATCH: Final = 64
"""Messages in one read, so that parsing them takes a bounded share of the loop's turn."""

_log = logging.getLogger(__name__)


def make_inbox(sock: socket.socket, *, receive_fds: ReceiveFds, discard: Discard | None, max_body: int) -> Inbox:
    """Return the Inbox for `receive_fds`. Raises ValueError for a `discard` with a plain true or false."""
    if callable(receive_fds):
        return SelectiveInbox(sock, wanted=receive_fds, discard=discard or close_at_once, max_body=max_body)
    if discard is not None:
        raise ValueError("discard is for connections that choose by a function whose fds they receive")
    return Inbox(sock, receive_fds=receive_fds, max_body=max_body)


class SelectiveInbox(Inbox):
    """Reads messages off a stream socket, with the fds of those that `wanted(header)` is true for.

    A message comes with as many fds as it announces or with none: what came in another number is discarded. None come
    either with one whose header (32 KiB at most) was not in the socket as a whole when it was looked at, or whose body
    is over the bound; `wanted` is then not asked. `discard` becomes the owner of all fds that nobody takes, also of a
    message that is under way at close(). Neither function may raise; what they raise is logged, and taken for false.
    """

    def __init__(
        self, sock: socket.socket, *, wanted: Callable[[Header], bool], discard: Discard, max_body: int
    ) -> None:
        super().__init__(sock, receive_fds=False, max_body=max_body)
        self._wanted = wanted
        self._discard_unguarded = discard
        self._headers: deque[Header] = deque()
        """Those of the complete messages in the buffer that were parsed when they were looked at."""
        self._taking: Header | None = None
        """That of the message under way whose fds are received."""
        self._complained: set[str] = set()

    def receive(self) -> int:
        """Read once, or look and read; see Inbox.receive. Besides what it does: no fds of unwanted messages come."""
        if left := self._left():
            data = self._read(min(left, READ_SIZE))
        else:
            self._forget()
            seen = self._socket.recv(READ_SIZE, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            size = self._choose(seen) if seen else 0
            data = self._read(size) if size else b""
            if data != seen[:size]:
                # The writer can change pages that it spliced, and then what was decided does not hold.
                raise ProtocolError("bytes that changed between being looked at and being read")
        self._buffer += data
        return len(data)

    def _left(self) -> int:
        """Bytes that may be read without a look: to the end of the message under way, as far as that is known."""
        if self._skip or not self._buffer:
            return self._skip
        frame = parse_frame(self._buffer)
        return (frame.total_length if frame else FIXED_SIZE) - len(self._buffer)

    def _choose(self, seen: bytes) -> int:
        """Return how many bytes to read, of a stream that begins with `seen` and with a message.

        Either messages without fds that are there as a whole, or no more than one message.
        """
        header = _header(seen, 0)
        size = 0
        while header is not None and not header.unix_fds and self._is_whole(header, len(seen) - size):
            self._headers.append(header)
            size += header.total_length
            if len(self._headers) == _BATCH:
                break
            try:
                header = _header(seen, size)
            except ProtocolError:
                break  # What came before is heard first.
        if size:
            return size
        if header is None:
            return len(seen)
        if self._wants(header):
            self._taking = header
        if self._is_whole(header, len(seen)):
            self._headers.append(header)
        return min(header.total_length, len(seen))

    def _is_whole(self, header: Header, size: int) -> bool:
        """Whether the message is there as a whole, in `size` bytes, and is not to be skipped."""
        return header.total_length <= size and header.body_length <= self._max_body

    def _wants(self, header: Header) -> bool:
        if not 0 < header.unix_fds <= SCM_MAX_FD or header.body_length > self._max_body:
            return False
        try:
            return bool(self._wanted(header))
        except Exception as error:
            self._complain("the function that chooses the messages whose fds are received", error)
            return False

    def _read(self, size: int) -> bytes:
        # Fds beyond those announced show that this message gets none: no more of them are taken.
        if self._taking is None or len(self._fds) > self._taking.unix_fds:
            return self._socket.recv(size, socket.MSG_DONTWAIT)
        data, truncated = self._recvmsg(size)
        if truncated and "RLIMIT_NOFILE" not in self._complained:
            self._complained.add("RLIMIT_NOFILE")
            _log.error("the kernel dropped file descriptors on the way; is RLIMIT_NOFILE too low?")
        return data

    def _cut(self, size: int) -> Incoming:
        raw = self._pop(size)
        header = self._headers.popleft() if self._headers else parse_header(raw)
        assert header is not None
        fds = self._claim(header.unix_fds)
        if len(fds) != header.unix_fds:
            self._discard(header, fds)
            fds = []
        return Incoming(header, raw, fds, self._discard)

    def _claim(self, count: int) -> list[OwnedFd]:
        """All that came, for they came with one message."""
        fds = list(self._fds)
        self._fds.clear()
        return fds

    def _discard(self, header: Header, fds: list[OwnedFd]) -> None:
        if not fds:
            return
        try:
            self._discard_unguarded(header, fds)
        except Exception as error:
            self._complain("the function that discards fds", error)

    def _complain(self, about: str, error: Exception) -> None:
        # A peer may be able to cause this at will: one traceback tells what the rest would.
        _log.error("%s failed: %r", about, error, exc_info=about not in self._complained)
        self._complained.add(about)

    def _forget(self) -> None:
        self._taking = None
        self._headers.clear()

    def close(self) -> None:
        """Forget what was received and discard the fds of it."""
        if self._taking is not None:
            self._discard(self._taking, self._claim(self._taking.unix_fds))
        self._forget()
        super().close()


def _header(seen: bytes, start: int) -> Header | None:
    """Parse the header of the message at `start`, or return None while it is incomplete. Raises ProtocolError."""
    frame = parse_frame(seen[start : start + FIXED_SIZE])
    if frame is None or start + frame.body_start > len(seen):
        return None
    return parse_header(seen[start : start + frame.body_start])
