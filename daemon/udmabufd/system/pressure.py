# SPDX-License-Identifier: MIT
"""Tells the event loop when memory is short: a trigger of the kernel's pressure stall information (PSI).

Where to watch, and from which stall on, the service manager says by two environment variables (systemd 254 and later:
MemoryPressureWatch= in systemd.resource-control(5), the protocol in systemd's docs/PRESSURE.md). What is given up then
is left to the caller.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import os
import select
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from udmabufd_base.fd import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

log = logging.getLogger(__name__)

_NOT_DESIRED: Final = "/dev/null"
_DISCARDED_AT_ONCE: Final = 4096


class Source(NamedTuple):
    """A file to watch: PSI's of a control group or the machine, a FIFO, or a listening AF_UNIX stream socket.

    `trigger` is written to it first: to a file of PSI "some" or "full", microseconds of stall, and of the window in
    which they count, with a NUL at its end (Documentation/accounting/psi.rst).
    """

    path: str
    trigger: bytes


MACHINE: Final = Source("/proc/pressure/memory", b"some 200000 2000000\0")
"""Stalls of whatever process, for 0.2 s within 2 s. The least window, and the unit of each, without CAP_SYS_RESOURCE;
before Linux 6.5 that is needed for any.
"""


def source_from_environment(environ: Mapping[str, str] | None = None) -> Source | None:
    """Return what the service manager wants watched, or None, having logged why, when it is nothing that can be."""
    variables = os.environ if environ is None else environ
    path = variables.get("MEMORY_PRESSURE_WATCH", "")
    if not path:
        reason = "the service manager does not say where: systemd is older than 254, or MemoryPressureWatch= is off"
    elif path == _NOT_DESIRED:
        reason = "MemoryPressureWatch= is off"
    elif not path.startswith("/"):
        reason = f"$MEMORY_PRESSURE_WATCH is no absolute path: {path!r}"
    else:
        try:
            return Source(path, base64.b64decode(variables.get("MEMORY_PRESSURE_WRITE", ""), validate=True))
        except ValueError as error:
            reason = f"$MEMORY_PRESSURE_WRITE is no base64 ({error})"
    log.info("Memory pressure of the service is not watched: %s", reason)
    return None


class MemoryPressure:
    """Calls back at each event of any source while it runs; a context manager, to be entered on the event loop.

    PSI has at most one event in each window of its trigger. A source that cannot be watched, or ends, is left out.
    """

    def __init__(self, callback: Callable[[], None], sources: Iterable[Source]) -> None:
        """`callback` runs on the loop, and must not wait for anything."""
        self._callback = callback
        self._sources = tuple(sources)
        self._open: dict[int, _Opened] = {}
        self._epoll: select.epoll | None = None

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    @property
    def watched(self) -> list[str]:
        """Paths of the sources that are watched at present."""
        return [opened.path for opened in self._open.values()]

    def start(self) -> None:
        """Open the sources and watch them. Harmless when repeated. Raises OSError (EMFILE)."""
        if self._epoll is not None:
            return
        # asyncio's selectors watch for POLLIN alone, and PSI has POLLPRI.
        self._epoll = select.epoll()
        for source in self._sources:
            try:
                opened = _open(source)
            except OSError as error:
                log.info("Memory pressure is not watched at %s: %s", source.path, _explain(error))
                continue
            try:
                self._epoll.register(opened.fd.fileno(), select.EPOLLIN if opened.talks else select.EPOLLPRI)
            except OSError as error:
                opened.fd.close()
                log.info("Memory pressure is not watched at %s: %s", source.path, _explain(error))
                continue
            self._open[opened.fd.fileno()] = opened
            log.info("Memory pressure is watched at %s", source.path)
        if self._open:
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._ready)
        else:
            self.stop()

    def stop(self) -> None:
        """Watch no more, on the loop that start() was called on. Harmless when repeated."""
        epoll, self._epoll = self._epoll, None
        if epoll is None:
            return
        asyncio.get_running_loop().remove_reader(epoll.fileno())
        epoll.close()
        while self._open:
            _, opened = self._open.popitem()
            opened.fd.close()

    def _ready(self) -> None:
        assert self._epoll is not None
        # Whoever polls a file of PSI takes its event (psi_trigger_poll, kernel/sched/psi.c), and the loop did when it
        # polled this epoll: that this is called is the event, and there is nothing to be found any more.
        found = self._epoll.poll(0)
        pressed = not found
        for fd, events in found:
            ended = bool(events & (select.EPOLLERR | select.EPOLLHUP))
            if not self._open[fd].talks:
                pressed |= not ended
            elif events & select.EPOLLIN:
                count, ended = _discard(fd)
                pressed |= count > 0
            if ended:
                self._forget(fd)
        if not self._open:
            self.stop()
        if pressed:
            self._callback()

    def _forget(self, fd: int) -> None:
        # One that has ended is ready for ever.
        assert self._epoll is not None
        opened = self._open.pop(fd)
        self._epoll.unregister(fd)
        opened.fd.close()
        log.info("Memory pressure is not watched at %s any more: there will be no further events", opened.path)


class _Opened(NamedTuple):
    path: str
    fd: OwnedFd
    talks: bool
    """Whether it is something else than PSI, and sends bytes."""


def _open(source: Source) -> _Opened:
    """Open a source and write its trigger. Raises OSError."""
    mode = Path(source.path).stat().st_mode
    if stat.S_ISSOCK(mode):
        fd = _connect(source.path)
    elif stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
        fd = OwnedFd(os.open(source.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))
    else:
        raise OSError(errno.EBADF, "neither a file of PSI, nor a FIFO, nor a socket")
    try:
        # A file of PSI takes it in one piece, or not.
        if source.trigger and os.write(fd.fileno(), source.trigger) != len(source.trigger):
            raise OSError(errno.EAGAIN, "it does not take the trigger")
        if stat.S_ISFIFO(mode):
            _discard(fd.fileno())  # Opened for both, it would answer with what was just written.
    except BaseException:
        fd.close()
        raise
    return _Opened(source.path, fd, not stat.S_ISREG(mode))


def _connect(path: str) -> OwnedFd:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as connection:
        connection.connect(path)
        return OwnedFd(connection.detach())


def _discard(fd: int) -> tuple[int, bool]:
    """Read all that there is for now; return how many bytes, and whether that was the end."""
    count = 0
    try:
        while data := os.read(fd, _DISCARDED_AT_ONCE):
            count += len(data)
    except BlockingIOError:
        return count, False
    except OSError as error:
        log.debug("Cannot read what tells of memory pressure: %s", error)
    return count, True


def _explain(error: OSError) -> str:
    hints = {
        errno.EPERM: "before Linux 6.5 it takes CAP_SYS_RESOURCE, or it is no file that can be watched",
        errno.EACCES: "the service manager has not opened it up to the service's user",
        errno.EROFS: "the sandbox has it read-only",
        errno.EOPNOTSUPP: "the kernel was booted without psi=1",
        errno.ENOENT: "the kernel lacks CONFIG_PSI, or cgroups are not those of version 2",
        errno.EINVAL: "the kernel refuses the threshold or its window; a user other than root takes a multiple of 2 s",
    }
    reason = error.strerror or str(error)
    hint = hints.get(error.errno or 0)
    return f"{reason} ({hint})" if hint else reason
