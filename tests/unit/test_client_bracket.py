# SPDX-License-Identifier: MIT
"""DMA_BUF_SYNC brackets: what the kernel sees of nested, concurrent, forked, interrupted and failing accesses.

And what becomes of the data on a machine whose devices do not see the CPU's cache.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn

import pytest

from udmabufd_base.fd import OwnedFd
from udmabufd_client import bracket as bracket_module
from udmabufd_client.bracket import READ, WRITE, Access, SyncBracket

BOTH = READ | WRITE

LINE = 64
"""Bytes of a line of the cache."""


@dataclass
class Line:
    """A line of the cache."""

    data: bytearray
    dirty: bool = False


class Kernel:
    """Stands where the ioctl is, with a cache before memory that devices access past it.

    Records what comes, checks it as the kernel needs it, fails when told. `failures` are taken one by one by the calls
    named in them: "start" has not begun anything, "half" has, as when the wait for fences is interrupted, and "end"
    has written nothing back. The cache is one that fetches and keeps lines whole, and does with them what the kernel's
    documentation says of the directions and no more.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.open = 0
        self.ever = False
        self.fds: set[int] = set()
        self.failures: list[str] = []
        self.interrupted: list[BaseException] = []
        """What the handlers of signals raise that come before one END each."""
        self.meanwhile: Callable[[], None] = lambda: None
        """What another thread does between an END and what follows it."""
        self.fence: Callable[[], None] = lambda: None
        """What a START with WRITE waits for."""
        self.memory = bytearray(4 * LINE)
        """The memory, as devices see it."""
        self.lines: dict[int, Line] = {}
        self.lost: list[bytes] = []

    def start(self, fd: int, flags: int) -> None:
        assert self.open == 0, "a START inside a bracket loses what the cache still holds"
        assert flags in (READ, WRITE, BOTH)
        os.fstat(fd)
        self.fds.add(fd)
        if self.failures and self.failures[0] in {"start", "half", "ok"} and (how := self.failures.pop(0)) != "ok":
            self.ever |= how == "half"
            raise OSError(errno.EIO, "no start")
        if flags & WRITE:
            self.fence()
        if flags & READ:
            self.lost += [bytes(line.data) for line in self.lines.values() if line.dirty]
            self.lines.clear()
        self.seen.append(("start", flags))
        self.open, self.ever = flags, True

    def end(self, fd: int, flags: int) -> None:
        assert flags in (READ, WRITE, BOTH)
        os.fstat(fd)
        if self.interrupted:
            raise self.interrupted.pop(0)
        if not self.ever:
            raise OSError(errno.EINVAL, "an END before any START")
        if self.failures and self.failures[0] == "end":
            self.failures.pop(0)
            raise OSError(errno.EIO, "no end")
        assert not self.open & ~flags, "an END that leaves out a direction of its START"
        self.seen.append(("end", flags))
        self.open = 0
        if flags & WRITE:
            for number, line in self.lines.items():
                if line.dirty:
                    self.memory[number * LINE : (number + 1) * LINE] = line.data
                    line.dirty = False
        self.meanwhile()

    def write(self, at: int = 0, value: int = 0x5A) -> None:
        """Write a byte into the mapping, by the cache."""
        line = self._line(at)
        line.data[at % LINE], line.dirty = value, True

    def read(self, at: int) -> int:
        """Read a byte of the mapping, by the cache."""
        return self._line(at).data[at % LINE]

    @property
    def dirty(self) -> bool:
        """Whether the cache holds what devices do not see."""
        return any(line.dirty for line in self.lines.values())

    def _line(self, at: int) -> Line:
        number = at // LINE
        return self.lines.setdefault(number, Line(self.memory[number * LINE : (number + 1) * LINE]))


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    assert kernel.lost == [], "written, and thrown away by a START"


@pytest.fixture
def bracket(kernel: Kernel) -> SyncBracket:
    return SyncBracket(kernel.start, kernel.end)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("bracket")
    yield made
    os.close(made)


def dup_of(fd: int) -> OwnedFd:
    return OwnedFd(os.dup(fd))


def no_dup() -> NoReturn:
    raise OSError(errno.EMFILE, "no descriptor")


def enter(bracket: SyncBracket, fd: int, flags: int) -> Access:
    """Begin an access that lasts until it is left or dropped."""
    access = Access()
    bracket.enter(access, lambda: dup_of(fd), flags)
    return access


def begin(fd: int, flags: int) -> Access:
    """Likewise, of whichever bracket the memory has."""
    access = Access()
    status = os.fstat(fd)
    access.begin((status.st_dev, status.st_ino), lambda: dup_of(fd), flags)
    return access


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize(("flags", "seen"), [(READ, READ), (WRITE, BOTH), (BOTH, BOTH)])
def test_one_access_is_one_bracket(bracket: SyncBracket, kernel: Kernel, fd: int, flags: int, seen: int) -> None:
    access = enter(bracket, fd, flags)
    assert kernel.seen == [("start", seen)]
    assert access.inside is bracket
    bracket.leave(access)
    assert kernel.seen == [("start", seen), ("end", seen)]
    assert bracket.depth == 0


def test_an_access_ends_once(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    outer = enter(bracket, fd, BOTH)
    inner = enter(bracket, fd, BOTH)
    for _ in range(3):
        inner.end()
        bracket.leave(inner)
    assert (bracket.depth, kernel.seen) == (1, [("start", BOTH)])
    outer.end()
    assert kernel.seen == [("start", BOTH), ("end", BOTH)]


@pytest.mark.parametrize("outer", [WRITE, BOTH])
def test_an_inner_access_with_fewer_directions_is_free(
    bracket: SyncBracket, kernel: Kernel, fd: int, outer: int
) -> None:
    accesses = [enter(bracket, fd, flags) for flags in (outer, READ, WRITE)]
    assert bracket.depth == 3
    for access in accesses:
        assert kernel.seen == [("start", BOTH)]
        bracket.leave(access)
    assert kernel.seen == [("start", BOTH), ("end", BOTH)]


def test_an_inner_access_that_adds_a_direction_begins_anew(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    outer = enter(bracket, fd, READ)
    inner = enter(bracket, fd, WRITE)
    kernel.write()
    bracket.leave(inner)
    assert kernel.dirty
    bracket.leave(outer)
    assert kernel.seen == [("start", READ), ("end", READ), ("start", BOTH), ("end", BOTH)]
    assert not kernel.dirty


def test_accesses_that_overlap_without_nesting_end_with_the_last(
    bracket: SyncBracket, kernel: Kernel, fd: int
) -> None:
    first, second = enter(bracket, fd, READ), enter(bracket, fd, READ)
    bracket.leave(first)
    third = enter(bracket, fd, READ)
    bracket.leave(second)
    assert kernel.seen == [("start", READ)]
    bracket.leave(third)
    assert kernel.seen[-1] == ("end", READ)
    bracket.leave(enter(bracket, fd, WRITE))
    assert kernel.seen[-2:] == [("start", BOTH), ("end", BOTH)]


# ---- the data -------------------------------------------------------------------------------------------------------


def test_a_writer_loses_nothing_to_a_reader_of_other_bytes(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    kernel.memory[2 * LINE] = 0x11
    writer = enter(bracket, fd, WRITE)
    # On its thread it goes on writing, whatever the reader's does.
    kernel.meanwhile = lambda: kernel.write(0, 0x5A)
    reader = enter(bracket, fd, READ)
    kernel.write(1, 0x5B)
    assert kernel.read(2 * LINE) == 0x11
    bracket.leave(reader)
    kernel.write(0, 0x5A)
    kernel.meanwhile = lambda: None
    bracket.leave(writer)
    assert kernel.memory[:2] == b"\x5a\x5b"
    assert kernel.seen == [("start", BOTH), ("end", BOTH)]


def test_writing_a_part_leaves_what_a_device_wrote_beside_it(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    before = enter(bracket, fd, READ)
    assert kernel.read(0) == 0
    bracket.leave(before)
    # The line is still in the cache when a device writes.
    kernel.memory[1] = 0x77
    access = enter(bracket, fd, WRITE)
    kernel.write(0, 0x5A)
    bracket.leave(access)
    assert kernel.memory[:2] == b"\x5a\x77"


def test_a_writer_among_readers_sees_what_devices_wrote_before_it(
    bracket: SyncBracket, kernel: Kernel, fd: int
) -> None:
    reader = enter(bracket, fd, READ)
    assert kernel.read(0) == 0
    kernel.memory[1] = 0x77
    writer = enter(bracket, fd, WRITE)
    assert kernel.read(1) == 0x77
    kernel.write(0, 0x5A)
    bracket.leave(writer)
    bracket.leave(reader)
    assert kernel.memory[:2] == b"\x5a\x77"


# ---- descriptors ----------------------------------------------------------------------------------------------------


def test_the_bracket_ends_on_a_descriptor_of_its_own(bracket: SyncBracket, kernel: Kernel) -> None:
    fd = os.memfd_create("bracket")
    access = enter(bracket, fd, WRITE)
    os.close(fd)
    assert fd not in kernel.fds
    (own,) = kernel.fds
    assert not os.get_inheritable(own)
    bracket.leave(access)
    assert not is_open(own)


def test_only_the_first_access_takes_a_descriptor(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    first = enter(bracket, fd, READ)
    inner = [Access(), Access()]
    bracket.enter(inner[0], no_dup, READ)
    bracket.enter(inner[1], no_dup, BOTH)
    bracket.leave(first)
    for access in inner:
        bracket.leave(access)
    assert kernel.seen[-1] == ("end", BOTH)
    with pytest.raises(OSError, match="no descriptor"):
        bracket.enter(first, no_dup, READ)
    assert (bracket.depth, first.inside, kernel.open) == (0, None, 0)


def test_a_descriptor_that_another_thread_was_faster_to_bring_is_closed(
    bracket: SyncBracket, kernel: Kernel, fd: int
) -> None:
    others: list[Access] = []
    brought: list[int] = []

    def late() -> OwnedFd:
        others.append(enter(bracket, fd, READ))
        brought.append(os.dup(fd))
        return OwnedFd(brought[0])

    access = Access()
    bracket.enter(access, late, READ)
    assert not is_open(brought[0])
    assert (bracket.depth, kernel.seen) == (2, [("start", READ)])
    bracket.leave(others[0])
    bracket.leave(access)
    assert kernel.seen == [("start", READ), ("end", READ)]


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["start", "half"])
def test_a_failed_start_leaves_nothing(bracket: SyncBracket, kernel: Kernel, fd: int, failure: str) -> None:
    kernel.failures = [failure]
    with pytest.raises(OSError, match="no start"):
        enter(bracket, fd, READ)
    assert (bracket.depth, kernel.seen) == (0, [])
    (own,) = kernel.fds
    assert not is_open(own)
    bracket.leave(enter(bracket, fd, READ))
    assert kernel.seen == [("start", READ), ("end", READ)]


@pytest.mark.parametrize("failure", ["start", "half"])
def test_a_failed_widening_leaves_the_outer_access_as_it_was(
    bracket: SyncBracket, kernel: Kernel, fd: int, failure: str
) -> None:
    outer = enter(bracket, fd, READ)
    kernel.failures = [failure, "ok"]
    with pytest.raises(OSError, match="no start"):
        enter(bracket, fd, WRITE)
    assert (bracket.depth, kernel.open) == (1, READ)
    inner = enter(bracket, fd, READ)
    bracket.leave(inner)
    bracket.leave(outer)
    assert kernel.seen == [("start", READ), ("end", READ), ("start", READ), ("end", READ)]


def test_a_widening_that_cannot_end_the_outer_access_leaves_it_open(
    bracket: SyncBracket, kernel: Kernel, fd: int
) -> None:
    outer = enter(bracket, fd, READ)
    kernel.failures = ["end"]
    with pytest.raises(OSError, match="no end"):
        enter(bracket, fd, WRITE)
    assert (bracket.depth, kernel.seen, kernel.open) == (1, [("start", READ)], READ)
    bracket.leave(outer)
    assert kernel.seen == [("start", READ), ("end", READ)]


def test_when_even_restoring_fails_the_outer_access_is_ended(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    outer = enter(bracket, fd, READ)
    kernel.failures = ["half", "start"]
    with pytest.raises(OSError, match="no start"):
        enter(bracket, fd, WRITE)
    bracket.leave(outer)
    assert kernel.seen == [("start", READ), ("end", READ), ("end", READ)]
    bracket.leave(enter(bracket, fd, READ))
    assert kernel.seen[-2:] == [("start", READ), ("end", READ)]


@pytest.mark.parametrize(("flags", "seen"), [(READ, READ), (WRITE, BOTH)])
def test_after_a_failed_restoring_the_next_access_begins_all_anew(
    bracket: SyncBracket, kernel: Kernel, fd: int, flags: int, seen: int
) -> None:
    outer = enter(bracket, fd, READ)
    kernel.failures = ["start", "start"]
    with pytest.raises(OSError, match="no start"):
        enter(bracket, fd, WRITE)
    inner = enter(bracket, fd, flags)
    assert kernel.open == seen
    bracket.leave(inner)
    bracket.leave(outer)
    assert kernel.seen == [("start", READ), ("end", READ), ("end", READ), ("start", seen), ("end", seen)]


def test_an_end_that_fails_is_told_and_the_bracket_is_over(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    access = enter(bracket, fd, WRITE)
    kernel.failures = ["end", "end"]
    with pytest.raises(OSError, match="no end"):
        access.end()
    assert (bracket.depth, access.inside) == (0, None)
    # The kernel has answered, so it was not asked again.
    assert kernel.failures == ["end"]
    (own,) = kernel.fds
    assert not is_open(own)


def test_a_failing_access_that_was_left_the_last_one_ends_the_bracket(kernel: Kernel, fd: int) -> None:
    def start(fd: int, flags: int) -> None:
        if flags == BOTH:
            # As a garbage collection does that finds an abandoned access.
            outer.end()
            raise OSError(errno.EIO, "no start")
        kernel.start(fd, flags)

    made = SyncBracket(start, kernel.end)
    outer = enter(made, fd, READ)
    with pytest.raises(OSError, match="no start"):
        enter(made, fd, WRITE)
    assert (made.depth, kernel.open) == (0, 0)
    (own,) = kernel.fds
    assert not is_open(own)


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), TimeoutError("by a handler of SIGALRM")])
def test_an_end_that_a_signals_handler_prevents_is_made_up_for(
    bracket: SyncBracket, kernel: Kernel, fd: int, raised: BaseException
) -> None:
    access = enter(bracket, fd, WRITE)
    kernel.write()
    kernel.interrupted = [raised]
    with pytest.raises(type(raised)):
        access.end()
    assert (bracket.depth, kernel.open, kernel.dirty) == (0, 0, False)
    (own,) = kernel.fds
    assert not is_open(own)


class InterruptedLock:
    """A lock the wait for which a signal interrupts once."""

    def __init__(self) -> None:
        self.waited = 0

    def __enter__(self) -> None:
        self.waited += 1
        if self.waited == 1:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


def test_an_end_that_a_signal_interrupts_waiting_for_another_thread_is_made_up_for(
    bracket: SyncBracket, kernel: Kernel, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, inner = enter(bracket, fd, WRITE), enter(bracket, fd, WRITE)
    monkeypatch.setattr(bracket, "_lock", InterruptedLock())
    with pytest.raises(KeyboardInterrupt):
        inner.end()
    assert bracket.depth == 1
    outer.end()
    assert kernel.seen == [("start", BOTH), ("end", BOTH)]


def test_an_access_that_is_dropped_ends(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    access = enter(bracket, fd, WRITE)
    kernel.write()
    del access
    gc.collect()
    assert (bracket.depth, kernel.open, kernel.dirty) == (0, 0, False)


# ---- fences ---------------------------------------------------------------------------------------------------------


class Poll:
    """Stands where select.poll is. `asked` has the events that were waited for, `waiting` is set meanwhile."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.polled: list[int] = []
        self.waiting = threading.Event()
        self.signalled = threading.Event()

    def register(self, fd: int, events: int) -> None:
        os.fstat(fd)
        self.polled.append(fd)
        self.asked.append(events)

    def poll(self) -> list[tuple[int, int]]:
        self.waiting.set()
        assert self.signalled.wait(30)
        os.fstat(self.polled[-1])
        return [(self.polled[-1], self.asked[-1])]


@pytest.fixture
def poll(monkeypatch: pytest.MonkeyPatch) -> Poll:
    poll = Poll()
    monkeypatch.setattr(select, "poll", lambda: poll)
    return poll


def test_who_waits_for_a_fence_keeps_nobody_from_leaving(
    bracket: SyncBracket, kernel: Kernel, fd: int, poll: Poll
) -> None:
    """The device may be waiting for that very access to end."""
    outer = enter(bracket, fd, READ)
    entered: list[Access] = []
    widening = threading.Thread(target=lambda: entered.append(enter(bracket, fd, WRITE)))
    leaving = threading.Thread(target=bracket.leave, args=[outer])
    widening.start()
    try:
        assert poll.waiting.wait(30)
        leaving.start()
        leaving.join(30)
        assert not leaving.is_alive()
        assert (bracket.depth, kernel.seen) == (0, [("start", READ), ("end", READ)])
    finally:
        poll.signalled.set()
        widening.join()
        leaving.join()
    # It was alone when the device was done: one bracket, of its own.
    assert kernel.seen[2:] == [("start", BOTH)]
    assert poll.asked == [select.POLLOUT]
    assert not is_open(poll.polled[0])
    bracket.leave(entered[0])


@pytest.mark.parametrize(("flags", "event"), [(READ, select.POLLIN), (WRITE, select.POLLOUT), (BOTH, select.POLLOUT)])
def test_readers_wait_for_writers_and_writers_for_all(
    bracket: SyncBracket, kernel: Kernel, fd: int, poll: Poll, flags: int, event: int
) -> None:
    """As the START does that follows."""
    poll.signalled.set()
    outer = enter(bracket, fd, READ)
    kernel.failures = ["start", "start"]
    with pytest.raises(OSError, match="no start"):
        enter(bracket, fd, WRITE)
    # The bracket is not open now, though somebody is inside.
    inner = enter(bracket, fd, flags)
    assert poll.asked == [select.POLLOUT, event]
    for access in (inner, outer):
        bracket.leave(access)


def test_nothing_is_waited_for_where_the_start_waits_or_there_is_none(
    bracket: SyncBracket, kernel: Kernel, fd: int, poll: Poll
) -> None:
    accesses = [enter(bracket, fd, flags) for flags in (WRITE, READ, WRITE, BOTH)]
    assert poll.asked == []
    for access in accesses:
        bracket.leave(access)


def test_without_a_descriptor_to_wait_with_the_start_waits(
    bracket: SyncBracket, kernel: Kernel, fd: int, poll: Poll, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = enter(bracket, fd, READ)
    with monkeypatch.context() as patch:
        patch.setattr(OwnedFd, "dup", lambda _: no_dup())
        inner = enter(bracket, fd, WRITE)
    assert (poll.asked, kernel.open) == ([], BOTH)
    for access in (inner, outer):
        bracket.leave(access)


# ---- threads, and other descriptors ---------------------------------------------------------------------------------


def test_threads_never_give_the_kernel_two_brackets_at_once(bracket: SyncBracket, kernel: Kernel, fd: int) -> None:
    failed: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(flags: int) -> None:
        barrier.wait()
        try:
            for _ in range(500):
                enter(bracket, fd, flags).end()
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


@pytest.fixture
def one_kernel(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """All brackets of this process are the kernel's."""
    monkeypatch.setattr(bracket_module, "SyncBracket", lambda: SyncBracket(kernel.start, kernel.end))
    return kernel


def test_descriptors_of_one_memory_have_one_bracket(one_kernel: Kernel, fd: int) -> None:
    outer = begin(fd, WRITE)
    one_kernel.write()
    # As another Buffer of the same memory does, with a descriptor that came by another way.
    with OwnedFd(os.open(f"/proc/self/fd/{fd}", os.O_RDWR)) as other:
        inner = begin(other.fileno(), READ)
    assert inner.inside is outer.inside is not None
    inner.end()
    outer.end()
    assert one_kernel.seen == [("start", BOTH), ("end", BOTH)]


def test_other_memory_has_another(one_kernel: Kernel, fd: int) -> None:
    one = begin(fd, READ)
    one_kernel.open = 0
    with OwnedFd(os.memfd_create("other")) as other_fd:
        other = begin(other_fd.fileno(), READ)
    assert other.inside is not one.inside
    one.end()
    other.end()


def test_nothing_is_kept_of_a_bracket_that_is_over(one_kernel: Kernel, fd: int) -> None:
    begin(fd, READ).end()
    status = os.fstat(fd)
    assert (status.st_dev, status.st_ino) not in bracket_module._brackets
    one_kernel.failures = ["start"]
    with pytest.raises(OSError, match="no start"):
        begin(fd, READ)
    assert not any(map(is_open, one_kernel.fds))


# ---- fork -----------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> None:
    """Fork, and have the child do `work` within 30 seconds."""
    with warnings.catch_warnings():
        # That there are threads is the point.
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_child_of_fork_counts_its_own_accesses(one_kernel: Kernel, fd: int) -> None:
    outer = begin(fd, BOTH)

    def work() -> None:
        one_kernel.seen.clear()
        begun: list[Access] = []
        thread = threading.Thread(target=lambda: begun.append(begin(fd, READ)), daemon=True)
        thread.start()
        thread.join()
        assert one_kernel.seen == [("end", BOTH), ("start", BOTH)]
        begun[0].end()
        assert one_kernel.seen == [("end", BOTH), ("start", BOTH), ("end", BOTH)]

    with bracket_module._lock:
        in_child(work)
    outer.end()
    assert one_kernel.seen == [("start", BOTH), ("end", BOTH)]


def test_a_child_ends_what_its_parent_began_though_another_thread_waits_for_a_fence(
    one_kernel: Kernel, fd: int
) -> None:
    waiting, signalled = threading.Event(), threading.Event()

    def fence() -> None:
        waiting.set()
        assert signalled.wait(60)

    def work() -> None:
        one_kernel.seen.clear()
        one_kernel.fence = lambda: None
        outer.end()
        assert one_kernel.seen == [("end", BOTH)]
        begin(fd, READ).end()

    one_kernel.fence = fence
    outer = begin(fd, READ)
    thread = threading.Thread(target=lambda: begin(fd, WRITE).end())
    thread.start()
    try:
        assert waiting.wait(30)
        in_child(work)
    finally:
        signalled.set()
        thread.join()
    outer.end()
    assert one_kernel.seen == [("start", READ), ("end", READ), ("start", BOTH), ("end", BOTH)]


def test_a_child_writes_back_though_its_parents_other_threads_are_inside(one_kernel: Kernel, fd: int) -> None:
    begun: list[Access] = []
    outer = begin(fd, BOTH)
    thread = threading.Thread(target=lambda: begun.append(begin(fd, BOTH)))
    thread.start()
    thread.join()

    def work() -> None:
        one_kernel.write()
        outer.end()
        assert not one_kernel.dirty
        assert one_kernel.memory[0] == 0x5A

    in_child(work)
    outer.end()
    begun[0].end()


def test_an_access_of_a_child_inside_one_of_its_parent_loses_nothing(one_kernel: Kernel, fd: int) -> None:
    outer = begin(fd, WRITE)

    def work() -> None:
        # Its child, in turn, has both.
        one_kernel.write(0, 1)
        inner = begin(fd, READ)
        one_kernel.write(1, 2)
        assert outer.inside is not None
        with outer.inside._lock:
            in_child(grandchild)
        inner.end()
        one_kernel.write(2, 3)
        outer.end()
        assert one_kernel.memory[:3] == b"\1\2\3"
        assert one_kernel.lost == []

    def grandchild() -> None:
        one_kernel.write(2, 4)
        innermost = begin(fd, READ)
        innermost.end()
        one_kernel.write(3, 5)
        begin(fd, WRITE).end()
        one_kernel.write(4, 6)
        thread = threading.Thread(target=outer.end, daemon=True)
        thread.start()
        thread.join()
        assert one_kernel.memory[:5] == b"\1\2\4\5\6"
        assert one_kernel.lost == []

    in_child(work)
    outer.end()


def test_what_a_child_has_inherited_is_closed_with_the_last_access(one_kernel: Kernel, fd: int) -> None:
    accesses = [begin(fd, BOTH), begin(fd, BOTH)]
    (own,) = one_kernel.fds

    def work() -> None:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            for _ in range(2):
                assert is_open(own)
                accesses.pop().end()
            gc.collect()
        assert (given, is_open(own)) == ([], False)
        one_kernel.seen.clear()
        begin(fd, READ).end()
        assert one_kernel.seen == [("start", READ), ("end", READ)]

    in_child(work)
    for access in accesses:
        access.end()
    assert not is_open(own)
