# SPDX-License-Identifier: MIT
"""From an incoming call to its reply: the gate that every call passes, and the dispatch from the XML.

Every call has a known sender and is charged to its owner before its target is looked at. A body is decoded only
after its signature was found to be the one that the XML states, so that what is strange or big is refused unread.
Descriptors are received for the members alone that take some, and handed out only to who reads what it is sent.
Errors leave in one place, typed; what is unexpected is logged here and told as Failed, without its insides.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final
from weakref import WeakValueDictionary

from udmabufd.bus.arguments import arguments_of, descriptors_in, descriptors_out
from udmabufd.bus.callers import Caller, CallerGone, Callers
from udmabufd.bus.flow import Flow
from udmabufd.bus.intake import Intake
from udmabufd.bus.objects import Call, EdgeError, Exported, Handler, Reply
from udmabufd.core import events
from udmabufd.core.buffer import Holder
from udmabufd.core.closer import Closer
from udmabufd.core.errors import AllocatorError, RateLimited
from udmabufd.core.ledger import Ledger, Resource
from udmabufd.core.limits import Limits
from udmabufd_base.connection import BUS_NAME as BUS
from udmabufd_base.connection import Connection, Incoming
from udmabufd_base.errors import BusError, CallTimedOut, ConnectionLost, QueueFull
from udmabufd_base.fd import OwnedFd
from udmabufd_base.interface import Method
from udmabufd_base.message import NO_REPLY_EXPECTED, Header, Message, MessageType
from udmabufd_client.contract import BUFFER_PATH_PREFIX, ERROR_PREFIX

log = logging.getLogger(__name__)

ALLOW_INTERACTIVE_AUTHORIZATION: Final = 4
"""Flag of a call whose caller can wait for a password (D-Bus specification, message format)."""

HIGH_WATER = 1 << 20
"""Bytes of unsent replies at which no further calls are read until the bus has taken them."""


AT_ONCE = 16
"""Calls of one user that make or hand out memory at the same time; further ones wait: users take turns at that."""

_COPYING = frozenset({"Move", "Evict"})
"""Members that take their turn, too, though no descriptor goes with them."""

DRAIN_REPORT = 10.0
"""Seconds after which a bus that takes nothing is told of in the log, again and again."""


class Dispatcher:
    """Serves the objects of the daemon on one connection.

    `objects` has the interfaces by path; an object whose path begins with BUFFER_PATH_PREFIX has those of
    `buffer_interfaces`, which answer NoSuchBuffer to whoever is no holder.
    """

    def __init__(
        self,
        limits: Limits,
        ledger: Ledger,
        closer: Closer,
        check_holder: Callable[[Call], None],
        still: Callable[[Call], Awaitable[None]],
    ) -> None:
        """`closer` gets the descriptors of callers; `check_holder` raises NoSuchBuffer unless the caller holds a share
        of the buffer that the path names; `still` waits until that buffer does not move, and raises the same.
        """
        self._limits = limits
        self._ledger = ledger
        self._intake = Intake(closer, self._uid_of)
        self._check_holder = check_holder
        self._still = still
        self._flow: Flow | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()
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

    def watch(self, connection: Connection, callers: Callers) -> None:
        """Tell `callers` of connections that end, from now on."""
        self._connection, self._callers = connection, callers

    def start(self, flow: Flow) -> None:
        """Serve calls from now on."""
        self._flow = flow

    def wants_fds(self, header: Header) -> bool:
        """Whether the descriptors of a message are to be received: those of the bus itself, and those of a call that
        takes some and whose caller has not too many that do not close.
        """
        if header.type == MessageType.METHOD_RETURN:
            return header.sender == BUS
        if header.type != MessageType.METHOD_CALL or header.flags & NO_REPLY_EXPECTED:
            return False
        try:
            exported = self._find(header)
        except EdgeError:
            return False
        method = exported.interface.methods[header.member]
        if header.signature != method.in_signature or header.unix_fds > descriptors_in(method):
            return False
        return self._intake.admits(header.sender, header.unix_fds)

    def discard(self, header: Header, fds: Sequence[OwnedFd]) -> None:
        """Close descriptors that nobody has taken."""
        self._intake.discard(header.sender, fds)

    def _uid_of(self, name: str) -> int | None:
        holder = None if self._callers is None else self._callers.find(name)
        return None if holder is None else holder.uid

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
            if self._stopping or self._flow is None:
                self._refuse(header, EdgeError("ServiceUnknown", "The service is starting or stopping; try again"))
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
                self._intake.hold(header.sender, incoming.fds)
                task = asyncio.create_task(self._serve(caller, incoming, incoming.take_fds()))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _on_signal(self, incoming: Incoming) -> None:
        header = incoming.header
        if (header.sender, header.member, header.signature) == (BUS, "NameOwnerChanged", "sss"):
            name, _, new_owner = incoming.body()
            if not new_owner and self._callers is not None:
                self._callers.ended(name)
                if self._flow is not None:
                    self._flow.ended(name)

    async def _serve(self, caller: Caller, incoming: Incoming, fds: list[OwnedFd]) -> None:
        header = incoming.header
        holder: Holder | None = None
        try:
            holder = await caller.identify()
            with self._ledger.charge_call(holder.owner):
                await self.room()
                call = Call(holder, header.path, fds, bool(header.flags & ALLOW_INTERACTIVE_AUTHORIZATION))
                await self._answer(call, incoming)
        except CallerGone:
            pass
        except (AllocatorError, EdgeError) as error:
            if holder is not None and isinstance(error, AllocatorError):
                self._note(error, holder, header.member)
            self._refuse(header, error)
        except BusError as error:
            log.warning("Cannot serve %s of %s: %s", header.member, header.sender, error)
            self._refuse(header, EdgeError("Failed", "The bus did not tell who is calling; try again"))
        except Exception:
            log.exception("Serving %s of %s failed", header.member, header.sender, extra={"client": header.sender})
            self._refuse(header, EdgeError("Failed", "Internal error of the service; its log has the details"))
        finally:
            caller.pending -= 1
            self._intake.let_go(header.sender, fds, None if holder is None else holder.uid)

    async def _answer(self, call: Call, incoming: Incoming) -> None:
        """Find the method, call it and send what it returns."""
        header = incoming.header
        if call.path.startswith(BUFFER_PATH_PREFIX):
            # First of all: to anyone else nothing about a buffer may show, not even which members it has.
            self._check_holder(call)
        exported = self._find(header)
        method, handler = exported.interface.methods[header.member], exported.methods[header.member]
        arguments = arguments_of(method, incoming, len(call.fds))
        count = 0 if header.flags & NO_REPLY_EXPECTED else descriptors_out(method)
        if not count:
            reply = await self._call(method, handler, call, arguments)
            await self.room()
            self._reply(header, method.out_signature, reply)
            return
        assert self._flow is not None
        holder = call.holder
        if call.path.startswith(BUFFER_PATH_PREFIX):
            # Before it is a call's turn: one buffer that moves again and again would keep its users from all others.
            await self._still(call)
        # Before anything is made: to somebody who does not read nothing need be given.
        await self._flow.wait(holder.name, holder.uid, count)
        sent = 0
        try:
            with self._ledger.charge(holder.owner, Resource.FDS, count):
                # What is made goes out at once: a signal that it is to be let go of may not come before it.
                reply = await self._call(method, handler, call, arguments)
                sent = len(reply.fds)
                self._reply(header, method.out_signature, reply)
        finally:
            self._flow.sent(holder.name, sent, count)

    async def _call(self, method: Method, handler: Handler, call: Call, arguments: list[Any]) -> Reply:
        """Call the handler: where memory is made or handed on, when it is its user's turn."""
        async with AsyncExitStack() as turn:
            if descriptors_in(method) or descriptors_out(method) or method.name in _COPYING:
                await turn.enter_async_context(self._turns.setdefault(call.holder.uid, asyncio.Semaphore(AT_ONCE)))
                await self.room()
            answer = handler(call, *arguments)
            return await answer if inspect.isawaitable(answer) else answer

    def _note(self, error: AllocatorError, holder: Holder, member: str) -> None:
        """Count a refusal, and tell the journal of it."""
        if error.scarce:
            self._ledger.refused(holder.owner)
        uid, application = holder.owner
        events.refused(log, error, uid=uid, application=application, client=holder.name, member=member)

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
        if reply.sent is not None:
            reply.sent()

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
                events.emit(log, events.Event.BUS_SLOW, seconds=DRAIN_REPORT, count=connection.backlog)
        except ConnectionLost:
            pass  # Whoever waits for the end of the connection will tell.
        finally:
            connection.resume()
            self._room.set()
