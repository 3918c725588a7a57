# SPDX-License-Identifier: MIT
"""Buffer, Attachment and Move for asyncio: their verbs are coroutines. aio.Client makes them.

The work is done in service.py (calls) and buffer.py (memory).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from udmabufd_client.attachment import Attached, AttachmentBase
from udmabufd_client.buffer import BufferBase
from udmabufd_client.errors import CallTimedOut
from udmabufd_client.notice import UNREAD_MAX, MoveBase, Notice
from udmabufd_client.service import Service
from udmabufd_client.share import Share
from udmabufd_client.spec import check_text, marshal_attach, marshal_move


class Attachment(AttachmentBase):
    """An attachment whose calls of the service are coroutines; `async with` detaches at its end."""

    def __init__(self, service: Service, attached: Attached) -> None:
        super().__init__(attached)
        self._service = service

    async def detach(self, *, timeout: float | None = None) -> None:
        """End it: the buffer's memory need no longer suit the device. Harmless when repeated. Raises UdmabufError."""
        await self._service.attachments.detach(self._attached, timeout)

    async def pin(self, *, timeout: float | None = None) -> None:
        """Hold the buffer in place until unpin(), or the attachment's end: it is neither moved nor evicted.

        Counted; waits while it is being moved. Raises InvalidSpec when the attachment has ended; UdmabufError.
        """
        await self._service.pins.pin(self._attached, self._service.countdown(timeout))

    async def unpin(self, *, timeout: float | None = None) -> None:
        """Take back one pin(). Nothing when the attachment has ended; InvalidSpec when there is none; UdmabufError."""
        await self._service.pins.unpin(self._attached, self._service.countdown(timeout))

    @asynccontextmanager
    async def pinned(self, *, timeout: float | None = None) -> AsyncIterator[Self]:
        """Hold the buffer in place in a block: `async with attachment.pinned()`."""
        await self.pin(timeout=timeout)
        try:
            yield self
        finally:
            await self.unpin(timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.detach()


class Move(MoveBase):
    """A move, or an eviction, that is asked for on asyncio."""

    def __init__(self, service: Service, notice: Notice) -> None:
        super().__init__(notice)
        self._service = service

    @property
    def attachment(self) -> Attachment:
        """The Buffer's dynamic attachment, the first of them if there are several: one answer is for all.

        Where it has none itself it is that of another Buffer of the same memory, which answers for this client.
        """
        return Attachment(self._service, self._notice.asked)

    def ready(self) -> Awaitable[None]:
        """Say that the importer has stopped using the memory; to be called on the loop, harmless when repeated.

        Takes effect at once, but the service is told only when all maps and arrays of the buffer in this process are
        gone, too, and other Buffers of it on this client are ready. Awaited, it returns then, or when it is over; at
        once while another Buffer is not ready.
        """
        self._notice.ready()
        return asyncio.shield(self._notice.sent)

    async def done(self, *, timeout: float | None = None) -> str:
        """Wait for the end, `timeout` seconds at most (None: as long as it takes), and return it.

        `moved`: the Buffer has the descriptor of the new memory; `evicted`: it has none until its next use;
        `cancelled`: everything is as before. Raises CallTimedOut.
        """
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(self._notice.finished)
        except TimeoutError:
            raise CallTimedOut(f"{self!r} was not over within {timeout:g} s.") from None


class MoveStream:
    """What Buffer.moves() returns: `async for move in buffer.moves()`. While it is referred to, it is asked."""

    def __init__(self, service: Service, share: Share) -> None:
        self._service = service
        self._share = share
        self._queue: asyncio.Queue[Notice | None] = asyncio.Queue()
        share.watch.add(self)

    def put(self, notice: Notice | None) -> None:
        """Take a notice; None at the end."""
        if self._queue.qsize() == UNREAD_MAX:
            self._queue.get_nowait()
        self._queue.put_nowait(notice)

    def close(self) -> None:
        """Be asked no longer: the iteration ends, and from then on the Buffer answers by itself."""
        self._share.watch.remove(self)
        self._queue.put_nowait(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Move:
        notice = await self._queue.get()
        if notice is None:
            self._queue.put_nowait(None)
            raise StopAsyncIteration
        return Move(self._service, notice)


class Buffer(BufferBase):
    """A buffer whose calls of the service are coroutines. `timeout` is in seconds; None: the client's."""

    _on_move: Callable[[Move], object] | None = None

    async def get_fd(self, *, attachment: AttachmentBase | int | None = None, timeout: float | None = None) -> int:
        """Make sure that the buffer has its descriptor, and memory behind it; return it, borrowed.

        `attachment`, of this buffer, says which device it is for: then the service is asked in any case, and refuses
        when that attachment has ended (InvalidSpec). Waits while the memory is given up, and brings back what was
        evicted. Raises UdmabufError; ValueError when the buffer is closed.
        """
        if not self._settled or attachment is not None:
            left = self._service.countdown(timeout)
            await self._service.descriptors.obtain(self._share, self._attachment(attachment), left)
        return self._present(self._memory.fileno())

    async def attach(
        self,
        device: str,
        constraints: Mapping[str, object] | None = None,
        dynamic: bool = False,
        *,
        timeout: float | None = None,
    ) -> Attachment:
        """Say that `device` (a device node, sysfs path or subsystem:name) will touch the buffer.

        Before there is memory nothing is allocated, and the answer comes at once. `constraints` are what the device
        needs beside what the service knows of it, keys as in contract.CONSTRAINT_KEYS. Raises IncompatibleConstraints
        and NoAllocator when no memory suits all that are attached, NoSuchDevice, InvalidSpec; the buffer is as before
        then.

        With `dynamic` the importer can be told to use other memory: see the class. When the memory that the buffer has
        does not suit, it is moved, if all that is attached is dynamic and not pinned, and nobody has a descriptor
        without a dynamic attachment; Busy otherwise, and when it is still mapped in this process after 10 s.
        MoveTimedOut when another importer did not answer. As with move(), this client is not asked: importers of its
        own stop before the call, and where `info.serial` is another one afterwards take the descriptor anew.
        """
        options = marshal_attach(constraints=constraints, dynamic=dynamic or None)
        attached = await self._service.own_moves.attach(
            self._share, check_text("device", device), options, self._service.countdown(timeout)
        )
        return Attachment(self._service, attached)

    @property
    def own_attachments(self) -> tuple[Attachment, ...]:
        """What this Buffer has attached and has not ended: by attach(), or by `devices` of its spec, in that order."""
        return tuple(Attachment(self._service, attached) for attached in self._share.attachments)

    async def move(self, allocator: str | None = None, *, timeout: float | None = None) -> int:
        """Give the buffer other memory, with the same contents: of `allocator`, or of the first that matches.

        Return the serial that it has then. Waits, 10 s at most, until nobody in this process has it mapped. The call
        is this client's own answer: neither `on_move` nor moves() of any Buffer of it is asked. Raises
        Busy when something holds it in place, such as a map here, MoveTimedOut when an importer did not answer,
        NoAllocator, NotSupported; ServiceRestarted where whether it moved is to be seen by `info.serial`.
        """
        options = marshal_move(allocator=allocator)
        return await self._service.own_moves.move(self._share, options, self._service.countdown(timeout))

    async def evict(self, *, timeout: float | None = None) -> None:
        """Free the memory until somebody needs it: its contents can be swapped out meanwhile.

        The Buffer's own descriptor is closed on the way, which takes a dynamic attachment. Raises Busy when something
        holds it, such as a map or a dup() somewhere, MoveTimedOut, NotSupported.
        """
        await self._service.own_moves.evict(self._share, self._service.countdown(timeout))

    @property
    def on_move(self) -> Callable[[Move], object] | None:
        """Called with a Move before the memory is given up, which then waits for its ready(); can be a coroutine.

        Runs on the client's loop. Without it, and without moves(), the Buffer answers by itself. If it raises, or
        never calls ready(), the move is cancelled when its time is over. Not called for this client's own move() and
        attach().
        """
        return self._on_move

    @on_move.setter
    def on_move(self, callback: Callable[[Move], object] | None) -> None:
        self._on_move = callback
        service = self._service

        def tell(notice: Notice) -> None:
            assert callback is not None
            answer = callback(Move(service, notice))
            if isinstance(answer, Coroutine):
                service.session.background.start(answer)

        self._when_moving(None if callback is None else tell)

    def moves(self) -> MoveStream:
        """Return the moves to come: `async for move in buffer.moves()`, each to be answered by `await move.ready()`.

        From now on, and while the stream is referred to, the Buffer does not answer by itself. It ends with the share
        and with the client. Not asked about this client's own move() and attach().
        """
        return MoveStream(self._service, self._share)

    async def get_ticket(self, *, timeout: float | None = None) -> str:
        """Return the secret with which another process becomes a holder: see Client.import_ticket()."""
        return await self._service.descriptors.get_ticket(self._share, timeout)

    async def set_name(self, name: str, *, timeout: float | None = None) -> None:
        """Rename the buffer: 1 to 31 bytes of 0x20 to 0x7e, shown in the kernel's listings too."""
        await self._service.set_name(self._share, check_text("name", name), timeout)

    async def refresh(self, *, timeout: float | None = None) -> None:
        """Read the buffer's properties anew: `attachments` above all, for signals keep all others fresh while this
        connection holds the buffer. `attachments` stays None if they change again and again meanwhile.
        """
        await self._service.refresh(self._share, timeout)

    async def release(self, *, timeout: float | None = None) -> None:
        """Give the share back and wait for the answer. The descriptor stays open until close().

        After ServiceRestarted nothing is left to be done: the client gives the share back by itself if need be.
        """
        await self._service.release(self._share, timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
