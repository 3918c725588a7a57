# SPDX-License-Identifier: MIT
"""PID 1's end of $NOTIFY_SOCKET with a store of descriptors, for machines where systemd is not PID 1.

Keeps what systemd keeps and forgets what it forgets: a name stands for all descriptors of it; the same open file is
kept once, under its first name; beyond its size descriptors are closed without a word; a descriptor without a valid
name is called "stored"; senders other than the main process are ignored. test_fdstore_service.py shows in the guest
that systemd does the same.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import platform
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

PATIENCE = 60.0
"""Seconds to wait for what must come about."""

CREDENTIALS = struct.Struct("iII")
KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272}[platform.machine()]
_libc = ctypes.CDLL(None, use_errno=True)


def same_file(first: int, second: int) -> bool:
    """Return whether two descriptors of this process are of one open file (kcmp(2), KCMP_FILE)."""
    pid = os.getpid()
    answer = _libc.syscall(KCMP, pid, pid, 0, ctypes.c_ulong(first), ctypes.c_ulong(second))
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return bool(answer == 0)


def readable(*fds: int, seconds: float | None = 0) -> set[int]:
    """Return which of `fds` can be read within that time, None for as long as it takes."""
    poll = select.poll()  # select() does not take numbers beyond 1023
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}


class FakeStore:
    """A thread that reads the socket at `path` and does as it is told there."""

    def __init__(self, path: Path, *, size: int = 3008) -> None:
        self.address = str(path)
        self.size = size
        self.main_pid: int | None = None
        """Whom it listens to; None is everybody."""
        self.messages: list[str] = []
        """What was said, in order, without WATCHDOG=1."""
        self.pulses = 0
        self.status = ""
        self.ready = False
        self.oldest_first = False
        self._fds: list[tuple[str, int]] = []  # oldest first
        # Descriptors arrive here by the thousand.
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._limit[1], self._limit[1]))
        self._changed = threading.Condition()
        self._paused = False
        self._held: list[int] | None = None
        self._ended = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(self.address)
        path.chmod(0o666)
        self._wake_in, self._wake_out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="fake-store", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and close what is stored."""
        self._ended = True
        self._wake()
        self._thread.join(PATIENCE)
        self.discard()
        for fd in self._held or ():
            os.close(fd)
        self._socket.close()
        os.close(self._wake_in)
        os.close(self._wake_out)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limit)

    @property
    def stored(self) -> dict[str, list[int]]:
        """The inodes of what is stored, by name, oldest first."""
        found: dict[str, list[int]] = {}
        with self._changed:
            for name, fd in self._fds:
                found.setdefault(name, []).append(os.fstat(fd).st_ino)
        return found

    def hand_over(self) -> list[tuple[str, int]]:
        """Return names and descriptors (borrowed) in the order in which a service gets them."""
        with self._changed:
            return list(self._fds if self.oldest_first else reversed(self._fds))

    def discard(self) -> None:
        """Close everything that is stored, as systemd does when the unit is stopped."""
        with self._changed:
            for _, fd in self._fds:
                os.close(fd)
            self._fds.clear()

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
        """Wait for something that follows from a message."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout), f"within {timeout} s not {what}"

    def notice(self) -> None:
        """Let wait_until() look again: something else has happened."""
        with self._changed:
            self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not read: PID 1 is busy, or stopped."""
        with self._changed:
            self._paused = True
        self._wake()
        try:
            yield
        finally:
            self._paused = False
            self._wake()

    @contextmanager
    def holding_barriers(self) -> Iterator[None]:
        """Handle messages, but do not say so: PID 1 as seen by a service that is much faster."""
        with self._changed:
            self._held = []
        try:
            yield
        finally:
            with self._changed:
                held, self._held = self._held, None
                for fd in held:
                    os.close(fd)

    def drain(self) -> None:
        """Return when everything that has been sent has been handled."""
        deadline = time.monotonic() + PATIENCE
        self._paused = False
        self._wake()
        while readable(self._socket.fileno()):
            assert time.monotonic() < deadline, "the socket does not get empty"
            with self._changed:
                self._changed.wait(0.01)
        with self._changed:
            pass  # the last one has been handled, too

    def _wake(self) -> None:
        os.write(self._wake_out, b"x")

    def _run(self) -> None:
        while not self._ended:
            watched = [self._wake_in] if self._paused else [self._wake_in, self._socket.fileno()]
            if self._wake_in in readable(*watched, seconds=None):
                os.read(self._wake_in, 4096)
            elif not self._paused:
                with self._changed:
                    self._receive()
                    self._changed.notify_all()

    def _receive(self) -> None:
        try:
            room = socket.CMSG_SPACE(253 * 4) + socket.CMSG_SPACE(CREDENTIALS.size)
            data, control, flags, _ = self._socket.recvmsg(4096, room, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), "a message was cut"
        fds, pid = array.array("i"), 0
        for _, kind, content in control:
            if kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
            elif kind == socket.SCM_CREDENTIALS:
                pid, _, _ = CREDENTIALS.unpack(content)
        kept = self._handle(data.decode(), pid, list(fds))
        for fd in fds:
            if fd not in kept:
                os.close(fd)

    def _handle(self, text: str, pid: int, fds: list[int]) -> set[int]:
        """Do what a message asks for; return the descriptors that are to stay open."""
        lines = text.split("\n")
        if "BARRIER=1" in lines:
            self.messages.append(text)
            if self._held is None:
                return set()
            self._held += fds
            return set(fds)
        if self.main_pid is not None and pid != self.main_pid:
            return set()
        if text == "WATCHDOG=1":
            self.pulses += 1
            return set()
        self.messages.append(text)
        self.ready |= "READY=1" in lines
        name = "stored"
        for line in lines:
            key, _, value = line.partition("=")
            if key == "STATUS":
                self.status = value
            elif key == "FDNAME" and 0 < len(value) < 256 and value.isascii() and value.isprintable():
                name = "stored" if ":" in value else value
        if "FDSTOREREMOVE=1" in lines:
            self._remove(name)
        return self._keep(name, fds) if "FDSTORE=1" in lines else set()

    def _keep(self, name: str, fds: list[int]) -> set[int]:
        kept = set()
        for fd in fds:
            if len(self._fds) < self.size and not any(same_file(fd, other) for _, other in self._fds):
                self._fds.append((name, fd))
                kept.add(fd)
        return kept

    def _remove(self, name: str) -> None:
        for stored, fd in self._fds:
            if stored == name:
                os.close(fd)
        self._fds = [(stored, fd) for stored, fd in self._fds if stored != name]


def kcmp_works() -> bool:
    """Return whether the kernel has kcmp(2)."""
    try:
        return same_file(0, 0)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return False
        raise
