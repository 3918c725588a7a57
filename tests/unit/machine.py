# SPDX-License-Identifier: MIT
"""A machine for the core to live on: what outlives the service (store, state, memory, the descriptors of clients),
and the service itself, life after life.

The memfds are real. In the place of dma-bufs, which this kernel may not have, there are pipes opened for reading and
writing: files of their own, with inode numbers, of which real descriptors are counted as the kernel counts references,
and O_PATH descriptors are not. What clients have written into either is noted beside them, and follows when the
service copies. In the place of the service manager's store there is one that keeps real duplicates, takes no open file
twice, and handles what it is sent in order, also after the sender's death.

A kill is told to happen after the n-th effect (a write into the state, a message to the store): from then on nothing
that the service still does has any effect, as if it had ended there.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.unit.devices import MadeUpDevices
from tests.unit.time_loop import InlineWorkers, at_rest
from udmabufd.core import state as state_module
from udmabufd.core.admission import Admission
from udmabufd.core.attachments import Attachment
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.custody import Custody
from udmabufd.core.identity import Identity
from udmabufd.core.lanes import C, Lanes
from udmabufd.core.ledger import Ledger, Owner
from udmabufd.core.limits import Limits
from udmabufd.core.maker import Maker
from udmabufd.core.memfd_allocator import MemfdAllocator
from udmabufd.core.memory import Memory
from udmabufd.core.moves import Notice
from udmabufd.core.moving import Moving
from udmabufd.core.placement import Placement
from udmabufd.core.pool import Pool
from udmabufd.core.service import Service
from udmabufd.core.spec import PAGE_SIZE, Request
from udmabufd.core.store import STATE_NAME
from udmabufd.core.udmabuf_allocator import Exported, UdmabufAllocator
from udmabufd.core.workers import Workers
from udmabufd.linux import cacheprobe, copy, dmabuf, fdstat, memfd, selftest, udmabuf
from udmabufd.linux.headroom import Room
from udmabufd.linux.udmabuf import Item
from udmabufd_base.fd import OwnedFd

ORDER: Final = ("udmabuf-2M", "udmabuf", "heap:*", "memfd")
"""The allocators that are enabled. Only udmabuf and memfd are there from the beginning."""

_KCMP: Final = 312
_libc = ctypes.CDLL(None, use_errno=True)


def same_file(first: int, second: int) -> bool:
    """Whether both descriptors are of the same open file (kcmp(2)), by which the service manager tells."""
    if os.uname().machine != "x86_64":
        return fdstat.look(first) == fdstat.look(second)
    result: int = _libc.syscall(_KCMP, os.getpid(), os.getpid(), 0, first, second)
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result == 0


def references(inode: int, *, path_only: bool = False) -> int:
    """Return how many descriptors of this process are of the pipe `inode`; O_PATH ones only if asked for."""
    count = 0
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 (names are wanted)
        try:
            status = os.fstat(int(name))
            # Numbers of memfds and of pipes overlap.
            if status.st_ino == inode and stat.S_ISFIFO(status.st_mode):
                count += path_only or not fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_PATH
        except OSError:
            continue
    return count


class Killed(BaseException):
    """The service was killed at this point."""


class Told(NamedTuple):
    """What an importer was told: the connection, the buffer's id, its attachment, what, and the serial."""

    client: str
    buffer: str
    attachment: int
    notice: Notice
    serial: int


Where = tuple[bool, int]
"""What holds contents: whether it is a stand-in for a dma-buf or a memfd, and its inode number."""

TORN: Final = "a part of it"
"""Contents of what a copy was begun into that did not come to its end."""


class Machine:
    """See the module. `inodes` of its dma-bufs lead to (size, inode of the memfd that each was made of); `flags` is
    what its driver was told, which may be of cache attributes only where it `honours_flags`. `contents` are what was
    written where last, "" being zeroes; `copies` the sizes of what was copied, and `copy_errors` what the next copies
    fail with. `fenced` are inodes of dma-bufs that devices write to: a byte in that pipe tells of their end.
    `told` has what importers were told by the service of any life, and `hear` is called with each of it. `began` is
    called with each new life, before it takes anything over.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.bus_id = "bus-1"
        self.available = 1 << 40
        self.stored: dict[str, list[OwnedFd]] = {}
        self.inodes: dict[int, tuple[int, int]] = {}
        self.names: dict[int, str] = {}
        self.effects: list[str] = []
        self.kill_after: int | None = None
        self.killed = False
        self.messages: list[Callable[[], None]] = []
        self.store_errors: list[OSError] = []
        self.opened: list[OwnedFd] = []
        self.devices = MadeUpDevices()
        self.honours_flags = False
        self.flags: list[int] = []
        self.contents: dict[Where, str] = {}
        self.copies: list[int] = []
        self.copy_errors: list[OSError] = []
        self.fenced: set[int] = set()
        self.told: list[Told] = []
        self.hear: Callable[[Told], None] = lambda _told: None
        self.began: Callable[[Life], None] = lambda _life: None

    def effect(self, what: str) -> None:
        """Take notice that something outside of the service has been changed; perhaps it ends now."""
        self.effects.append(what)
        if self.kill_after is not None and len(self.effects) >= self.kill_after:
            self.killed = True
            raise Killed

    def send(self, message: Callable[[], None]) -> None:
        """Have the service manager read this in a moment."""
        self.messages.append(message)
        asyncio.get_running_loop().call_soon(self.handle_messages)

    def handle_messages(self) -> None:
        """The service manager reads what it was sent."""
        for message in self.messages:
            message()
        self.messages.clear()

    def inherited(self) -> dict[str, list[OwnedFd]]:
        """Return what a new life of the service is given."""
        given = {name: [fd.dup() for fd in fds] for name, fds in self.stored.items()}
        self.opened = [fd for fds in given.values() for fd in fds]
        return given

    def close(self) -> None:
        """Let go of everything."""
        self.handle_messages()
        for fds in self.stored.values():
            for fd in fds:
                fd.close()
        self.stored.clear()

    # What the driver and the kernel answer.

    def create(self, device: int, fd: int, offset: int, size: int, flags: int, *_: object) -> OwnedFd:
        """UDMABUF_CREATE."""
        self._take(flags)
        return self.export(size, os.fstat(fd).st_ino)

    def create_list(self, device: int, items: Sequence[Item], flags: int, *_: object) -> OwnedFd:
        """UDMABUF_CREATE_LIST."""
        self._take(flags)
        return self.export(sum(item.size for item in items))

    def _take(self, flags: int) -> None:
        cache = flags & ~udmabuf.UDMABUF_FLAGS_CLOEXEC
        assert flags - cache == udmabuf.UDMABUF_FLAGS_CLOEXEC
        assert cache in ((0x02, 0x04, 0x08) if self.honours_flags else (0,))
        self.flags.append(flags)

    def fdinfo(self, fd: int) -> dmabuf.Fdinfo:
        """What fdinfo tells of a dma-buf."""
        inode = os.fstat(fd).st_ino
        return dmabuf.Fdinfo(references(inode), self.inodes[inode][0], "udmabuf", self.names.get(inode, ""), inode)

    def set_name(self, fd: int, name: str) -> None:
        """DMA_BUF_SET_NAME."""
        self.names[os.fstat(fd).st_ino] = name

    def size(self, fd: int) -> int:
        """The size of a dma-buf."""
        return self.inodes[os.fstat(fd).st_ino][0]

    def prove_free(self, fd: int) -> bool:
        """F_ADD_SEALS: refused while there is any descriptor of a dma-buf of this memfd, or a mapping."""
        own = os.fstat(fd).st_ino
        if any(backing == own and references(inode, path_only=True) for inode, (_, backing) in self.inodes.items()):
            return False
        return _prove_free(fd)

    def create_memfd(self, name: str, size: int, *, huge_page: int = 0) -> OwnedFd:
        """Remember it, too."""
        self.opened.append(_create(name, size, huge_page=huge_page))
        return self.opened[-1]

    def reopen(self, fd: int) -> OwnedFd:
        """Remember what this life of the service has open."""
        self.opened.append(_reopen(fd))
        return self.opened[-1]

    def where(self, fd: int) -> Where:
        """Return what holds the contents of a dma-buf or a memfd."""
        status = os.fstat(fd)
        if not stat.S_ISFIFO(status.st_mode):
            return False, status.st_ino
        _, backing = self.inodes[status.st_ino]
        return (False, backing) if backing else (True, status.st_ino)

    def write(self, fd: OwnedFd, contents: str) -> None:
        """A client writes through a mapping."""
        self.contents[self.where(fd.fileno())] = contents

    def read(self, fd: OwnedFd) -> str:
        """A client reads through a mapping."""
        return self.contents.get(self.where(fd.fileno()), "")

    def copy(
        self,
        source: int,
        target: int,
        size: int,
        *,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
        patience: float,
    ) -> bool:
        """In the place of linux.copy.copy."""
        assert not self.killed
        assert patience == 0, "devices were waited for before, and not in a thread"
        assert not self.busy(source)
        written = self.contents.get(self.where(source), "")
        self.contents[self.where(target)] = TORN
        if self.copy_errors:
            raise self.copy_errors.pop(0)
        if cancelled():
            return False
        for fd in (source, target):
            present = self.size(fd) if stat.S_ISFIFO(os.fstat(fd).st_mode) else os.fstat(fd).st_size
            assert size <= present
        self.contents[self.where(target)] = written
        self.copies.append(size)
        progress(size)
        return True

    def busy(self, fd: int) -> bool:
        """In the place of linux.copy.busy."""
        return fdstat.look(fd).inode in self.fenced

    def tell(self, buffer: Buffer, attachment: Attachment, notice: Notice, serial: int, timeout_ms: int) -> None:
        """A signal of Buffer1 goes out."""
        if self.killed:
            return
        assert (timeout_ms == self.limits.move_timeout_msec) == (notice in (Notice.MOVE, Notice.EVICT))
        self.told.append(Told(attachment.holder.name, buffer.id, attachment.number, notice, serial))
        self.hear(self.told[-1])

    def export(self, size: int, backing: int = 0) -> OwnedFd:
        """Make a dma-buf of the memfd with the inode `backing`, or of other memory."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            fd = OwnedFd(os.open(f"/proc/self/fd/{reader}", os.O_RDWR | os.O_CLOEXEC))
        finally:
            os.close(reader)
            os.close(writer)
        inode = os.fstat(fd.fileno()).st_ino
        self.inodes[inode] = size, backing
        self.opened.append(fd)
        return fd


_create, _prove_free, _reopen = memfd.create, memfd.prove_free, memfd.reopen


class FakeStore:
    """One life's way to the store of `machine`."""

    enabled = True

    def __init__(self, machine: Machine, delay: Callable[[], float]) -> None:
        self._machine = machine
        self._delay = delay
        self._taken = set(machine.stored)

    def take_name(self) -> str:
        """The first name that is free."""
        name = next(name for number in range(1000) if (name := f"{number:03}") not in self._taken)
        self._taken.add(name)
        return name

    async def put(self, name: str, fds: Sequence[OwnedFd], uid: int) -> None:
        """FDSTORE=1."""
        machine = self._machine
        await asyncio.sleep(self._delay())
        if machine.killed:
            raise Killed
        if machine.store_errors:
            raise machine.store_errors.pop(0)
        sent = [fd.dup() for fd in fds]

        def take() -> None:
            for fd in sent:
                there = [old for stored in machine.stored.values() for old in stored]
                if any(same_file(fd.fileno(), old.fileno()) for old in there):
                    fd.close()
                else:
                    machine.stored.setdefault(name, []).append(fd)

        machine.send(take)
        machine.effect(f"put {name}")

    def drop(self, name: str) -> None:
        """FDSTOREREMOVE=1."""
        machine = self._machine
        if machine.killed:
            return

        def remove() -> None:
            for fd in machine.stored.pop(name, []):
                fd.close()

        machine.send(remove)
        self._taken.discard(name)
        machine.effect(f"drop {name}")

    async def settled(self, name: str | None = None) -> None:
        """BARRIER=1."""
        await asyncio.sleep(self._delay())
        if self._machine.killed:
            raise Killed
        self._machine.handle_messages()


class _Syscalls:
    """In the place of `os` in core.state."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Count it."""
        if self._machine.killed:
            raise Killed
        written = os.pwrite(fd, data, offset)
        self._machine.effect(f"pwrite {len(data)} at {offset}")
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class Life:
    """The service from a start to its end. `delay` gives the seconds that each thing takes which takes any."""

    def __init__(
        self, machine: Machine, delay: Callable[[], float] = lambda: 0.0, prover: Workers | None = None
    ) -> None:
        self.machine = machine
        self.made: list[Memory] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_unless_killed)
        self.workers = InlineWorkers(delay)
        self.store = FakeStore(machine, delay)
        self.ledger = Ledger(machine.limits, loop.time)
        self.udmabuf = _Udmabuf(self.made)
        self.pool = Pool(ORDER, [self.udmabuf, _Memfd(self.made)])
        self.identity = Identity()
        # Whom the former life had told that it wants to know, has forgotten it.
        machine.devices.watched.clear()
        self._inherited = machine.inherited()
        before = set(self._inherited.get(STATE_NAME, ()))
        self.custody = Custody(
            self.ledger,
            machine.limits.max_buffers,
            self.store,
            self.workers,
            prover or self.workers,
            self._inherited,
            self.udmabuf.maps,
        )
        self._state = self.custody.registry.recorder.state
        assert len(before) <= 1
        admission = Admission(
            lambda beside: Room(machine.available - beside, "memory.max of a.slice", 1 << 40, beside), lambda: 1 << 20
        )
        maker = Maker(self.custody, admission, self.store, self.workers)
        placement = Placement(self.pool, machine.devices)
        moving = Moving(
            self.custody,
            maker,
            placement,
            self.udmabuf,
            self.store,
            self.workers,
            self.workers,
            machine.limits.move_timeout_msec,
        )
        maker.relieve = moving.evict_idle
        self.service = Service(
            machine.limits, self.ledger, placement, self.udmabuf, self.custody, maker, self.identity, moving
        )
        self.service._wrapping._lanes = _InlineLanes(self.workers)
        moving.moves.tell = machine.tell
        self.holders: dict[str, Holder] = {}

    @classmethod
    async def begin(
        cls,
        machine: Machine,
        names: Sequence[str] = (),
        delay: Callable[[], float] = lambda: 0.0,
        prover: Workers | None = None,
    ) -> Life:
        """Start the service while the bus has the connections `names`."""
        machine.killed = False
        life = cls(machine, delay, prover)
        machine.began(life)
        life.udmabuf.probe()
        with pipe_identity() as fd:
            life.identity.learn_dma_buf(fdstat.look(fd).device)
        await life.custody.start()
        life.holders = {holder.name: holder for holder in life.custody.connected(machine.bus_id, names)}
        await life.service.attaching.resume()
        life.service.moving.moves.resume()
        return life

    def holder(self, name: str, uid: int, application: str = "") -> Holder:
        """Return the connection `name`."""
        return self.holders.setdefault(name, Holder(name, Owner(uid, application)))

    def left_open(self) -> list[OwnedFd]:
        """Return what the service has open that is neither of a buffer nor its state; nothing, when it is at rest."""
        registry = self.custody.registry
        memories = [buffer.memory for buffer in registry if buffer.memory is not None]
        owned = {id(fd) for memory in memories for fd in (memory.memfd, memory.dma_buf)}
        owned.add(id(registry.recorder.state.fd))
        self.machine.opened = [fd for fd in self.machine.opened if not fd.closed]
        return [fd for fd in self.machine.opened if id(fd) not in owned]

    async def kill(self) -> None:
        """SIGKILL: nothing that is still to be done is done."""
        self.machine.killed = True
        self.machine.kill_after = None
        self.workers.stopped = True
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for timer in self.custody._timers.values():
            timer.cancel()
        await at_rest()
        for memory in self.made:
            memory.close()
        # With a process end all of its descriptors, whoever had them.
        for fd in self.machine.opened:
            fd.close()
        for buffer in self.custody.registry:
            if buffer.memory is not None:
                buffer.memory.close()
        for fds in self._inherited.values():
            for fd in fds:
                fd.close()
        if self.custody._former is not None:
            self.custody._former.close()
        self.custody.registry.recorder.state.close()
        self._state.close()
        self.udmabuf.close()
        self.machine.handle_messages()

    async def end(self) -> None:
        """`systemctl stop`, for the next life."""
        await self.custody.close()
        self.udmabuf.close()
        for fd in self.machine.opened:
            fd.close()
        self.machine.handle_messages()


def _unless_killed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), Killed):
        loop.default_exception_handler(context)


class _InlineLanes(Lanes):
    """Without threads; what is wrapped here hangs for nobody."""

    def __init__(self, workers: InlineWorkers) -> None:
        super().__init__()
        self._workers = workers

    async def run(self, uid: int, job: Callable[[], Sequence[C]]) -> Sequence[C]:
        """Do `job` on the loop."""
        return await self._workers.submit(job)


class _Udmabuf(UdmabufAllocator):
    def __init__(self, made: list[Memory]) -> None:
        super().__init__(Path("/dev/null"), Path("/nonexistent"))
        self._made = made

    def allocate(self, *args: Any, **kwargs: Any) -> Memory:
        self._made.append(super().allocate(*args, **kwargs))
        return self._made[-1]

    def export_list(self, items: Sequence[Item], request: Request | None = None) -> Exported:
        return super().export_list(items, request)

    def _limits(self) -> udmabuf.Limits:
        return udmabuf.DEFAULT_LIMITS


class _Memfd(MemfdAllocator):
    def __init__(self, made: list[Memory]) -> None:
        super().__init__(1 << 40)
        self._made = made

    def allocate(self, *args: Any, **kwargs: Any) -> Memory:
        self._made.append(super().allocate(*args, **kwargs))
        return self._made[-1]


@contextmanager
def pipe_identity() -> Iterator[int]:
    """A pipe, to know others by."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        yield reader
    finally:
        os.close(reader)
        os.close(writer)


def install(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Put `machine` in the place of the kernel's udmabuf and of the state's system calls."""
    patch.setattr(udmabuf, "create", machine.create)
    patch.setattr(udmabuf, "create_list", machine.create_list)
    patch.setattr(selftest, "check", lambda device: "udmabuf")
    patch.setattr(cacheprobe, "honours_cache_flags", lambda device: machine.honours_flags)
    patch.setattr(selftest, "single_fallocate_flaw", lambda device: False)
    patch.setattr(dmabuf, "set_name", machine.set_name)
    patch.setattr(dmabuf, "fdinfo", machine.fdinfo)
    patch.setattr(dmabuf, "size", machine.size)
    patch.setattr(memfd, "prove_free", machine.prove_free)
    patch.setattr(memfd, "reopen", machine.reopen)
    patch.setattr(memfd, "create", machine.create_memfd)
    patch.setattr(copy, "copy", machine.copy)
    patch.setattr(copy, "busy", machine.busy)
    patch.setattr(state_module, "os", _Syscalls(machine))


@contextmanager
def patched(machine: Machine) -> Iterator[None]:
    """Have `machine` in the kernel's place for a while."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, machine)
        yield


def clients_memfd(size: int = PAGE_SIZE) -> OwnedFd:
    """A memfd as a client makes one to wrap: every page written, sealed."""
    fd = _create("clients", size)
    os.pwrite(fd.fileno(), b"\1" * size, 0)
    memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_SEAL)
    return fd


def path_of(fd: OwnedFd) -> OwnedFd:
    """Open the file of `fd` O_PATH."""
    return OwnedFd(os.open(f"/proc/self/fd/{fd.fileno()}", os.O_PATH | os.O_CLOEXEC))
