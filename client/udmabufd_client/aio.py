# SPDX-License-Identifier: MIT
"""The client for asyncio: `Client` and its `Buffer`, whose verbs are coroutines.

Blocking programs use sync, which has the same verbs. Buffer and what belongs to it are in aio_buffer.py; the work is
done in service.py (calls).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self, Unpack

from udmabufd_client.aio_buffer import Attachment, Buffer, Move, MoveStream
from udmabufd_client.info import Limits, ListedBuffer, RecoveredBuffer, Usage
from udmabufd_client.interface import preload
from udmabufd_client.inventory import AllocatorInfo, DeviceInfo, Verdict
from udmabufd_client.memfd import HasFileno, borrowed, lend
from udmabufd_client.service import Service
from udmabufd_client.session import DEFAULT_TIMEOUT
from udmabufd_client.spec import SpecKeys, check_count, check_text, marshal_spec, marshal_wrap

__all__ = ["Attachment", "Buffer", "Client", "Connecting", "Move", "MoveStream"]


class Client:
    """A connection to udmabufd. It belongs to the event loop that it was made on; close() ends all of its shares.

    Every call raises the exceptions of errors.py, and takes a `timeout` in seconds (None: the client's).

    Restarts of the service and of the bus are survived within the time of the calls that meet one. Buffers are held as
    before after the first, and after the second imported again, with their attachments; Buffer.lost and
    Attachment.ended tell of those that could not be. A call that the service took and left unanswered is repeated
    where that is safe: all that only ask, get_fd(), set_name(), attach(), detach(), and those that create buffers with
    a request_id. All others raise ServiceRestarted.
    """

    def __init__(self, service: Service, on_detached: Callable[[Attachment], object] | None = None) -> None:
        self._service = service
        if on_detached is not None:
            service.attachments.on_detached = lambda attached: on_detached(Attachment(service, attached))

    @staticmethod
    def connect(
        bus: str = "system",
        *,
        timeout: float = DEFAULT_TIMEOUT,
        reconnect: bool = True,
        on_reconnect: Callable[[], object] | None = None,
        on_detached: Callable[[Attachment], object] | None = None,
    ) -> Connecting:
        """Connect to `bus`: "system", "session" or a D-Bus address; `timeout`, in seconds, is each call's default.

        `client = await Client.connect()` or `async with Client.connect() as client`. Raises ServiceUnavailable.

        Without `reconnect` the loss of the bus is final. `on_reconnect` is called after each restart of the service or
        of the bus, when every buffer is held again or `lost`; `on_detached` with each Attachment that ended because
        its device is gone, or because it could not be had again after a restart: at times before the call that made
        it has returned. They must not block, and run on the client's loop.
        """
        preload()
        return Connecting(bus, timeout, reconnect, on_reconnect, on_detached)

    @property
    def unique_name(self) -> str:
        """This connection's name on the bus."""
        return self._service.unique_name

    async def allocate(
        self, spec: Mapping[str, object] | None = None, /, *, timeout: float | None = None, **keys: Unpack[SpecKeys]
    ) -> Buffer:
        """Create a buffer with memory. Keys in `spec`, as keywords, or both: see SpecKeys."""
        return Buffer(self._service, await self._service.allocate(marshal_spec(spec, keys), timeout))

    async def allocate_many(
        self,
        count: int,
        spec: Mapping[str, object] | None = None,
        /,
        *,
        timeout: float | None = None,
        **keys: Unpack[SpecKeys],
    ) -> list[Buffer]:
        """Create `count` buffers alike in one call, all or none."""
        made = await self._service.allocate_many(marshal_spec(spec, keys), check_count(count), timeout)
        return [Buffer(self._service, share) for share in made]

    async def create(
        self, spec: Mapping[str, object] | None = None, /, *, timeout: float | None = None, **keys: Unpack[SpecKeys]
    ) -> Buffer:
        """Create a buffer without memory: Buffer.get_fd(), of any holder, allocates."""
        return Buffer(self._service, await self._service.create(marshal_spec(spec, keys), timeout))

    async def wrap(
        self,
        memfds: Sequence[int | HasFileno],
        ranges: Sequence[tuple[int, int, int]] | None = None,
        *,
        name: str | None = None,
        constraints: Mapping[str, object] | None = None,
        devices: Sequence[str] | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
    ) -> Buffer:
        """Have memory of one's own exported as one dma-buf; Buffer.get_fd() then gets its descriptor.

        `memfds` are borrowed: wrappable_memfd() makes right ones. `ranges` are the buffer's parts in order, each
        (index into memfds, offset, size in bytes); by default each memfd as a whole. `constraints` and `devices` as in
        SpecKeys: the memory is as it is, and suits them or is refused. Raises BadMemfd naming what a memfd lacks,
        NotSupported where the kernel would show stale pages and only root may wrap; OSError, ValueError.
        """
        options = marshal_wrap(name=name, constraints=constraints, devices=devices, request_id=request_id)
        fds, parts = lend(memfds, ranges)
        return Buffer(self._service, await self._service.wrap(fds, parts, options, timeout))

    async def import_fd(self, fd: int | HasFileno, *, timeout: float | None = None) -> Buffer:
        """Become a holder of the buffer that `fd` is a descriptor of, however it was come by.

        `fd` is borrowed; the Buffer has a duplicate of it, or a descriptor of the memory that it has moved to since.
        Raises NoSuchBuffer for one that is not of this service, AccessDenied for one opened O_PATH or read-only,
        InvalidSpec for what is no buffer at all; OSError, ValueError.
        Not repeated when the service ends before it answers, for the share would be taken twice: ServiceRestarted.
        """
        return Buffer(self._service, await self._service.import_fd(borrowed(fd), timeout))

    async def import_ticket(self, ticket: str, *, timeout: float | None = None) -> Buffer:
        """Become a holder of another process's buffer, of which it gave the ticket (Buffer.get_ticket())."""
        share = await self._service.import_ticket(check_text("ticket", ticket), timeout)
        return Buffer(self._service, share)

    async def list_buffers(self, *, timeout: float | None = None) -> list[ListedBuffer]:
        """Return what the service says of the buffers of this user; root sees all."""
        return await self._service.reports.list_buffers(timeout)

    async def explain(
        self, spec: Mapping[str, object] | None = None, /, *, timeout: float | None = None, **keys: Unpack[SpecKeys]
    ) -> list[Verdict]:
        """Return what each allocator says to a spec, in the order in which they are asked; allocates nothing.

        The first that is `ok` would serve allocate(); the next one if it turns out to have run out of memory. Raises
        IncompatibleConstraints, NoSuchDevice and InvalidSpec as allocate() does.
        """
        return await self._service.reports.explain(marshal_spec(spec, keys), timeout)

    async def devices(self, *, timeout: float | None = None) -> list[DeviceInfo]:
        """Return the devices of this machine that import dma-bufs, with what is known of each and from where."""
        return await self._service.reports.devices(timeout)

    async def allocators(self, *, timeout: float | None = None) -> list[AllocatorInfo]:
        """Return the allocators in the order in which they are asked, with what each can do."""
        return await self._service.reports.allocators(timeout)

    async def usage(self, *, interactive: bool = False, timeout: float | None = None) -> list[Usage]:
        """Return what each user and application holds. For root, and whom polkit allows: raises AccessDenied.

        `interactive` lets a polkit agent ask the user for a password meanwhile.
        """
        return await self._service.reports.usage(interactive, timeout)

    async def recover(
        self, discard: bool = False, *, interactive: bool = False, timeout: float | None = None
    ) -> list[RecoveredBuffer]:
        """After a start of the service that could not read its former state: keep its buffers, or give them up.

        Return what became of each. For root, and whom polkit allows. Raises NotSupported when there is nothing to
        recover, AccessDenied; ServiceRestarted is to be followed by a look at list_buffers().
        """
        return await self._service.reports.recover(discard, interactive, timeout)

    async def drain(self, allocator: str, *, interactive: bool = False, timeout: float | None = None) -> None:
        """Move every buffer whose memory is of `allocator` to others. For root, and whom polkit allows.

        Raises Busy when some are held in place, MoveTimedOut when importers of all that stay did not answer: what has
        moved stays moved; NoAllocator, AccessDenied.
        """
        await self._service.reports.drain(check_text("allocator", allocator), interactive, timeout)

    async def limits(self, *, timeout: float | None = None) -> Limits:
        """Return the limits that apply to this user."""
        return Limits.from_properties(await self._service.reports.properties(timeout))

    async def properties(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return every property of the allocator by its D-Bus name: limits, counters, what is available."""
        return await self._service.reports.properties(timeout)

    async def wait_lost(self) -> None:
        """Return when the connection to the bus is lost for the first time, or closed.

        With `reconnect` the client goes on, and `on_reconnect` tells when.
        """
        await self._service.wait_lost()

    async def close(self) -> None:
        """End the connection. The service takes back all shares; descriptors stay their owners'."""
        await self._service.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        if self._service.alive:
            warnings.warn(f"unclosed {type(self).__name__}", ResourceWarning, stacklevel=2, source=self)
            self._service.abandon_soon()


class Connecting(AbstractAsyncContextManager[Client]):
    """What Client.connect() returns: awaited it is the client, in `async with` it is closed at the end."""

    def __init__(
        self,
        bus: str,
        timeout: float,
        reconnect: bool,
        on_reconnect: Callable[[], object] | None,
        on_detached: Callable[[Attachment], object] | None,
    ) -> None:
        self._bus = bus
        self._timeout = timeout
        self._reconnect = reconnect
        self._on_reconnect = on_reconnect
        self._on_detached = on_detached
        self._client: Client | None = None

    async def _connect(self) -> Client:
        service = await Service.open(
            self._bus, self._timeout, reconnect=self._reconnect, on_reconnect=self._on_reconnect
        )
        return Client(service, self._on_detached)

    def __await__(self) -> Generator[Any, None, Client]:
        return self._connect().__await__()

    async def __aenter__(self) -> Client:
        self._client = await self._connect()
        return self._client

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._client is not None
        await self._client.close()
