# SPDX-License-Identifier: MIT
"""memfds for wrap(): sealed, populated, not inherited; with and without what newer kernels have."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from udmabufd_base.fd import OwnedFd
from udmabufd_client import errors, memfd, new_request_id, wrappable_memfd
from udmabufd_client.memfd import borrowed, lend

PAGE = mmap.PAGESIZE
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
F_SEAL_EXEC = 0x20


def without_noexec(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux before 6.3."""
    real = os.memfd_create

    def old(name: str, flags: int) -> int:
        if flags & memfd._MFD_NOEXEC_SEAL:
            raise OSError(errno.EINVAL, "no such flag")
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", old)


def without_populate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux before 5.14."""

    class Old(mmap.mmap):
        def madvise(self, *arguments: Any) -> None:
            raise OSError(errno.EINVAL, "no such advice")

    monkeypatch.setattr(mmap, "mmap", Old)


def as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that there is."""


@pytest.mark.parametrize("kernel", [as_it_is, without_noexec, without_populate])
@pytest.mark.parametrize("size", [1, PAGE, (1 << 20) + 3 * PAGE])
def test_a_wrappable_memfd_is_what_the_service_takes(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[[pytest.MonkeyPatch], None], size: int
) -> None:
    kernel(monkeypatch)
    whole = size + -size % PAGE
    with wrappable_memfd("mine", size) as fd:
        number = fd.fileno()
        stat = os.fstat(number)
        assert (stat.st_size, stat.st_blocks * 512) == (whole, whole), "every page is there"
        assert os.lseek(number, 0, os.SEEK_HOLE) == whole
        assert not os.get_inheritable(number)
        assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert fcntl.fcntl(number, fcntl.F_GET_SEALS) & ~F_SEAL_EXEC == SEALS
        assert str(Path(f"/proc/self/fd/{number}").readlink()).startswith("/memfd:mine")
        assert os.pread(number, whole, 0) == bytes(whole)
        os.pwrite(number, b"x", whole - 1)
        with pytest.raises(PermissionError):
            os.ftruncate(number, whole - PAGE)


@pytest.mark.parametrize("size", [0, -1])
def test_a_memfd_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be wrapped"):
        wrappable_memfd("mine", size)


def test_a_failure_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(memfd, "_populate", full)
    with pytest.raises(OSError, match="full"):
        wrappable_memfd("mine", PAGE)
    with pytest.raises(OSError, match="Invalid argument"):
        wrappable_memfd("x" * 300, PAGE)


def test_what_is_lent_stays_its_owners() -> None:
    with wrappable_memfd("mine", 2 * PAGE) as one, wrappable_memfd("mine", PAGE) as two:
        fds, ranges = lend([one, two.fileno()], None)
        assert ranges == [[0, 0, 2 * PAGE], [1, 0, PAGE]]
        assert [os.fstat(fd.fileno()).st_ino for fd in fds] == [os.fstat(fd.fileno()).st_ino for fd in (one, two)]
        for fd in fds:
            assert not os.get_inheritable(fd.fileno())
            fd.close()
        os.fstat(one.fileno())
        with pytest.raises(errors.InvalidSpec, match=r"ranges\[0\]"):
            lend([one], [(0, 1)])
        with pytest.raises(errors.InvalidSpec, match="memfds: 0"):
            lend([], None)
    closed = OwnedFd(os.dup(0))
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        borrowed(closed)


def test_request_ids_are_random_and_of_the_contracts_form() -> None:
    made = {new_request_id() for _ in range(100)}
    assert len(made) == 100
    assert all(16 <= len(one) <= 64 and one.isprintable() and " " not in one for one in made)
