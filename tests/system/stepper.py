# SPDX-License-Identifier: MIT
"""The daemon with a trap in it: runs its main, and kills itself with SIGKILL before the step that a test names.

Steps are what others can see of it and what a restart finds: a datagram to the store, a write to the state, a seal or
a name for the kernel, the end of a memory, a piece of a copy, an answer on the bus or a notice of a move. Between two
of them a kill leaves the same whenever it comes, so one before each of them is one between any two. The program's code
is the production code; everything here is put around it from outside.

    stepper.py [ARGUMENTS OF udmabufd]

$UDMABUFD_STEPPER is the name of an abstract socket on which it takes orders (see Stepper). What else it can change,
each by a variable: $UDMABUFD_STEPPER_ARMED, the step of its start before which it dies; $UDMABUFD_STEPPER_GRACE,
seconds in the place of both grace times; $UDMABUFD_STEPPER_PIPES, pipes in the place of dma-bufs, for a machine
without udmabuf.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SOCKET = "UDMABUFD_STEPPER"
GRACE = "UDMABUFD_STEPPER_GRACE"
PIPES = "UDMABUFD_STEPPER_PIPES"
ARMED = "UDMABUFD_STEPPER_ARMED"

PIECE = 1 << 20
"""Bytes of a piece of a copy."""

FOLDER = Path(__file__).resolve().parents[2]


class Stepper:
    """A test's end: orders, each a call that returns when the daemon has obeyed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def arm(self, step: int, of: str = "") -> None:
        """Count steps from now on, and die before number `step` of those that begin with `of`; 0 is never."""
        self._order(do="arm", step=step, of=of)

    def trail(self) -> list[str]:
        """Return the steps that were taken since arm()."""
        return [str(step) for step in self._order(do="trail")]

    def reference(self, count: int) -> None:
        """Have pipes count as many references."""
        self._order(do="reference", count=count)

    def _order(self, **order: Any) -> Any:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(60)
            connection.connect(f"\0{self.name}")
            connection.sendall(json.dumps(order).encode() + b"\n")
            with connection.makefile() as lines:
                return json.loads(lines.readline())


class Trap:
    """The daemon's end."""

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._left = 0
        self._of = ""
        self._trail: list[str] | None = None
        self.references = 0
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0{name}")
        listener.listen()
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()

    def step(self, what: str) -> None:
        """Die here if this is the step."""
        with self._lock:
            if self._trail is None:
                return
            self._trail.append(what)
            self._left -= what.startswith(self._of)
            if self._left == 0 and what.startswith(self._of):
                os.kill(os.getpid(), signal.SIGKILL)
                threading.Event().wait()

    def before(self, owner: Any, name: str, what: Callable[..., str | None]) -> None:
        """Have each call of `owner`'s `name` be a step of what `what` returns for its arguments; None is no step."""
        function = getattr(owner, name)

        def stepping(*args: Any, **keywords: Any) -> Any:
            if (text := what(*args, **keywords)) is not None:
                self.step(text)
            return function(*args, **keywords)

        setattr(owner, name, stepping)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as lines:
                order = json.loads(lines.readline())
                lines.write(json.dumps(getattr(self, f"do_{order.pop('do')}")(**order)) + "\n")

    def do_arm(self, step: int, of: str = "") -> None:
        with self._lock:
            self._left, self._of, self._trail = step, of, []

    def do_trail(self) -> list[str]:
        with self._lock:
            return list(self._trail or ())

    def do_reference(self, count: int) -> None:
        self.references = count


class Stepping:
    """The module os, as one module sees it, with steps."""

    def __init__(self, trap: Trap, names: Iterable[str], what: str) -> None:
        for name in names:
            setattr(self, name, getattr(os, name))
            trap.before(self, name, lambda *_, name=name: f"{what}: {name}")

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def patch(owner: Any, **values: Any) -> None:
    """Put `values` in the place of what `owner`, a module or class, has under their names."""
    for name, value in values.items():
        assert hasattr(owner, name), f"{owner} has no {name}"
        setattr(owner, name, value)


def set_trap(trap: Trap) -> None:
    """Put steps around what the daemon does."""
    from udmabufd.core import memory, state
    from udmabufd.core.moves import Notice
    from udmabufd.linux import copy, memfd
    from udmabufd.system import store_socket
    from udmabufd_base.connection import Connection
    from udmabufd_base.message import MessageType

    def said(_self: Any, data: bytes, _fds: Any = ()) -> str | None:
        text = data.decode("ascii")
        return None if "BARRIER" in text else "store: " + text.splitlines()[0]

    def answered(_self: Any, message: Any, _fds: Any = ()) -> str | None:
        if message.type in (MessageType.METHOD_RETURN, MessageType.ERROR):
            return f"bus: {message.type.name}"
        return f"bus: {message.member}" if message.member in tuple(Notice) else None

    whole_copy = copy.copy

    def copying(*args: Any, progress: Callable[[int], None], **keywords: Any) -> bool:
        def piece(done: int) -> None:
            trap.step("copy: piece")
            progress(done)

        trap.step("copy: begin")
        # Small ones, so that small buffers have several.
        return whole_copy(*args, progress=piece, piece=PIECE, **keywords)

    trap.before(store_socket.StoreSocket, "_send", said)
    trap.before(Connection, "send", answered)
    trap.before(memory.Memory, "close", lambda _: "memory: close")
    trap.before(memory.Memory, "set_name", lambda *_: "kernel: set_name")
    trap.before(memfd, "prove_free", lambda _: "kernel: prove_free")
    patch(copy, copy=copying)
    patch(state, os=Stepping(trap, ("pwrite", "ftruncate"), "state"))


def use_pipes(trap: Trap) -> None:
    """Let pipes stand in for dma-bufs: they are no memfds, have inodes of their own, and can be passed on."""
    from udmabufd.core import memory, udmabuf_allocator, udmabuf_device
    from udmabufd.linux import dmabuf, fdstat, memfd
    from udmabufd_base.fd import OwnedFd
    from udmabufd_client.contract import UDMABUF, Cache, CacheEvidence

    def probe(self: Any) -> bool:
        if self._device is None:
            stand_in = OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            self._device = udmabuf_device.Device(stand_in, "", frozenset())
        return True

    def allocate(_self: Any, request: Any, name: str, _populate: Any) -> memory.Memory:
        own = memfd.create(name, request.size)
        memfd.add_seals(own.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
        read, write = os.pipe2(os.O_CLOEXEC)
        # Clients show one that they may read and write.
        exported = OwnedFd(os.open(f"/proc/self/fd/{read}", os.O_RDWR | os.O_CLOEXEC))
        os.close(read)
        os.close(write)
        identity = fdstat.look(exported.fileno())
        return memory.Memory(
            allocator=UDMABUF,
            size=request.size,
            memfd=own,
            dma_buf=exported,
            device=identity.device,
            inode=identity.inode,
            cache=Cache.CACHED,
            evidence=CacheEvidence.DEFAULT,
            needs_sync=True,
        )

    patch(udmabuf_allocator.UdmabufAllocator, probe=probe, allocate=allocate)
    patch(memory.Memory, references=lambda self: None if self.dma_buf is None else trap.references)
    patch(dmabuf, set_name=lambda *_: None, size=lambda _: 4096)


def main() -> int:
    """Run the daemon."""
    # The installed service has its own packages in front already.
    sys.path += [str(FOLDER / "daemon"), str(FOLDER / "client")]
    trap = Trap(os.environ[SOCKET])
    set_trap(trap)
    if armed := os.environ.get(ARMED):
        trap.do_arm(int(armed))
    if os.environ.get(PIPES):
        use_pipes(trap)
    if grace := os.environ.get(GRACE):
        from udmabufd.core import custody

        patch(custody, BUS_GRACE=float(grace), REQUEST_GRACE=float(grace))
    from udmabufd.__main__ import main as daemon

    return daemon()


if __name__ == "__main__":
    sys.exit(main())
