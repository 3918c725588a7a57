# SPDX-License-Identifier: MIT
"""linux.fdstat: agrees with fstat about every kind of file, and does not wait where fstat does."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.bus.silent_fuse import silent_file
from udmabufd.linux import fdstat, memfd
from udmabufd_base.fd import OwnedFd

PATIENCE = 20.0
"""Seconds that a call which does not block may take on a busy machine; the silent server lives longer."""


def opened(path: str | Path, flags: int) -> OwnedFd:
    return OwnedFd(os.open(path, flags | os.O_CLOEXEC))


@pytest.fixture
def kinds(tmp_path: Path) -> Iterator[dict[str, OwnedFd]]:
    """A descriptor of each kind that a client may send."""
    (tmp_path / "file").write_bytes(b"12345")
    with ExitStack() as stack:
        made = {
            "memfd": memfd.create("kind", 12288),
            "file": opened(tmp_path / "file", os.O_RDWR),
            "directory": opened(tmp_path, os.O_RDONLY | os.O_DIRECTORY),
            "device": opened("/dev/null", os.O_RDWR),
            "proc": opened("/proc/self/status", os.O_RDONLY),
            "socket": OwnedFd(socket.socket(socket.AF_UNIX).detach()),
            "eventfd": OwnedFd(os.eventfd(0)),
        }
        made["pipe"], made["pipe's other end"] = map(OwnedFd, os.pipe())
        for fd in made.values():
            stack.enter_context(fd)
        yield made


def test_agrees_with_fstat(kinds: dict[str, OwnedFd]) -> None:
    """Device, inode, size and mode of every kind are those that fstat gives."""
    for kind, fd in kinds.items():
        expected = os.fstat(fd.fileno())
        found = fdstat.look(fd.fileno())
        assert found.device == (os.major(expected.st_dev), os.minor(expected.st_dev)), kind
        assert (found.inode, found.size, found.mode) == (expected.st_ino, expected.st_size, expected.st_mode), kind
        assert not found.path_only, kind
    assert stat.S_ISDIR(fdstat.look(kinds["directory"].fileno()).mode)


def test_memfds_have_a_device_of_their_own(kinds: dict[str, OwnedFd]) -> None:
    """All memfds share it, and no other kind has it: that is how they are told apart."""
    device = fdstat.look(kinds.pop("memfd").fileno()).device
    with memfd.create("another", 0) as another:
        assert fdstat.look(another.fileno()).device == device
    assert device not in {fdstat.look(fd.fileno()).device for fd in kinds.values()}


@pytest.mark.parametrize(
    ("flags", "path_only", "readable", "writable"),
    [
        (os.O_RDWR, False, True, True),
        (os.O_RDONLY, False, True, False),
        (os.O_WRONLY, False, False, True),
        (os.O_PATH, True, False, False),
        (os.O_PATH | os.O_RDWR, True, False, False),
    ],
)
def test_how_it_was_opened(flags: int, path_only: bool, readable: bool, writable: bool) -> None:
    """The access mode of the open file; O_PATH gives none, whatever else was asked for."""
    with memfd.create("opened", 4096) as fd, opened(f"/proc/self/fd/{fd.fileno()}", flags) as other:
        found = fdstat.look(other.fileno())
        assert (found.path_only, found.readable, found.writable) == (path_only, readable, writable)
        assert (found.device, found.inode, found.size) == (fdstat.look(fd.fileno()).device, inode_of(fd), 4096)


def inode_of(fd: OwnedFd) -> int:
    return os.fstat(fd.fileno()).st_ino


def test_closed() -> None:
    """The kernel's error arrives as it is."""
    with pytest.raises(OSError) as caught:
        fdstat.look(1_000_000)
    assert caught.value.errno == errno.EBADF


def returns(call: Callable[[], object], seconds: float) -> tuple[bool, threading.Thread]:
    """Whether `call` is over after so long, and the thread that it runs in."""

    def work() -> None:
        with suppress(OSError):  # ENOTCONN, once the server is gone.
            call()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive(), thread


@pytest.mark.root
@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDONLY, os.O_PATH])
def test_silent_server(tmp_path: Path, flags: int) -> None:
    """What hangs fstat does not hang look(); and what it says is enough to know that this is no memfd."""
    with memfd.create("mine", 0) as mine, silent_descriptor(tmp_path, flags) as fd:
        answered, thread = returns(lambda: os.fstat(fd), 0.2)
        assert not answered, "fstat was answered: this test proves nothing"
        found: list[fdstat.FdStat] = []
        assert returns(lambda: found.append(fdstat.look(fd)), PATIENCE)[0]
        assert found[0].device != fdstat.look(mine.fileno()).device
        assert found[0].path_only == (flags == os.O_PATH)
    thread.join()


@contextmanager
def silent_descriptor(tmp_path: Path, flags: int) -> Iterator[int]:
    """A descriptor of the silent file; it is closed when the server is gone, because closing it hangs before."""
    with silent_file(tmp_path) as path:
        fd = os.open(path, flags | os.O_CLOEXEC)
        yield fd
    with suppress(OSError):
        os.close(fd)
