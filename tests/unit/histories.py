# SPDX-License-Identifier: MIT
"""Random histories of the service on a machine of tests/unit/machine.py, held against the books of tests/unit/books.py
after each step.

A history is a list of steps, each a word and some numbers that choose among what is possible then; so any part of the
list is a history too, and one that fails can be cut down.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.unit.books import PICKY, Client, Known, Verdict
from tests.unit.calls import Call, Question, nothing
from tests.unit.comparison import DEVICES, FAR, OWNERS, Wrong, same
from tests.unit.machine import Life, clients_memfd, patched, path_of
from tests.unit.relocations import Relocations
from tests.unit.time_loop import run
from udmabufd.core.errors import AccessDenied, Busy, InvalidSpec, NoSuchBuffer, NoSuchDevice, NotSupported
from udmabufd.core.spec import PAGE_SIZE
from udmabufd.core.store import STATE_NAME
from udmabufd_base.fd import OwnedFd

WEIGHTS = {
    "connect": 4,
    "allocate": 10,
    "many": 4,
    "create": 4,
    "wrap": 3,
    "retry": 10,
    "import_fd": 8,
    "import_path": 3,
    "import_ticket": 14,
    "get_fd": 7,
    "rename": 2,
    "attach": 10,
    "detach": 5,
    "pin": 4,
    "write": 8,
    "importer": 22,
    "move": 14,
    "evict": 11,
    "drain": 6,
    "pressure": 6,
    "unplug": 3,
    "release": 10,
    "leave": 4,
    "dup": 2,
    "open_path": 7,
    "close": 12,
    "wait": 5,
    "long_wait": 3,
    "restart": 3,
    "stop": 2,
    "restart_without_one": 2,
    "other_bus": 1,
    "kill_during": 5,
    "kill_move": 7,
}


ALL_DEVICES = (*DEVICES, PICKY)


class Step(NamedTuple):
    """What to do, and the numbers that say how."""

    what: str
    numbers: tuple[int, int, int, int]


def steps_of(seed: int, count: int) -> list[Step]:
    """Return a history."""
    rng = random.Random(seed)
    words = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)
    return [Step(word, _numbers(rng)) for word in ["connect"] * 4 + words]


def _numbers(rng: random.Random) -> tuple[int, int, int, int]:
    a, b, c, d = (rng.randrange(1 << 16) for _ in range(4))
    return a, b, c, d


@dataclass
class History(Relocations):
    """One run."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.connections = 0

    async def run(self, steps: Sequence[Step]) -> None:
        """Do the steps, then end everything."""
        self.life = await Life.begin(self.machine, delay=self.delay)
        try:
            for step in steps:
                await self._between()
                await getattr(self, step.what)(*step.numbers)
                await self._between()
            self.kill_in = None
            await self._finish()
        finally:
            await self.life.kill()
            for buffer in self.known:
                for fd in [*buffer.fds, *buffer.paths]:
                    fd.close()
            for question in self.questions.values():
                if question.brought is not None:
                    question.brought.close()
            self.machine.close()

    async def _between(self) -> None:
        """Let no time run out in the midst of the next step, and compare."""
        while soon := [b.until for b in self.books.buffers if b.state == "waiting" and b.until < self.now + 8]:
            await asyncio.sleep(max(min(soon) - self.now, 0) + 0.1)
            self.books.pass_time(self.now)
        # No two calls come at the same time but those that are meant to.
        await asyncio.sleep(0.001)
        if any(abs(known.awaited - self.now) < 0.2 for known in self.books.buffers):
            await asyncio.sleep(0.5)
        for _ in range(2000):
            if not self._being_closed():
                break
            # Nobody is told of it.
            await asyncio.sleep(0.001)
        else:
            raise Wrong(f"left open: {self.life.left_open()}")
        self.books.pass_time(self.now)
        self.compare()

    async def _finish(self) -> None:
        for client in list(self.clients):
            await self.leave(self.clients.index(client), 0, 0, 0)
        for buffer in self.known:
            for fd in [*buffer.fds, *buffer.paths]:
                fd.close()
            buffer.fds.clear()
            buffer.paths.clear()
            buffer.since = self.now
        await asyncio.sleep(200)
        self.books.pass_time(self.now)
        await asyncio.sleep(200)
        self.compare()
        self.machine.handle_messages()
        if self.books.buffers or set(self.machine.stored) != {STATE_NAME} or len(self.life.custody.lingering):
            raise Wrong(f"left at the end: {self.books.buffers}, stored {set(self.machine.stored)}")

    # The steps: each takes four numbers that say how.

    async def connect(self, a: int, b: int, c: int, d: int) -> None:
        """Somebody connects."""
        if len(self.clients) < 6:
            self.connections += 1
            self.clients.append(Client(f":1.{self.connections}", OWNERS[a % len(OWNERS)]))

    async def allocate(self, a: int, b: int, c: int, d: int) -> None:
        """Allocate."""
        await self._new(a, "Allocate", {"size": (1 + b % 8) * PAGE_SIZE}, c, d)

    async def many(self, a: int, b: int, c: int, d: int) -> None:
        """AllocateMany."""
        await self._new(a, "AllocateMany", {"size": (1 + b % 3) * PAGE_SIZE}, c, d, 1 + b // 8 % 5)

    async def create(self, a: int, b: int, c: int, d: int) -> None:
        """CreateBuffer."""
        await self._new(a, "CreateBuffer", {"size": (1 + b % 8) * PAGE_SIZE}, c, d)

    async def wrap(self, a: int, b: int, c: int, d: int) -> None:
        """WrapMemfd."""
        size = (1 + b % 4) * PAGE_SIZE
        with clients_memfd(size) as brought:
            await self._new(a, "WrapMemfd", {"size": size}, 1, d, brought=brought)

    async def _new(
        self, a: int, member: str, spec: dict[str, Any], c: int, d: int, count: int = 1, brought: OwnedFd | None = None
    ) -> None:
        if not self.clients:
            return
        client = self.clients[a % len(self.clients)]
        if c % 4 == 0:
            spec["kind"] = "memfd"
        if c % 8 > 4:
            spec["name"] = f"name {c}"
        question, asked = Question(member, spec, count, brought), None
        if d % 5 > 2:
            spec["devices"] = [DEVICES[(d + i) // 7 % len(DEVICES)] for i in range(1 + d // 64 % 3)]
        if d % 2:
            spec["request_id"] = f"request-id-{d:08}"
            asked = client.owner, spec["request_id"]
            if asked in self.questions:
                return
            kept = None if brought is None else brought.dup()
            self.questions[asked] = Question(member, spec, count, kept)
        await self._call(self._make(client, question, asked))

    async def retry(self, a: int, b: int, c: int, d: int) -> None:
        """Ask once more what was asked before, or something else with its id."""
        pairs = [(client, asked) for client in self.clients for asked in self.questions if asked[0] == client.owner]
        if not pairs:
            return
        client, asked = pairs[-1 - a % min(len(pairs), 6)]
        question = self.questions[asked]
        if any(known.evicted for known in self.books.stands.get(asked, ((), ()))[1]):
            # It would bring them all back; what then is over a quota is shown elsewhere.
            return
        if d % 3 == 0 and asked in self.books.stands:
            question = Question("CreateBuffer", {"size": PAGE_SIZE, "request_id": asked[1], "name": "other"}, 1)
        await self._call(self._make(client, question, asked))

    async def import_fd(self, a: int, b: int, c: int, d: int) -> None:
        """Import by descriptor, also of what is no more."""
        having = [known for known in self.known if known.fds]
        if self.clients and having:
            known = having[b % len(having)]
            await self._import(self.clients[a % len(self.clients)], known.origin or known, known.fds[0])

    async def import_path(self, a: int, b: int, c: int, d: int) -> None:
        """Import by an O_PATH descriptor."""
        having = [known for known in self.known if known.paths]
        if self.clients and having:
            holder, fd = self.holder(self.clients[a % len(self.clients)]), having[b % len(having)].paths[0]
            await self._call(
                Call(lambda: self.life.service.import_fd(holder, fd), nothing, lambda: None, error=AccessDenied)
            )

    async def import_ticket(self, a: int, b: int, c: int, d: int) -> None:
        """Import by ticket, also of what is no more."""
        if self.clients and self.known:
            await self._import(
                self.clients[a % len(self.clients)], self.known[-1 - b % min(len(self.known), 12)], None
            )

    async def _import(self, client: Client, known: Known, fd: OwnedFd | None) -> None:
        holder, service = self.holder(client), self.life.service
        run = lambda: (  # noqa: E731
            service.import_ticket(holder, known.ticket) if fd is None else service.import_fd(holder, fd)
        )
        if known not in self.books.buffers or known.origin is not None or known.withdrawn:
            await self._call(Call(run, nothing, lambda: None, error=NoSuchBuffer))
            return

        def cut_off() -> None:
            if self._shares_now(known, client) > known.shares.get(client, 0):
                self.books.share(known, client)
            self._loose_by_half(known, client)

        verdict = self.books.verdict(client.owner, self.books.to_share(known, client))

        def done(_: Any) -> None:
            if known.state != "held":
                self.happened["lives again" if known.state == "lingering" else "was waited for"] += 1
            self.books.share(known, client)
            if fd is not None:
                known.loosen(client)

        call = Call(run, done, cut_off, verdict)
        if known.state == "lingering" and not known.fds:
            # What nobody has open may have been given up; its memory is charged until the last shadow goes.
            call.error, call.perhaps = NoSuchBuffer, True
        await self._call(call)

    async def get_fd(self, a: int, b: int, c: int, d: int) -> None:
        """GetFd, by a holder or somebody else, perhaps for an attachment."""
        if not self.clients or not self.books.buffers:
            return
        known = self.books.buffers[b % len(self.books.buffers)]
        client = self._someone(known, a, stranger=d % 8 == 0)
        own = [number for number, row in known.attachments.items() if row.client is client]
        number = own[c % len(own)] if own and c % 4 else 99 if c % 16 == 0 else None
        call = self._get(known, client, number)
        if client not in known.shares:
            call.error, call.verdict = NoSuchBuffer, Verdict.ALLOWED
        elif number == 99:
            call.error, call.verdict = InvalidSpec, Verdict.ALLOWED
        await self._call(call)

    async def rename(self, a: int, b: int, c: int, d: int) -> None:
        """SetName."""
        held = [known for known in self.books.buffers if known.shares]
        if not held:
            return
        known, name = held[b % len(held)], f"renamed {c}"
        holder = self.holder(self._someone(known, a, stranger=False))

        def done(_: Any) -> None:
            known.name = name

        def cut_off() -> None:
            (buffer,) = [b for b in self.life.custody.registry if b.id == known.id]
            if buffer.name == name:
                known.name = name

        await self._call(Call(lambda: self.life.service.set_name(holder, known.id, name), done, cut_off))

    async def attach(self, a: int, b: int, c: int, d: int) -> None:
        """Attach, by a holder or somebody else."""
        if not self.clients or not self.books.buffers:
            return
        known = self.books.buffers[b % len(self.books.buffers)]
        client, device = self._someone(known, a, stranger=d % 8 == 0), ALL_DEVICES[c % len(ALL_DEVICES)]
        await self._attach(known, client, device, dynamic=c // 8 % 4 > 0, other=d)

    async def importer(self, a: int, b: int, c: int, d: int) -> None:
        """Somebody gets a share, attaches dynamically, and has a descriptor for that, as importers do."""
        buffers = [known for known in self.books.buffers if known.shares and known.kind == "dma-buf"]
        if not self.clients or not buffers:
            return
        known, client = buffers[b % len(buffers)], self.clients[a % len(self.clients)]
        device = ALL_DEVICES[c % 8 // 3]
        if client not in known.shares:
            await self._import(client, known, None)
        attached = known.attached
        if client in known.shares and device not in self.gone:
            await self._attach(known, client, device, dynamic=True, other=d)
        if known.attached > attached and known.attached in known.attachments:
            await self._call(self._get(known, client, known.attached))

    async def _attach(self, known: Known, client: Client, device: str, *, dynamic: bool, other: int) -> None:
        holder, attaching = self.holder(client), self.life.service.attaching
        call = Call(lambda: attaching.attach(holder, known.id, device, {}, dynamic), nothing, lambda: None)
        if client not in known.shares:
            call.error = NoSuchBuffer
        elif device in self.gone:
            call.error = NoSuchDevice
        elif known.kind == "memfd":
            call.error = NotSupported
        elif known.kind == "wrapped" and device == PICKY:
            call.error = Busy
            call.verdict = self.books.verdict(client.owner, {"attachments": 1}, swept=False)
        else:
            call.verdict = self.books.verdict(client.owner, {"attachments": 1}, swept=False)

            def done(answer: Any) -> None:
                self.books.attach(known, client, [device], dynamic=dynamic)
                same("number", answer[1].number, known.attached)
                self.happened["attached"] += 1

            call.done = done
            call.cut_off = lambda: self._attached_by_half(known, client, [device], dynamic=dynamic)
            if self._needs_a_move(known, device):
                if call.verdict is Verdict.ALLOWED:
                    call.verdict = self.books.moving(known, known.size, client.owner)
                self._moving(call, known, client, client if dynamic else None, None)
                call.done, call.cut_off = self._moves(known, client, FAR, call.done, call.cut_off)
                call.meanwhile = self._meanwhile(known, client, other)
        await self._call(call)
        self._staying = None

    async def detach(self, a: int, b: int, c: int, d: int) -> None:
        """Detach, by who attached or somebody else."""
        having = [known for known in self.books.buffers if known.attachments]
        if not having or not self.clients:
            return
        known = having[b % len(having)]
        number = list(known.attachments)[c % len(known.attachments)]
        whose = known.attachments[number].client
        client = whose if d % 4 else self.clients[a % len(self.clients)]
        holder, attaching = self.holder(client), self.life.service.attaching
        call = Call(lambda: attaching.detach(holder, known.id, number), nothing, lambda: None)
        if client not in known.shares:
            call.error = NoSuchBuffer
        elif client is not whose:
            call.error = InvalidSpec
        else:

            def done(_: Any) -> None:
                del known.attachments[number]
                self.happened["detached"] += 1

            def cut_off() -> None:
                if number not in self._there(known).attachments:
                    del known.attachments[number]

            call.done, call.cut_off = done, cut_off
        await self._call(call)

    async def unplug(self, a: int, b: int, c: int, d: int) -> None:
        """A device goes, perhaps while the service is away, or comes back."""
        device = ALL_DEVICES[a % len(ALL_DEVICES)]
        if device in self.gone:
            self.gone.remove(device)
            self.come(device)
            return
        self.gone.add(device)
        path = self.machine.devices.go(device)
        self.happened["unplugged"] += any(
            row.device == device for b in self.books.buffers for row in b.attachments.values()
        )
        if d % 3 == 0:
            await self._again()
            self.books.restarted(self.now)
            self.books.unplugged(device)
            return

        async def gone() -> None:
            self.life.service.attaching.gone(path)

        await self._call(Call(gone, lambda _: self.books.unplugged(device), lambda: self.books.unplugged(device)))

    async def release(self, a: int, b: int, c: int, d: int) -> None:
        """Release, by a holder or somebody else."""
        if not self.clients or not self.books.buffers:
            return
        known = self.books.buffers[b % len(self.books.buffers)]
        client = self._someone(known, a, stranger=d % 8 == 0)
        holder, service = self.holder(client), self.life.service
        run = lambda: service.release(holder, known.id)  # noqa: E731
        if client not in known.shares:
            await self._call(Call(run, nothing, lambda: None, error=NoSuchBuffer))
            return
        started = self.now

        def cut_off() -> None:
            if self._shares_now(known, client) < known.shares[client]:
                self.books.release(known, client, self.now)

        await self._call(Call(run, lambda _: self.books.release(known, client, started), cut_off))

    async def leave(self, a: int, b: int, c: int, d: int) -> None:
        """A connection ends."""
        if not self.clients:
            return
        client = self.clients.pop(a % len(self.clients))
        holder, started = self.holder(client), self.now

        async def drop() -> None:
            self.life.service.drop(holder)
            self.life.holders.pop(client.name, None)

        def cut_off() -> None:
            self.books.gone(client, self.now)

        await self._call(Call(drop, lambda _: self.books.gone(client, started), cut_off))

    async def dup(self, a: int, b: int, c: int, d: int) -> None:
        """A client duplicates a descriptor: to another process, into a socket, by a fork."""
        having = [known for known in self.known if known.fds]
        if having:
            known = having[a % len(having)]
            known.fds.append(known.fds[0].dup())

    async def open_path(self, a: int, b: int, c: int, d: int) -> None:
        """A client opens a descriptor O_PATH."""
        having = [known for known in self.known if known.fds]
        if having:
            known = having[a % len(having)]
            known.paths.append(path_of(known.fds[0]))
            known.shadowed = True

    async def close(self, a: int, b: int, c: int, d: int) -> None:
        """Clients close some of the descriptors of a buffer."""
        having = [known for known in self.known if known.fds or known.paths]
        for known in having[a % len(having) : a % len(having) + 2] if having else ():
            for fds in (known.fds, known.paths):
                if fds and (fds is known.fds or b % 4 == 0):
                    for _ in range(len(fds) if c % 3 else 1):
                        fds.pop().close()
            known.since = self.now

    async def wait(self, a: int, b: int, c: int, d: int) -> None:
        """Some seconds pass."""
        await asyncio.sleep(0.01 + a % 400 / 100)

    async def long_wait(self, a: int, b: int, c: int, d: int) -> None:
        """A minute passes, or nearly."""
        await asyncio.sleep(5 + a % 60)

    async def restart(self, a: int, b: int, c: int, d: int) -> None:
        """SIGKILL."""
        await self._again()
        self.books.restarted(self.now)

    async def stop(self, a: int, b: int, c: int, d: int) -> None:
        """`systemctl restart`."""
        await self.life.end()
        await self._again()
        self.books.restarted(self.now)

    async def restart_without_one(self, a: int, b: int, c: int, d: int) -> None:
        """SIGKILL, and a connection ends before the service is back."""
        if self.clients:
            client = self.clients.pop(a % len(self.clients))
            self.life.machine.killed = True
            await self._again()
            self.books.restarted(self.now)
            self.books.gone(client, self.now)

    async def other_bus(self, a: int, b: int, c: int, d: int) -> None:
        """The bus restarts."""
        self.clients.clear()
        self.machine.bus_id = f"bus-{self.machine.bus_id.removeprefix('bus-')}{a % 10}"
        await self._again()
        self.books.bus_restarted(self.now)

    async def kill_during(self, a: int, b: int, c: int, d: int) -> None:
        """SIGKILL during the next call, after some effect of it."""
        self.kill_in = 1 + a % (4 if b % 2 else 24)


def play(seed: int, steps: Sequence[Step]) -> Counter[str]:
    """Play a history from its beginning to its end; return what came about. Raises whatever is wrong."""
    history = History(seed)
    with patched(history.machine):
        run(history.run(steps))
    return history.happened


def shortened(seed: int, steps: list[Step], budget: int = 300) -> list[Step]:
    """Return a part of a history that fails, as short as `budget` attempts make it, which fails too."""
    size = max(len(steps) // 2, 1)
    while budget and size:
        start = 0
        while start < len(steps) and budget:
            budget -= 1
            part = steps[:start] + steps[start + size :]
            try:
                play(seed, part)
            except Exception:
                steps = part
            else:
                start += size
        size //= 2
    return steps
