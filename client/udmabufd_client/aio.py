# SPDX-License-Identifier: MIT
"""The client for asyncio: `Client` and its `Buffer`, whose verbs are coroutines.

Blocking programs use sync, which has the same verbs. The work is done in service.py (calls) and buffer.py (memory).
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self, Unpack

from udmabufd_client.buffer import BufferBase
from udmabufd_client.info import Limits, ListedBuffer
from udmabufd_client.service import DEFAULT_TIMEOUT, Service
from udmabufd_client.spec import SpecKeys, check_count, check_text, marshal_spec


class Buffer(BufferBase):
    """A buffer whose calls of the service are coroutines. `timeout` is in seconds; None: the client's."""

    async def get_fd(self, *, timeout: float | None = None) -> int:
        """Make sure that the buffer has its descriptor, and memory behind it; return it, borrowed.

        Raises UdmabufError; ValueError when the buffer is closed.
        """
        if self._fd is None:
            return self._install(await self._service.get_fd(self._share, timeout))
        return self.fileno()

    async def get_ticket(self, *, timeout: float | None = None) -> str:
        """Return the secret with which another process becomes a holder: see Client.import_ticket()."""
        return await self._service.get_ticket(self._share, timeout)

    async def set_name(self, name: str, *, timeout: float | None = None) -> None:
        """Rename the buffer: 1 to 31 bytes of 0x20 to 0x7e, shown in the kernel's listings too."""
        await self._service.set_name(self._share, check_text("name", name), timeout)

    async def refresh(self, *, timeout: float | None = None) -> None:
        """Read the buffer's properties anew. Signals keep them fresh while this connection holds the buffer."""
        await self._service.refresh(self._share, timeout)

    async def release(self, *, timeout: float | None = None) -> None:
        """Give the share back and wait for the answer. The descriptor stays open until close()."""
        await self._service.release(self._share, timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A connection to udmabufd. It belongs to the event loop that it was made on; close() ends all of its shares.

    Every call raises the exceptions of errors.py, and takes a `timeout` in seconds (None: the client's).
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    @staticmethod
    def connect(bus: str = "system", *, timeout: float = DEFAULT_TIMEOUT) -> Connecting:
        """Connect to `bus`: "system", "session" or a D-Bus address; `timeout`, in seconds, is each call's default.

        `client = await Client.connect()` or `async with Client.connect() as client`. Raises ServiceUnavailable.
        """
        return Connecting(bus, timeout)

    @property
    def unique_name(self) -> str:
        """This connection's name on the bus."""
        return self._service.unique_name

    async def allocate(
        self, spec: Mapping[str, object] | None = None, /, *, timeout: float | None = None, **keys: Unpack[SpecKeys]
    ) -> Buffer:
        """Create a buffer with memory. Keys in `spec`, as keywords, or both: see SpecKeys."""
        share, fd = await self._service.allocate(marshal_spec(spec, keys), timeout)
        return Buffer(self._service, share, fd)

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
        return [Buffer(self._service, share, fd) for share, fd in made]

    async def create(
        self, spec: Mapping[str, object] | None = None, /, *, timeout: float | None = None, **keys: Unpack[SpecKeys]
    ) -> Buffer:
        """Create a buffer without memory: Buffer.get_fd(), of any holder, allocates."""
        return Buffer(self._service, await self._service.create(marshal_spec(spec, keys), timeout), None)

    async def import_ticket(self, ticket: str, *, timeout: float | None = None) -> Buffer:
        """Become a holder of another process's buffer, of which it gave the ticket (Buffer.get_ticket())."""
        share = await self._service.import_ticket(check_text("ticket", ticket), timeout)
        return Buffer(self._service, share, None)

    async def list_buffers(self, *, timeout: float | None = None) -> list[ListedBuffer]:
        """Return what the service says of the buffers of this user; root sees all."""
        return await self._service.list_buffers(timeout)

    async def limits(self, *, timeout: float | None = None) -> Limits:
        """Return the limits that apply to this user."""
        return Limits.from_properties(await self._service.properties(timeout))

    async def properties(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return every property of the allocator by its D-Bus name: limits, counters, what is available."""
        return await self._service.properties(timeout)

    async def wait_lost(self) -> None:
        """Return when the connection to the bus is lost. Shares are lost with it; descriptors are not."""
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

    def __init__(self, bus: str, timeout: float) -> None:
        self._bus = bus
        self._timeout = timeout
        self._client: Client | None = None

    async def _connect(self) -> Client:
        return Client(await Service.open(self._bus, self._timeout))

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
