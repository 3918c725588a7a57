# SPDX-License-Identifier: MIT
"""From an incoming call to its reply: the gate that every call passes, and the dispatch from the XML.

Every call has a known sender and is charged to its uid before its target is looked at. A body is decoded only
after its signature was found to be the one that the XML states, so that what is strange or big is refused unread.
Errors leave in one place, typed; what is unexpected is logged here and told as Failed, without its insides.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence

from udmabufd.bus.callers import Caller, CallerGone, Callers
from udmabufd.bus.objects import Call, EdgeError, Exported, Reply
from udmabufd.core.errors import AllocatorError, RateLimited
from udmabufd.core.ledger import Ledger
from udmabufd.core.limits import Limits
from udmabufd_base.connection import BUS_NAME as BUS
from udmabufd_base.connection import Connection, Incoming
from udmabufd_base.errors import BodyTooLarge, BusError, CallTimedOut, ConnectionLost, ProtocolError, QueueFull
from udmabufd_base.message import NO_REPLY_EXPECTED, Header, Message, MessageType
from udmabufd_client.contract import BUFFER_PATH_PREFIX, ERROR_PREFIX

log = logging.getLogger(__name__)

MAX_CALL_BYTES = 32 << 10
"""Largest body of a call; a spec has a few hundred bytes."""

HIGH_WATER = 1 << 20
"""Bytes of unsent replies at which no further calls are read until the bus has taken them."""


DRAIN_REPORT = 10.0
"""Seconds after which a bus that takes nothing is told of in the log, again and again."""


class Dispatcher:
    """Serves the objects of the daemon on one connection.

    `objects` has the interfaces by path; an object whose path begins with BUFFER_PATH_PREFIX has those of
    `buffer_interfaces`, which answer NoSuchBuffer to whoever is no holder.
    """

    def __init__(self, limits: Limits, ledger: Ledger, check_holder: Callable[[Call], None]) -> None:
        """`check_holder` raises NoSuchBuffer unless the caller holds a share of the buffer that the path names."""
        self._limits = limits
        self._ledger = ledger
        self._check_holder = check_holder
        self._tasks: set[asyncio.Task[None]] = set()
        self._objects: Mapping[str, Sequence[Exported]] = {}
        self._buffer_interfaces: Sequence[Exported] = ()
        self._connection: Connection | None = None
        self._callers: Callers | None = None
        # Clear while replies wait for the bus: what is being served waits, too, before it adds to them.
        self._room = asyncio.Event()
        self._room.set()
        self._stopping = False

    def export(self, objects: Mapping[str, Sequence[Exported]], buffer_interfaces: Sequence[Exported]) -> None:
        """Set what is served; before start()."""
        self._objects, self._buffer_interfaces = objects, buffer_interfaces

    def start(self, connection: Connection, callers: Callers) -> None:
        """Serve what arrives on `connection` from now on."""
        self._connection, self._callers = connection, callers

    async def stop(self, timeout: float) -> None:
        """Refuse new calls and wait up to `timeout` seconds for those under way."""
        self._stopping = True
        if self._tasks:
            await asyncio.wait(tuple(self._tasks), timeout=timeout)

    async def room(self) -> None:
        """Wait until the bus has taken enough of what was answered for more to be worth making."""
        # A loop, for the first ones woken may fill it again.
        while not self._room.is_set():
            await self._room.wait()

    def interfaces(self, path: str) -> Sequence[Exported]:
        """Return the interfaces of the object at `path`; none if there is no such object."""
        if path.startswith(BUFFER_PATH_PREFIX):
            return self._buffer_interfaces
        return self._objects.get(path, ())

    def children(self, path: str) -> list[str]:
        """Return the names below `path` that lead to an object. Buffers are nobody's children."""
        prefix = path.rstrip("/") + "/"
        below = {p.removeprefix(prefix).split("/", 1)[0] for p in self._objects if p.startswith(prefix) and p != path}
        return sorted(below)

    def on_message(self, incoming: Incoming) -> None:
        """Take a message from the connection; never blocks, never raises for what a peer did."""
        header = incoming.header
        if self._callers is None or not header.sender:
            return
        if header.type == MessageType.SIGNAL:
            self._on_signal(incoming)
        elif header.type == MessageType.METHOD_CALL:
            caller = self._callers.enter(header.sender)
            if self._stopping:
                self._refuse(header, EdgeError("ServiceUnknown", "The service is stopping"))
            elif caller.pending >= self._limits.max_calls_in_flight_per_user:
                # Before the uid is known one connection cannot have more than a user may.
                self._refuse(
                    header,
                    RateLimited(
                        f"This connection has {caller.pending} calls under way, the limit max_calls_in_flight_per_user"
                    ),
                )
            else:
                caller.pending += 1
                task = asyncio.create_task(self._serve(caller, incoming))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _on_signal(self, incoming: Incoming) -> None:
        header = incoming.header
        if (header.sender, header.member, header.signature) == (BUS, "NameOwnerChanged", "sss"):
            name, _, new_owner = incoming.body()
            if not new_owner and self._callers is not None:
                self._callers.ended(name)

    async def _serve(self, caller: Caller, incoming: Incoming) -> None:
        header = incoming.header
        try:
            holder = await caller.identify()
            with self._ledger.charge_call(holder.uid):
                await self.room()
                reply, signature = await self._invoke(Call(holder, header.path), incoming)
                await self.room()
            self._reply(header, signature, reply)
        except CallerGone:
            pass
        except (AllocatorError, EdgeError) as error:
            self._refuse(header, error)
        except BusError as error:
            log.warning("Cannot serve %s of %s: %s", header.member, header.sender, error)
            self._refuse(header, EdgeError("Failed", "The bus did not tell who is calling; try again"))
        except Exception:
            log.exception("Serving %s of %s failed", header.member, header.sender, extra={"client": header.sender})
            self._refuse(header, EdgeError("Failed", "Internal error of the service; its log has the details"))
        finally:
            caller.pending -= 1

    async def _invoke(self, call: Call, incoming: Incoming) -> tuple[Reply, str]:
        """Find the method, check and decode the arguments, call it; return reply and signature."""
        header = incoming.header
        if call.path.startswith(BUFFER_PATH_PREFIX):
            # First of all: to anyone else nothing about a buffer may show, not even which members it has.
            self._check_holder(call)
        exported = self._find(header)
        method, handler = exported.interface.methods[header.member], exported.methods[header.member]
        if header.signature != method.in_signature:
            raise EdgeError(
                "InvalidArgs",
                f"{header.member} takes {method.in_signature!r}, not {header.signature[:32]!r}",
            )
        try:
            arguments = incoming.body()
        except BodyTooLarge:
            raise EdgeError("LimitsExceeded", f"The arguments exceed {MAX_CALL_BYTES} bytes") from None
        except ProtocolError:
            raise EdgeError("InvalidArgs", "The arguments cannot be decoded") from None
        answer = handler(call, *arguments)
        reply = await answer if inspect.isawaitable(answer) else answer
        return reply, method.out_signature

    def _find(self, header: Header) -> Exported:
        interfaces = self.interfaces(header.path)
        if not interfaces:
            raise EdgeError("UnknownObject", "There is no such object")
        for exported in interfaces:
            # A call may leave the interface out.
            if header.interface in ("", exported.interface.name) and header.member in exported.methods:
                return exported
        if header.interface and header.interface not in (e.interface.name for e in interfaces):
            raise EdgeError("UnknownInterface", "The object has no such interface")
        raise EdgeError("UnknownMethod", "The interface has no such method")

    def _reply(self, header: Header, signature: str, reply: Reply) -> None:
        if header.flags & NO_REPLY_EXPECTED:
            for fd in reply.fds:
                fd.close()
            return
        message = Message(
            type=MessageType.METHOD_RETURN,
            reply_serial=header.serial,
            destination=header.sender,
            signature=signature,
            body=reply.values,
        )
        self._send(message, reply)

    def _refuse(self, header: Header, error: AllocatorError | EdgeError) -> None:
        if header.flags & NO_REPLY_EXPECTED:
            return
        name = error.error_name if isinstance(error, EdgeError) else ERROR_PREFIX + error.name
        log.debug("%s of %s: %s: %s", header.member, header.sender, name, error, extra={"client": header.sender})
        message = Message(
            type=MessageType.ERROR,
            error_name=name,
            reply_serial=header.serial,
            destination=header.sender,
            signature="s",
            body=[str(error)],
        )
        self._send(message, Reply())

    def emit(self, message: Message) -> None:
        """Send a signal; lost when the connection is, or when the bus takes nothing any more."""
        self._send(message, Reply())

    def _send(self, message: Message, reply: Reply) -> None:
        if self._connection is None:
            return
        try:
            self._connection.send(message, reply.fds)
        except ConnectionLost:
            return
        except QueueFull:
            log.warning("The bus takes nothing: a message to %s is lost", message.destination or "everyone")
        if self._connection.backlog > HIGH_WATER and self._room.is_set():
            self._room.clear()
            self._connection.pause()
            task = asyncio.create_task(self._drain(self._connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _drain(self, connection: Connection) -> None:
        """Read and serve no further calls until the bus has taken what was answered."""
        try:
            while connection.lost is None:
                with contextlib.suppress(CallTimedOut):
                    await connection.flush(DRAIN_REPORT)
                    break
                log.warning("The bus has taken nothing for %g s; %d bytes wait", DRAIN_REPORT, connection.backlog)
        except ConnectionLost:
            pass  # Whoever waits for the end of the connection will tell.
        finally:
            connection.resume()
            # Clear while replies wait for the bus: what is being served waits, too, before it adds to them.
        self._room = asyncio.Event()
        self._room.set()
