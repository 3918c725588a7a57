# SPDX-License-Identifier: MIT
"""Buffer's half that is the same in both clients: its descriptor, its mapping, its brackets, what is known of it.

Local work only. The verbs that ask the service are added by aio.Buffer (coroutines) and sync.Buffer (blocking).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from udmabufd_base.fd import OwnedFd
from udmabufd_client.attachment import Attached, AttachmentBase
from udmabufd_client.bracket import READ, WRITE, Access
from udmabufd_client.contract import Kind
from udmabufd_client.info import AttachmentInfo, BufferInfo, Plane
from udmabufd_client.mapping import Map
from udmabufd_client.memory import Memory
from udmabufd_client.notice import Notice
from udmabufd_client.service import Service
from udmabufd_client.share import Share
from udmabufd_client.slow_reads import notice
from udmabufd_client.spec import check_number

T = TypeVar("T")


class BufferBase:
    """A buffer of the service: one share of it, and its descriptor when it has memory.

    close(), also by `with`, closes the descriptor and gives the share back without waiting; release() gives the
    share back, waits for the answer and leaves the descriptor open. Descriptors that were handed on, mappings and
    arrays stay valid after either. Whoever drops a Buffer without close() gets a ResourceWarning.

    `memoryview(buffer)` works from Python 3.12 on (PEP 688); `with buffer.map() as view` and numpy.asarray(buffer)
    work everywhere. None of them brackets the access: see cpu_access().

    A buffer with a dynamic attachment can get other memory, or be evicted. The Buffer sees to it, unless it has
    `on_move` or moves(): when its maps and arrays are gone it lets the service go ahead, has those wait who want to
    map it meanwhile, and gets the new descriptor. While something is mapped the buffer stays where it is. On the event
    loop, which must not wait, mapping it raises Busy meanwhile, and ValueError after an eviction: `await get_fd()`
    waits for both.

    Of what devices and others do with a descriptor it knows nothing, and what they write after the answer is lost. So
    whoever has a device use the memory, or passes a descriptor on, has `on_move` or moves() to stop that first, or
    holds the buffer in place meanwhile: attachment.pinned(), or an attachment that is not dynamic.
    """

    def __init__(self, service: Service, share: Share, fd: OwnedFd | None = None) -> None:
        self._service = service
        self._share = share
        if fd is not None:
            share.memory.take(fd, share.info)
        self._closed = False

    # What is known

    @property
    def path(self) -> str:
        """The buffer's D-Bus object path."""
        return self._share.path

    @property
    def id(self) -> str:
        """The buffer's id, the last part of its path: 16 hexadecimal digits."""
        return self._share.id

    @property
    def info(self) -> BufferInfo:
        """What the service last said of the buffer."""
        return self._share.info

    @property
    def state(self) -> str:
        """The buffer's state (contract.State), kept fresh by the service's signals."""
        return self._share.state

    @property
    def name(self) -> str | None:
        """The buffer's name, kept fresh by the service's signals."""
        return self._share.info.name

    @property
    def size(self) -> int:
        """Bytes of the descriptor, whole pages. Raises ValueError where the service did not say."""
        size = self._share.info.size
        if size is None:
            raise ValueError(f"{self._label} has no size yet: get_fd() allocates its memory")
        return size

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Offsets and strides of an image's planes; none for a buffer that was asked for by size."""
        return self._share.info.planes

    @property
    def constraints(self) -> Mapping[str, Any] | None:
        """What the memory must be like: the merged constraints of all that are attached, and of the buffer's spec.

        Keys as in contract.CONSTRAINT_KEYS, kept fresh by the service's signals; None while it has not told of them,
        as after an import: refresh() asks.
        """
        return self._share.constraints

    @property
    def attachments(self) -> tuple[AttachmentInfo, ...] | None:
        """The devices that are attached, by whichever holder, as far as is known: refresh() reads them.

        None after an import, and from any change on, this client's own attach() and detach() included: the service
        signals a change without telling the new rows. `own_attachments` is always up to date, without asking.
        """
        return self._share.attachment_rows

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def released(self) -> bool:
        """Whether the share was given back."""
        return self._share.released

    @property
    def lost(self) -> bool:
        """Whether the share was lost in a restart of the service or of the bus, and could not be had again.

        Calls about the buffer raise NoSuchBuffer then. The descriptor, if there is one, and mappings stay valid.
        """
        return self._share.lost

    # The descriptor

    @property
    def has_fd(self) -> bool:
        """Whether the buffer has its descriptor: not while empty or evicted, nor after steal_fd() or close()."""
        return self._memory.has_fd

    def fileno(self) -> int:
        """Borrow the descriptor: it stays the buffer's, which closes it when it has moved: dup() gives one to keep.

        After an eviction the service is asked for another. Raises ValueError when there is none.
        """
        return self._present(self._had(self._memory.fileno))

    def dup(self) -> int:
        """Return a second descriptor, close-on-exec, which is the caller's to close. Raises ValueError, OSError.

        It is of the memory that the buffer has now, and holds it: the buffer is not evicted before it is closed.
        """
        fd = self._had(self._memory.spare)
        return self._present(None if fd is None else fd.steal())

    def steal_fd(self) -> int:
        """Give the descriptor away: the caller closes it. get_fd() gets the buffer another. Raises ValueError."""
        stolen = self._present(self._had(self._memory.steal))
        self._service.want_ticket_soon(self._share)
        return stolen

    # CPU access

    def map(self, *, writable: bool = True) -> Map:
        """Map the buffer: `with buffer.map() as view` gives a memoryview of all its bytes.

        All maps of a Buffer share one mapping, which the last of them drops. Raises ValueError without a descriptor,
        OSError as mmap(2) does. A map can stay for as long as one likes; but where `info.needs_sync`, what is read
        and written outside of cpu_access() may be neither what devices wrote nor what they will see.

        Blocks while the buffer is about to get other memory: MoveTimedOut when that takes longer than was told. After
        an eviction it blocks until the memory is back. See the class for event loops.
        """
        with self._in_place():
            return self._map(writable)

    @contextmanager
    def cpu_access(self, read: bool = True, write: bool = True) -> Iterator[memoryview]:
        """Access the buffer's bytes by the CPU: `with buffer.cpu_access(read=False) as view`.

        The view is writable only with `write`. On a dma-buf the access is bracketed by DMA_BUF_IOCTL_SYNC, which first
        waits for devices that still use the buffer, so it blocks: in a coroutine, call it in a thread. Whoever writes
        finds what devices wrote beside it unharmed, without `read` too. Nested and concurrent accesses share one
        bracket, those by other Buffers of the same memory included; the last one to end ends it. A memfd has none.
        `read` on write-combined or uncached memory gives a SlowReadWarning, once. Raises ValueError, OSError.
        """
        flags = (READ if read else 0) | (WRITE if write else 0)
        if not flags:
            raise ValueError("cpu_access() is for reading, for writing, or for both")
        with ExitStack() as stack:
            with self._in_place():
                view = stack.enter_context(self._map(write))
                # Of the memory of the view: as long as that is mapped, the buffer has no other.
                memory = self._memory_id() if self.info.kind == Kind.DMA_BUF else None
            if memory is None:
                yield view
                return
            access = Access()
            try:
                access.begin(memory, self._own_dup, flags)
                if read:
                    notice(self.info.cache_effective, view, self._label)
                yield view
            finally:
                access.end()

    def __buffer__(self, flags: int) -> memoryview:
        with self._in_place():
            return self._memory.mapping.export(self._own_dup, self._mapped_size)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """numpy's array protocol: the buffer as bytes, kept mapped by the array."""
        view = self.__buffer__(0)
        return {"shape": (len(view),), "typestr": "|u1", "data": view, "version": 3}

    # The end

    def close(self) -> None:
        """Close the descriptor and give the share back, without waiting for the service; harmless when repeated.

        With maps or arrays still alive there is a ResourceWarning, and their memory stays until they end.
        """
        fd, before = self._memory.end()
        self._closed = True
        if before:
            return
        self._service.give_back_soon(self._share)
        if fd is not None:
            fd.close()
        mapping = self._memory.mapping
        if mapping.mapped:
            warnings.warn(
                f"{self._label} was closed while it is mapped ({mapping.users} maps open): its memory stays "
                "until the last map and array are gone",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The constructor may have failed, so nothing is certain to be there.
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self._label}", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        size = "" if self.info.size is None else f", {self.info.size} bytes"
        return f"<{self._label}, {self.info.kind or 'no memory'}{size}{', closed' if self._closed else ''}>"

    # For the subclasses

    @property
    def _label(self) -> str:
        name = self._share.info.name
        return f"buffer {self._share.id}{f' ({name})' if name else ''}"

    def _attachment(self, given: AttachmentBase | int | None) -> Attached | int | None:
        """Return what the service is asked with. Raises InvalidSpec for what is no number."""
        if given is None or isinstance(given, AttachmentBase):
            return given._attached if given is not None else None
        return check_number("attachment", given)

    @property
    def _memory(self) -> Memory:
        return self._share.memory

    @property
    def _settled(self) -> bool:
        """Whether there is a descriptor, and its memory is not about to be given up."""
        return self._memory.has_fd and not self._memory.gate.shut

    def _when_moving(self, tell: Callable[[Notice], object] | None) -> None:
        self._share.watch.callback = tell

    def _present(self, fd: int | None) -> int:
        if fd is None:
            hint = "it is closed" if self._closed else "get_fd() gets one"
            raise ValueError(f"{self._label} has no descriptor: {hint}")
        return fd

    def _bring_back(self) -> None:
        if self._memory.away:
            self._service.descriptors.bring_back(self._share)

    def _had(self, take: Callable[[], T | None]) -> T | None:
        """Return what `take` does of the descriptor, which is brought back for it; None if there is none."""
        while True:
            self._bring_back()
            taken = take()
            # It can have been evicted between the two.
            if taken is not None or not self._memory.away:
                return taken

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Have the memory stay in the block, in which it is mapped."""
        while True:
            self._bring_back()
            with self._memory.gate.passing(self._label):
                # It can have been evicted between the two.
                if not self._memory.away:
                    yield
                    return

    def _map(self, writable: bool) -> Map:
        return Map(self._memory.mapping, self._own_dup, self._mapped_size, writable=writable, label=self._label)

    @property
    def _mapped_size(self) -> int:
        """Bytes of the memory that the descriptor is of, which need not be what the service has told of since."""
        return self._memory.size or self.size

    def _memory_id(self) -> tuple[int, int]:
        with self._memory.lock:
            status = os.fstat(self._present(self._memory.fileno()))
        return status.st_dev, status.st_ino

    def _own_dup(self) -> OwnedFd:
        # A borrowed number could be another file's by the time it is used, if another thread calls close().
        fd = self._memory.spare()
        if fd is None:
            self._present(None)
            raise AssertionError
        return fd
