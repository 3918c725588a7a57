# SPDX-License-Identifier: MIT
"""udmabufd_base.fd: one owner, one close."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from udmabufd_base.fd import OwnedFd, close_all


def fresh() -> OwnedFd:
    return OwnedFd(os.memfd_create("test", os.MFD_CLOEXEC))


def is_open(number: int) -> bool:
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError as error:
        assert error.errno == errno.EBADF
        return False
    return True


def test_close_closes_once() -> None:
    fd = fresh()
    number = fd.fileno()
    fd.close()
    assert fd.closed
    assert not is_open(number)
    with fresh() as other:
        # The kernel gives out the lowest free number: a second close() that closed by number would hit this one.
        assert other.fileno() == number
        fd.close()
        assert is_open(number)


def test_context_manager_closes() -> None:
    with fresh() as fd:
        number = fd.fileno()
    assert not is_open(number)


@pytest.mark.parametrize("end", [OwnedFd.close, lambda fd: os.close(fd.steal())])
def test_nothing_is_lent_after_the_end(end: object) -> None:
    fd = fresh()
    assert callable(end)
    end(fd)
    assert fd.closed
    with pytest.raises(ValueError, match="closed or given away"):
        fd.fileno()
    with pytest.raises(ValueError, match="closed or given away"):
        fd.steal()
    with pytest.raises(ValueError, match="closed or given away"):
        fd.dup()


def test_steal_gives_ownership_away() -> None:
    fd = fresh()
    number = fd.steal()
    fd.close()
    del fd
    assert is_open(number)
    os.close(number)


def test_dup_is_another_descriptor_of_the_same_file() -> None:
    with fresh() as fd, fd.dup() as copy:
        assert copy.fileno() != fd.fileno()
        assert os.path.sameopenfile(copy.fileno(), fd.fileno())
        assert fcntl.fcntl(copy.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_a_dropped_owner_closes_and_complains() -> None:
    owners = [fresh()]
    number = owners[0].fileno()
    with pytest.warns(ResourceWarning, match=f"unclosed file descriptor {number}"):
        owners.clear()
    assert not is_open(number)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        OwnedFd(-1)


def test_close_all_closes_all() -> None:
    fds = [fresh() for _ in range(3)]
    numbers = [fd.fileno() for fd in fds]
    close_all(fds)
    assert not any(map(is_open, numbers))


def test_repr_names_the_number() -> None:
    with fresh() as fd:
        assert repr(fd) == f"<OwnedFd {fd.fileno()}>"
    assert repr(fd) == "<OwnedFd closed>"
