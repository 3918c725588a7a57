# SPDX-License-Identifier: MIT
"""The client for blocking programs: `Client` and its `Buffer`, with the verbs of aio.

Runs the same conversation on a thread of its own, so that signals are taken while the program does something else.
Buffer and what belongs to it are in sync_buffer.py. Nothing here speaks D-Bus or maps memory: service.py and buffer.py
do.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from udmabufd_base.fd import close_all
from udmabufd_client.info import Limits, ListedBuffer, RecoveredBuffer, Usage
from udmabufd_client.interface import preload
from udmabufd_client.inventory import AllocatorInfo, DeviceInfo, Verdict
from udmabufd_client.loop_thread import LoopThread
from udmabufd_client.memfd import HasFileno, borrowed, lend
from udmabufd_client.service import Service
from udmabufd_client.session import DEFAULT_TIMEOUT
from udmabufd_client.share import Share
from udmabufd_client.spec import SpecKeys, check_count, check_text, marshal_spec, marshal_wrap
from udmabufd_client.sync_buffer import Attachment, Buffer, Move, MoveStream

__all__ = ["Attachment", "Buffer", "Client", "Move", "MoveStream"]

T = TypeVar("T")


class Client:
    """A connection to udmabufd that blocks its callers; safe from several threads. close() ends all of its shares.

    Every call raises the exceptions of errors.py, and takes a `timeout` in seconds (None: the client's). A child
    after fork() can use neither the client nor its calls, only the descriptors and mappings: it connects anew. A
    client that is still open when the interpreter ends is closed then.

    Restarts of the service and of the bus are survived within the time of the calls that meet one. Buffers are held as
    before after the first, and after the second imported again, with their attachments; Buffer.lost and
    Attachment.ended tell of those that could not be. A call that the service took and left unanswered is repeated
    where that is safe: all that only ask, get_fd(), set_name(), attach(), detach(), and those that create buffers with
    a request_id. All others raise ServiceRestarted.
    """

    def __init__(
        self, loop: LoopThread, service: Service, on_detached: Callable[[Attachment], object] | None = None
    ) -> None:
        self._loop = loop
        self._service = service
        if on_detached is not None:
            service.attachments.on_detached = lambda attached: on_detached(Attachment(loop, service, attached))
        self._end = weakref.finalize(self, loop.stop, service.abandon)

    @classmethod
    def connect(
        cls,
        bus: str = "system",
        *,
        timeout: float = DEFAULT_TIMEOUT,
        reconnect: bool = True,
        on_reconnect: Callable[[], object] | None = None,
        on_detached: Callable[[Attachment], object] | None = None,
    ) -> Self:
        """Connect to `bus`: "system", "session" or a D-Bus address; `timeout`, in seconds, is each call's default.

        `client = Client.connect()` or `with Client.connect() as client`. Raises ServiceUnavailable.

        Without `reconnect` the loss of the bus is final. `on_reconnect` is called after each restart of the service or
        of the bus, when every buffer is held again or `lost`; `on_detached` with each Attachment that ended because
        its device is gone, or because it could not be had again after a restart: at times before the call that made
        it has returned. They run on the client's own thread, on which the client cannot be called: have them set an
        event.
        """
        preload()
        loop = LoopThread("udmabufd-client")
        try:
            opening = Service.open(bus, timeout, reconnect=reconnect, on_reconnect=on_reconnect)
            return cls(loop, loop.run(opening, Service.abandon), on_detached)
        except BaseException:
            loop.stop(lambda: None)
            raise

    @property
    def unique_name(self) -> str:
        """This connection's name on the bus."""
        return self._service.unique_name

    def allocate(
        self, spec: Mapping[str, object] | None = None, /, *, timeout: float | None = None, **keys: Unpack[SpecKeys]
    ) -> Buffer:
        """Create a buffer with memory. Keys in `spec`, as keywords, or both: see SpecKeys."""
        share = self._run(self._service.allocate(marshal_spec(spec, keys), timeout), self._service.drop)
        return Buffer(self, self._service, share)

    def allocate_many(
        self,
        count: int,
        spec: Mapping[str, object] | None = None,
        /,
        *,
        timeout: float | None = None,
        **keys: Unpack[SpecKeys],
    ) -> list[Buffer]:
        """Create `count` buffers alike in one call, all or none."""
        made = self._run(
            self._service.allocate_many(marshal_spec(spec, keys), check_count(count), timeout),
            self._drop_all,
        )
        return [Buffer(self, self._service, share) for share in made]

    def create(
        self, spec: Mapping[str, object] | None = None, /, *, timeout: float | None = None, **keys: Unpack[SpecKeys]
    ) -> Buffer:
        """Create a buffer without memory: Buffer.get_fd(), of any holder, allocates."""
        share = self._run(self._service.create(marshal_spec(spec, keys), timeout), self._service.give_back)
        return Buffer(self, self._service, share)

    def wrap(
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
        try:
            share = self._run(self._service.wrap(fds, parts, options, timeout), self._service.give_back)
        except Exception:
            # A call that was never begun has not consumed them. One that Ctrl-C interrupts may still use them.
            close_all(fds)
            raise
        return Buffer(self, self._service, share)

    def import_fd(self, fd: int | HasFileno, *, timeout: float | None = None) -> Buffer:
        """Become a holder of the buffer that `fd` is a descriptor of, however it was come by.

        `fd` is borrowed; the Buffer has a duplicate of it, or a descriptor of the memory that it has moved to since.
        Raises NoSuchBuffer for one that is not of this service, AccessDenied for one opened O_PATH or read-only,
        InvalidSpec for what is no buffer at all; OSError, ValueError.
        Not repeated when the service ends before it answers, for the share would be taken twice: ServiceRestarted.
        """
        own = borrowed(fd)
        try:
            share = self._run(self._service.import_fd(own, timeout), self._service.drop)
        except Exception:
            own.close()
            raise
        return Buffer(self, self._service, share)

    def import_ticket(self, ticket: str, *, timeout: float | None = None) -> Buffer:
        """Become a holder of another process's buffer, of which it gave the ticket (Buffer.get_ticket())."""
        share = self._run(self._service.import_ticket(check_text("ticket", ticket), timeout), self._service.give_back)
        return Buffer(self, self._service, share)

    def list_buffers(self, *, timeout: float | None = None) -> list[ListedBuffer]:
        """Return what the service says of the buffers of this user; root sees all."""
        return self._run(self._service.reports.list_buffers(timeout))

    def explain(
        self, spec: Mapping[str, object] | None = None, /, *, timeout: float | None = None, **keys: Unpack[SpecKeys]
    ) -> list[Verdict]:
        """Return what each allocator says to a spec, in the order in which they are asked; allocates nothing.

        The first that is `ok` would serve allocate(); the next one if it turns out to have run out of memory. Raises
        IncompatibleConstraints, NoSuchDevice and InvalidSpec as allocate() does.
        """
        return self._run(self._service.reports.explain(marshal_spec(spec, keys), timeout))

    def devices(self, *, timeout: float | None = None) -> list[DeviceInfo]:
        """Return the devices of this machine that import dma-bufs, with what is known of each and from where."""
        return self._run(self._service.reports.devices(timeout))

    def allocators(self, *, timeout: float | None = None) -> list[AllocatorInfo]:
        """Return the allocators in the order in which they are asked, with what each can do."""
        return self._run(self._service.reports.allocators(timeout))

    def usage(self, *, interactive: bool = False, timeout: float | None = None) -> list[Usage]:
        """Return what each user and application holds. For root, and whom polkit allows: raises AccessDenied.

        `interactive` lets a polkit agent ask the user for a password meanwhile.
        """
        return self._run(self._service.reports.usage(interactive, timeout))

    def recover(
        self, discard: bool = False, *, interactive: bool = False, timeout: float | None = None
    ) -> list[RecoveredBuffer]:
        """After a start of the service that could not read its former state: keep its buffers, or give them up.

        Return what became of each. For root, and whom polkit allows. Raises NotSupported when there is nothing to
        recover, AccessDenied; ServiceRestarted is to be followed by a look at list_buffers().
        """
        return self._run(self._service.reports.recover(discard, interactive, timeout))

    def drain(self, allocator: str, *, interactive: bool = False, timeout: float | None = None) -> None:
        """Move every buffer whose memory is of `allocator` to others. For root, and whom polkit allows.

        Raises Busy when some are held in place, MoveTimedOut when importers of all that stay did not answer: what has
        moved stays moved; NoAllocator, AccessDenied.
        """
        self._run(self._service.reports.drain(check_text("allocator", allocator), interactive, timeout))

    def limits(self, *, timeout: float | None = None) -> Limits:
        """Return the limits that apply to this user."""
        return Limits.from_properties(self.properties(timeout=timeout))

    def properties(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return every property of the allocator by its D-Bus name: limits, counters, what is available."""
        return self._run(self._service.reports.properties(timeout))

    def wait_lost(self) -> None:
        """Return when the connection to the bus is lost for the first time, or closed.

        With `reconnect` the client goes on, and `on_reconnect` tells when.
        """
        self._run(self._service.wait_lost())

    def close(self) -> None:
        """End the connection. The service takes back all shares; descriptors stay their owners'.

        Calls that other threads have under way fail with ServiceUnavailable.
        """
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The finalizer ends the connection; the constructor may have failed before there was one.
        if (end := getattr(self, "_end", None)) is not None and end.alive:
            warnings.warn(f"unclosed {type(self).__name__}", ResourceWarning, stacklevel=2, source=self)

    def _run(self, coroutine: Coroutine[Any, Any, T], dispose: Callable[[T], None] | None = None) -> T:
        return self._loop.run(coroutine, dispose)

    def _drop_all(self, unwanted: Iterable[Share]) -> None:
        for share in unwanted:
            self._service.drop(share)
