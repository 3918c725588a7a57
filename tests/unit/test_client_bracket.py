# SPDX-License-Identifier: MIT
"""DMA_BUF_SYNC brackets: what the kernel sees of nested, widened, concurrent and failing accesses."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from udmabufd_base.fd import OwnedFd
from udmabufd_client.bracket import READ, WRITE, SyncBracket

BOTH = READ | WRITE


class Kernel:
    """Stands where the ioctl is: records what comes, checks it as udmabuf would be left, fails when told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.open = 0
        self.fds: set[int] = set()
        self.failures: list[bool] = []

    def start(self, fd: int, flags: int) -> None:
        assert self.open == 0, "a START inside a bracket loses what the cache still holds"
        assert flags in (READ, WRITE, BOTH)
        os.fstat(fd)
        self.fds.add(fd)
        if self.failures and self.failures.pop(0):
            raise OSError(errno.EIO, "no")
        self.seen.append(("start", flags))
        self.open = flags

    def end(self, fd: int, flags: int) -> None:
        assert self.open == flags, "an END with other directions than its START"
        os.fstat(fd)
        self.seen.append(("end", flags))
        self.open = 0


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def bracket(kernel: Kernel) -> SyncBracket:
    return SyncBracket(kernel.start, kernel.end)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("bracket")
    yield made
    os.close(made)


def dup_of(fd: int) -> Callable[[], OwnedFd]:
    return lambda: OwnedFd(os.dup(fd))


@pytest.mark.parametrize("flags", [READ, WRITE, BOTH])
def test_one_access_is_one_bracket(bracket: SyncBracket, kernel: Kernel, fd: int, flags: int) -> None:
    bracket.enter(dup_of(fd), flags)
    assert kernel.seen == [("start", flags)]
    bracket.leave()
    assert kernel.seen == [("start", flags), ("end", flags)]
    assert bracket.depth == 0


def test_an_inner_access_with_fewer_directions_is_free(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    bracket.enter(dup_of(fd), BOTH)
    bracket.enter(dup_of(fd), READ)
    bracket.enter(dup_of(fd), WRITE)
    assert bracket.depth == 3
    for _ in range(3):
        assert kernel.seen == [("start", BOTH)]
        bracket.leave()
    assert kernel.seen == [("start", BOTH), ("end", BOTH)]


def test_an_inner_access_that_adds_a_direction_writes_back_first(
    bracket: SyncBracket, kernel: Kernel, fd: int
) -> None:
    bracket.enter(dup_of(fd), WRITE)
    bracket.enter(dup_of(fd), READ)
    bracket.leave()
    bracket.leave()
    assert kernel.seen == [("start", WRITE), ("end", WRITE), ("start", BOTH), ("end", BOTH)]


def test_accesses_that_overlap_without_nesting_end_with_the_last(
    bracket: SyncBracket, kernel: Kernel, fd: int
) -> None:
    bracket.enter(dup_of(fd), READ)
    bracket.enter(dup_of(fd), READ)
    bracket.leave()
    bracket.enter(dup_of(fd), READ)
    bracket.leave()
    assert kernel.seen == [("start", READ)]
    bracket.leave()
    assert kernel.seen[-1] == ("end", READ)
    bracket.enter(dup_of(fd), WRITE)
    bracket.leave()
    assert kernel.seen[-2:] == [("start", WRITE), ("end", WRITE)]


def test_the_bracket_ends_on_a_descriptor_of_its_own(bracket: SyncBracket, kernel: Kernel) -> None:
    fd = os.memfd_create("bracket")
    bracket.enter(dup_of(fd), WRITE)
    os.close(fd)
    assert fd not in kernel.fds
    (own,) = kernel.fds
    assert not os.get_inheritable(own)
    bracket.leave()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(own)


def test_a_failed_start_leaves_nothing(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    kernel.failures = [True]
    with pytest.raises(OSError, match="no"):
        bracket.enter(dup_of(fd), READ)
    assert (bracket.depth, kernel.seen) == (0, [])
    bracket.enter(dup_of(fd), READ)
    bracket.leave()
    assert kernel.seen == [("start", READ), ("end", READ)]


def test_a_failed_widening_leaves_the_outer_access_as_it_was(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    bracket.enter(dup_of(fd), WRITE)
    kernel.failures = [True, False]
    with pytest.raises(OSError, match="no"):
        bracket.enter(dup_of(fd), READ)
    assert bracket.depth == 1
    bracket.leave()
    assert kernel.seen == [("start", WRITE), ("end", WRITE), ("start", WRITE), ("end", WRITE)]


def test_when_even_restoring_fails_there_is_no_end_without_a_start(
    bracket: SyncBracket, kernel: Kernel, fd: int
) -> None:
    bracket.enter(dup_of(fd), WRITE)
    kernel.failures = [True, True]
    with pytest.raises(OSError, match="no"):
        bracket.enter(dup_of(fd), READ)
    bracket.leave()
    assert kernel.seen == [("start", WRITE), ("end", WRITE)]
    bracket.enter(dup_of(fd), READ)
    bracket.leave()
    assert kernel.seen[-2:] == [("start", READ), ("end", READ)]


def test_threads_never_give_the_kernel_two_brackets_at_once(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    failed: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(flags: int) -> None:
        barrier.wait()
        try:
            for _ in range(500):
                bracket.enter(dup_of(fd), flags)
                bracket.leave()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=[flags]) for flags in (READ, WRITE, BOTH, READ)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert (bracket.depth, kernel.open) == (0, 0)
    starts = sum(what == "start" for what, _ in kernel.seen)
    assert starts == len(kernel.seen) - starts > 0


def test_a_thread_that_begins_while_another_gets_its_descriptor_is_not_held_up(
    bracket: SyncBracket, kernel: Kernel, fd: int
) -> None:
    made: list[OwnedFd] = []

    def dup() -> OwnedFd:
        other = threading.Thread(target=bracket.enter, args=[dup_of(fd), READ], daemon=True)
        other.start()
        other.join(30)
        assert not other.is_alive(), "the other thread waits for the bracket"
        made.append(OwnedFd(os.dup(fd)))
        return made[0]

    bracket.enter(dup, WRITE)
    assert made[0].closed
    assert bracket.depth == 2
    bracket.leave()
    bracket.leave()
    assert kernel.seen == [("start", READ), ("end", READ), ("start", BOTH), ("end", BOTH)]
