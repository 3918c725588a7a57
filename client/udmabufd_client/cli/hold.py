# SPDX-License-Identifier: MIT
"""Hold a buffer until somebody ends it, in the foreground or as a process of its own; and ask such a holder to end,
for its buffer's ticket, or what is attached to it.

A holder listens on an abstract Unix socket that is named after its buffer: nothing to clean up, no file to forge, no
pid that could be somebody else's by now. Each end looks at the other's user as the kernel gives it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from udmabufd_client.aio import Attachment, Buffer, Client, Move
from udmabufd_client.cli.alloc import report
from udmabufd_client.cli.show import described
from udmabufd_client.cli.signals import heeded
from udmabufd_client.cli.text import printable
from udmabufd_client.errors import (
    AccessDenied,
    CallTimedOut,
    NoSuchBuffer,
    RemoteFailure,
    ServiceUnavailable,
    UdmabufError,
)
from udmabufd_client.notice import EVICTED, MOVED

_REQUEST: Final = b"release\n"
_RELEASED: Final = b"released\n"
_TICKET_REQUEST: Final = b"ticket\n"
_TICKET: Final = re.compile(rb"ticket ([0-9a-f]{32})\n")
_DEMANDS_REQUEST: Final = b"demands\n"
_LONGEST: Final = 512
_LONGEST_DEMANDS: Final = 256 << 10
"""Bytes of the longest answers that are read: 64 attachments take some 100 KiB, at 256 characters for each device."""


def in_foreground(arguments: argparse.Namespace, spec: Mapping[str, object]) -> int:
    """Hold a buffer until a signal or a request; return the exit status."""

    def shown(what: dict[str, Any]) -> None:
        report(arguments, what, sys.stdout)
        if not arguments.json:
            print(f"Holding it; Ctrl-C or 'udmabufctl release {what['id']}' ends it.", file=sys.stderr, flush=True)

    asyncio.run(_hold(arguments, spec, shown))
    return 0


def in_background(arguments: argparse.Namespace, spec: Mapping[str, object]) -> int:
    """Leave a process that holds a buffer, show both, and return the exit status."""
    reading, writing = os.pipe()
    # There are no threads yet, and no loop: the one state in which fork() is safe.
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _be_the_holder(arguments, spec, writing)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        try:
            said = pipe.read()
        except KeyboardInterrupt:
            os.kill(pid, signal.SIGTERM)
            raise
    told = json.loads(said) if said else {"error": "The holder ended before it had a buffer."}
    if "error" in told:
        os.waitpid(pid, 0)
        raise RemoteFailure(told["error"])
    report(arguments, told, sys.stdout)
    if not arguments.json:
        print(f"Process {pid} holds it; 'udmabufctl release {told['id']}' ends it.", file=sys.stderr)
    return 0


def ask_holder(buffer_id: str, timeout: float) -> None:
    """Make the holder of a buffer release it; return when it has.

    Raises NoSuchBuffer when there is no holder, AccessDenied, CallTimedOut, RemoteFailure with the holder's reason.
    """
    answer = _ask(buffer_id, _REQUEST, timeout)
    if answer != _RELEASED:
        raise RemoteFailure(f"The holder of {buffer_id} did not release it: {_reason(answer)}.")


def ask_ticket(buffer_id: str, timeout: float) -> str:
    """Return the ticket of the buffer that a holder has, with which this user can take a share of it.

    Raises as ask_holder() does.
    """
    answer = _ask(buffer_id, _TICKET_REQUEST, timeout)
    told = _TICKET.fullmatch(answer)
    if told is None:
        raise RemoteFailure(f"The holder of {buffer_id} gave no ticket of it: {_reason(answer)}.")
    return told[1].decode()


def ask_demands(buffer_id: str, timeout: float) -> dict[str, Any]:
    """Return `constraints` and `attachments` of the buffer that a holder has, as far as there are any.

    Raises as ask_holder() does; AccessDenied for root, too, where the holder is another user's: that could tell tales.
    """
    answer = _ask(buffer_id, _DEMANDS_REQUEST, timeout, longest=_LONGEST_DEMANDS, root_too=False)
    try:
        told = json.loads(answer)
        return {key: told[key] for key in ("constraints", "attachments") if key in told}
    except (ValueError, TypeError) as error:
        raise RemoteFailure(f"The holder of {buffer_id} told nothing of it: {_reason(answer)}.") from error


def _ask(buffer_id: str, request: bytes, timeout: float, *, longest: int = _LONGEST, root_too: bool = True) -> bytes:
    """Send a line to the holder of a buffer and return the line that it answers, or what came of it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(_socket_name(buffer_id))
            uid = _peer_uid(sock)
            if os.geteuid() != uid and not (root_too and os.geteuid() == 0):
                raise AccessDenied(
                    f"Buffer {buffer_id} is held by another user's udmabufctl, which obeys that user and root alone."
                )
            sock.sendall(request)
            answer = b""
            while not answer.endswith(b"\n") and len(answer) < longest and (more := sock.recv(longest)):
                answer += more
        except TimeoutError as error:
            raise CallTimedOut(f"The holder of {buffer_id} did not answer within {timeout:g} s.") from error
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise NoSuchBuffer(
                f"No udmabufctl holds buffer {buffer_id}. Another program's share ends when that program releases it "
                "or ends; 'udmabufctl list' shows how many hold it."
            ) from error
        except ConnectionError as error:
            raise RemoteFailure(f"The holder of {buffer_id} ended without an answer ({error}).") from error
    return answer


def _reason(answer: bytes) -> str:
    return answer.decode(errors="replace").strip() or "it ended without an answer"


def _be_the_holder(arguments: argparse.Namespace, spec: Mapping[str, object], writing: int) -> None:
    """Become a process of its own; tell the parent by the pipe what came of it. Does not return."""
    status = 1
    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for standard in range(3):
            os.dup2(null, standard)
        _close_inherited(writing)
        with open(writing, "w", encoding="utf-8") as pipe:

            def tell(what: dict[str, Any]) -> None:
                json.dump(what, pipe)
                pipe.close()

            try:
                asyncio.run(_hold(arguments, spec, tell))
                status = 0
            except (UdmabufError, OSError) as error:
                # Once it was told, nobody listens any more: the buffer is gone, and the process with it.
                if not pipe.closed:
                    tell({"error": str(error)})
    finally:
        os._exit(status)


def _close_inherited(kept: int) -> None:
    """Close every descriptor but the standard streams and `kept`: locks and pipes would last as long as the buffer."""
    inherited = [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]
    for number in inherited:
        if number > 2 and number != kept:
            # The listing's own is among them, and closed by now.
            with suppress(OSError):
                os.close(number)


async def _hold(
    arguments: argparse.Namespace, spec: Mapping[str, object], tell: Callable[[dict[str, Any]], None]
) -> None:
    """Allocate, tell, and wait for a signal, a request, or the loss of the buffer, which is an error."""
    end = asyncio.Event()
    held: list[Buffer] = []

    def look() -> None:
        """The service or the bus was restarted: go on if the buffer came through it."""
        if any(buffer.lost for buffer in held):
            end.set()

    def say(attachment: Attachment) -> None:
        """A device is gone: the memory stays, and whoever looks at this terminal may want to know."""
        print(
            f"udmabufctl: {attachment.device} is detached: {printable(attachment.reason)}", file=sys.stderr, flush=True
        )

    async def follow(move: Move) -> None:
        """Let go of the memory, which nobody uses here, and tell what became of it."""
        await move.ready()
        outcome = await move.done()
        if outcome == MOVED:
            # Which memory it is can be told after that it is another.
            with suppress(UdmabufError):
                await held[0].refresh()
        print(f"udmabufctl: {printable(_moved(held[0], outcome))}", file=sys.stderr, flush=True)

    loop = asyncio.get_running_loop()
    for number in heeded():
        loop.add_signal_handler(number, end.set)
    async with Client.connect(arguments.bus, timeout=arguments.timeout, on_reconnect=look, on_detached=say) as client:
        with await _obtain(client, spec, dynamic=arguments.dynamic) as buffer:
            held.append(buffer)
            if arguments.dynamic:
                buffer.on_move = follow
            server = await asyncio.start_unix_server(
                lambda reader, writer: _serve(reader, writer, buffer, end), _socket_name(buffer.id), limit=_LONGEST
            )
            try:
                tell({"id": buffer.id, "buffer": buffer.path, "pid": os.getpid(), **described(buffer)})
                await end.wait()
                if buffer.lost and not buffer.released:
                    raise ServiceUnavailable(
                        f"Buffer {buffer.id} was lost in a restart of the service or of the bus; allocate another."
                    )
            finally:
                server.close()


async def _obtain(client: Client, spec: Mapping[str, object], *, dynamic: bool) -> Buffer:
    """Return a new buffer with memory; `dynamic` if its holder can be told that it moves.

    A descriptor that is not for a dynamic attachment would hold it in place, and the devices of a spec are static.
    """
    if not dynamic:
        return await client.allocate(spec)
    wanted = dict(spec)
    devices: list[str] = wanted.pop("devices")  # type: ignore[assignment]
    buffer = await client.create(wanted)
    try:
        attached = [await buffer.attach(device, dynamic=True) for device in devices]
        await buffer.get_fd(attachment=attached[0])
        await buffer.refresh()
    except BaseException:
        buffer.close()
        raise
    return buffer


def _moved(buffer: Buffer, outcome: str) -> str:
    """Return what became of a move as a sentence, for whoever looks at this terminal."""
    if outcome == MOVED:
        return f"Buffer {buffer.id} has moved to {buffer.info.allocator}, serial {buffer.info.serial}."
    if outcome == EVICTED:
        return f"Buffer {buffer.id} is evicted: its memory can be swapped out until its next use."
    return f"Buffer {buffer.id} stays where it is: its move was cancelled."


async def _serve(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, buffer: Buffer, end: asyncio.Event
) -> None:
    """Answer one connection: release the buffer, or tell of it, for our own user and root."""
    try:
        if _peer_uid(writer.get_extra_info("socket")) not in (0, os.geteuid()):
            return
        with suppress(TimeoutError, ValueError):
            async with asyncio.timeout(5):
                request = await reader.readline()
                if request == _REQUEST:
                    await _release(writer, buffer, end)
                elif request == _TICKET_REQUEST:
                    await _tell_ticket(writer, buffer)
                elif request == _DEMANDS_REQUEST:
                    await _tell_demands(writer, buffer)
    except ConnectionError:
        pass
    finally:
        writer.close()


async def _release(writer: asyncio.StreamWriter, buffer: Buffer, end: asyncio.Event) -> None:
    try:
        await buffer.release()
        writer.write(_RELEASED)
    except UdmabufError as error:
        writer.write(f"{error}\n".encode())
    await writer.drain()
    if buffer.released:
        end.set()


async def _tell_ticket(writer: asyncio.StreamWriter, buffer: Buffer) -> None:
    try:
        writer.write(f"ticket {await buffer.get_ticket()}\n".encode())
    except UdmabufError as error:
        writer.write(f"{error}\n".encode())
    await writer.drain()


async def _tell_demands(writer: asyncio.StreamWriter, buffer: Buffer) -> None:
    try:
        await buffer.refresh()
        writer.write(f"{json.dumps(described(buffer))}\n".encode())
    except UdmabufError as error:
        writer.write(f"{error}\n".encode())
    await writer.drain()


def _socket_name(buffer_id: str) -> str:
    return f"\0udmabufctl/{buffer_id}"


def _peer_uid(sock: socket.socket) -> int:
    """Return the user at the other end as it was when it connected or listened: struct ucred, unix(7)."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid
