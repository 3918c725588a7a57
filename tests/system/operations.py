# SPDX-License-Identifier: MIT
"""What clients do to the daemon, one operation at a time, and what may have come of each when it was killed."""

from __future__ import annotations

from typing import Any, ClassVar

from tests.bus.peer import Peer, plain, spec
from tests.system.books import entries, inode
from tests.system.world import SIZE, World
from udmabufd_base.codec import Variant
from udmabufd_client.contract import buffer_id, buffer_path


class Operation:
    """Something that a client does. `call` returns the answer, anything but None."""

    retained = False
    """Whether what nobody holds any more is kept for a while."""

    async def prepare(self, world: World) -> None:
        """Make what it needs."""

    async def call(self, world: World) -> Any:
        """Do it."""
        raise NotImplementedError

    async def check(self, world: World, answer: Any) -> None:
        """Look at what came of it; `answer` is None when there was none."""
        raise NotImplementedError


class Allocate(Operation):
    async def call(self, world: World) -> Any:
        return await world.first.allocate(size=SIZE, name="new")

    async def check(self, world: World, answer: Any) -> None:
        new = await world.new()
        assert len(new) <= 1
        if answer is not None:
            path, fd, info = answer
            assert set(new) == {buffer_id(path)}
            assert inode(fd) == info["inode"]
        for own, entry in new.items():
            assert (entry["holders"], entry["state"], entry["charged"]) == (1, "backed", SIZE)
            fd, _ = await world.first.call("GetFd", "a{sv}", {}, path=buffer_path(own))
            assert inode(fd) == entry["inode"]


class Repeated(Operation):
    """What has a request_id is asked for again by the same connection: it is there once, with a share an answer."""

    retained = True
    number = 0
    count: int | None = None
    keys: ClassVar[dict[str, Any]] = {}

    async def prepare(self, world: World) -> None:
        Repeated.number += 1
        self.spec = spec(size=SIZE, request_id=f"test-restart-{self.number:06}", **self.keys)

    async def call(self, world: World) -> list[str]:
        if self.count is None:
            path, *_ = await world.first.call("Allocate", "a{sv}", self.spec)
            return [path]
        paths, *_ = await world.first.call("AllocateMany", "a{sv}u", self.spec, self.count)
        return list(paths)

    async def check(self, world: World, answer: Any) -> None:
        first = await world.new()
        assert len(first) <= (self.count or 1)
        again = await self.call(world)
        if answer is not None:
            assert again == answer
        assert {buffer_id(path) for path in again} == set(await world.new()) >= set(first)
        for path in again:
            shares = 0
            while await world.holds(world.first, path):
                await world.first.call("Release", path=path)
                shares += 1
            # Killed between an answer and its record, the service gives the share of it again.
            assert shares in ((1,) if answer is None else (2,) if world.through else (1, 2))


class RepeatedMemfd(Repeated):
    keys: ClassVar[dict[str, Any]] = {"kind": "memfd"}


class RepeatedMany(Repeated):
    count = 2


class AllocateMany(Operation):
    async def call(self, world: World) -> Any:
        return await world.first.call("AllocateMany", "a{sv}u", spec(size=SIZE, kind="memfd"), 2)

    async def check(self, world: World, answer: Any) -> None:
        new = await world.new()
        if answer is not None:
            assert {buffer_path(own) for own in new} == set(answer[0])
            assert {entry["inode"] for entry in new.values()} == {inode(fd) for fd in answer[1]}
        for own in new:
            assert await world.holds(world.first, buffer_path(own))


class CreateBuffer(Operation):
    async def call(self, world: World) -> Any:
        return await world.first.call("CreateBuffer", "a{sv}", spec(size=SIZE))

    async def check(self, world: World, answer: Any) -> None:
        new = await world.new()
        assert len(new) <= 1
        if answer is not None:
            assert [buffer_path(own) for own in new] == answer
        for own, entry in new.items():
            assert (entry["holders"], entry["state"], entry["charged"]) == (1, "empty", 0)
            assert await world.holds(world.first, buffer_path(own))


class GetFd(Operation):
    async def prepare(self, world: World) -> None:
        (self.path,) = await world.first.call("CreateBuffer", "a{sv}", spec(size=SIZE))

    async def call(self, world: World) -> Any:
        return await world.first.call("GetFd", "a{sv}", {}, path=self.path)

    async def check(self, world: World, answer: Any) -> None:
        entry = (await entries(world.observer))[buffer_id(self.path)]
        assert entry["state"] in (("backed",) if answer else ("backed", "empty"))
        fd, _ = await self.call(world)
        assert answer is None or inode(answer[0]) == inode(fd) == entry["inode"]


class Import(Operation):
    async def prepare(self, world: World) -> None:
        self.path, self.fd, self.info = await world.first.allocate(size=SIZE, name="shared")

    async def call(self, world: World) -> Any:
        return await world.second.import_fd(self.fd)

    async def check(self, world: World, answer: Any) -> None:
        assert answer is None or answer[0] == self.path
        holds = await world.holds(world.second, self.path)
        assert holds or answer is None
        assert (await entries(world.observer))[buffer_id(self.path)]["holders"] == 1 + holds
        assert await world.holds(world.first, self.path)
        if holds:
            await world.second.call("Release", path=self.path)
            assert not await world.holds(world.second, self.path)


class SetName(Import):
    async def call(self, world: World) -> Any:
        return await world.first.call("SetName", "s", "renamed", path=self.path)

    async def check(self, world: World, answer: Any) -> None:
        name = (await entries(world.observer))[buffer_id(self.path)]["name"]
        assert name == "renamed" or (answer is None and name == "shared")


class ReleaseShared(Import):
    async def prepare(self, world: World) -> None:
        await super().prepare(world)
        await world.second.import_fd(self.fd)

    async def call(self, world: World) -> Any:
        return await world.first.call("Release", path=self.path)

    async def check(self, world: World, answer: Any) -> None:
        holds = await world.holds(world.first, self.path)
        assert not holds or answer is None
        assert (await entries(world.observer))[buffer_id(self.path)]["holders"] == 1 + holds
        fd, _ = await world.second.call("GetFd", "a{sv}", {}, path=self.path)
        assert inode(fd) == self.info["inode"]


class ReleaseLast(Import):
    """A dma-buf then lingers, is given up for its witness, and proven free."""

    async def call(self, world: World) -> Any:
        return await world.first.call("Release", path=self.path)

    async def check(self, world: World, answer: Any) -> None:
        left = buffer_id(self.path) in await entries(world.observer)
        assert not left or answer is None
        assert left == await world.holds(world.first, self.path)


class ReleaseLastMemfd(ReleaseLast):
    async def prepare(self, world: World) -> None:
        self.path, self.fd, self.info = await world.first.allocate(size=SIZE, kind="memfd")


class EndOfConnection(ReleaseShared):
    async def prepare(self, world: World) -> None:
        await super().prepare(world)
        self.alone, *_ = await world.first.allocate(size=SIZE, kind="memfd", name="alone")

    async def call(self, world: World) -> Any:
        world.first.close()
        return True

    async def check(self, world: World, answer: Any) -> None:
        now = await entries(world.observer)
        assert buffer_id(self.alone) not in now
        assert now[buffer_id(self.path)]["holders"] == 1
        assert await world.holds(world.second, self.path)


class Revive(Import):
    """A buffer that lingers is imported; whatever comes of it, its name in the store is not another's afterwards."""

    async def prepare(self, world: World) -> None:
        await super().prepare(world)
        world.stepper.reference(1)
        await world.first.call("Release", path=self.path)
        assert (await entries(world.observer))[buffer_id(self.path)]["state"] == "lingering"

    async def check(self, world: World, answer: Any) -> None:
        world.stepper.reference(0)
        left = (await entries(world.observer)).get(buffer_id(self.path))
        assert left or answer is None
        assert (left is not None) == await world.holds(world.second, self.path)
        assert left is None or (left["state"], left["holders"]) == ("backed", 1)
        later, *_ = await world.first.allocate(size=SIZE, kind="memfd")
        world.second.close()
        await world.gone(world.second)
        assert set(await world.check()) == set(world.before) - {buffer_id(self.path)} | {buffer_id(later)}


async def attached(peer: Peer, path: str) -> list[tuple[int, str, bool]]:
    """Return number, device and whose of each attachment, as `peer` sees them."""
    rows = map(plain, await peer.get("Attachments", path))
    return [(row["attachment"], row["device"], row["own"]) for row in rows]


FIRST, SECOND = "mem:null", "mem:zero"
"""Devices of every machine, of which nothing is known but that they are there."""


class Attach(Operation):
    """To an empty buffer, and to one with memory: whoever was answered has it, with its number and its demands."""

    backed = False

    async def prepare(self, world: World) -> None:
        (self.path,) = await world.first.call("CreateBuffer", "a{sv}", spec(size=SIZE, devices=[FIRST]))
        if self.backed:
            await world.first.call("GetFd", "a{sv}", {}, path=self.path)

    async def call(self, world: World) -> Any:
        options = {"constraints": Variant("a{sv}", {"alignment": Variant("t", 64)}), "dynamic": Variant("b", True)}
        return await world.first.call("Attach", "sa{sv}", SECOND, options, path=self.path)

    async def check(self, world: World, answer: Any) -> None:
        found = await attached(world.first, self.path)
        both = [(1, FIRST, True), (2, SECOND, True)]
        assert found == both or (answer is None and found == both[:1])
        demanded = plain(await world.first.get("Constraints", self.path))
        assert demanded == ({"alignment": 64} if found == both else {})
        if answer is not None:
            assert (answer[0], plain(answer[1])) == (2, {"alignment": 64})
        # Its number is not given again.
        number, _ = await self.call(world)
        assert number == len(found) + 1
        for number, *_ in await attached(world.first, self.path):
            await world.first.call("Detach", "u", number, path=self.path)
        assert (await self.call(world))[0] == len(found) + 2


class AttachBacked(Attach):
    backed = True


class Detach(Attach):
    """The highest number, which is not given again though nothing but the buffer's own record tells of it."""

    async def call(self, world: World) -> Any:
        return await world.first.call("Detach", "u", 1, path=self.path)

    async def check(self, world: World, answer: Any) -> None:
        found = await attached(world.first, self.path)
        assert found == [] or (answer is None and found == [(1, FIRST, True)])
        number, _ = await world.first.call("Attach", "sa{sv}", SECOND, {}, path=self.path)
        assert number == 2


class AllocateForDevices(Allocate):
    """Whoever has the buffer has all of its attachments."""

    async def call(self, world: World) -> Any:
        demands = {"tail_padding": Variant("t", 1)}
        return await world.first.allocate(
            size=SIZE - 1, name="new", devices=[FIRST, SECOND, FIRST], constraints=demands
        )

    async def check(self, world: World, answer: Any) -> None:
        await super().check(world, answer)
        for own in await world.new():
            path = buffer_path(own)
            assert await attached(world.first, path) == [(1, FIRST, True), (2, SECOND, True), (3, FIRST, True)]
            assert plain(await world.first.get("Constraints", path)) == {"tail_padding": 1}
            (ticket,) = await world.first.call("GetTicket", path=path)
            await world.second.call("ImportTicket", "s", ticket)
            assert [row[2] for row in await attached(world.second, path)] == [False] * 3
            assert (await world.first.call("Attach", "sa{sv}", SECOND, {}, path=path))[0] == 4


class EndOfAttached(Operation):
    """The end of a connection takes what it attached, and leaves what others did."""

    async def prepare(self, world: World) -> None:
        self.path, *_ = await world.first.allocate(size=SIZE, devices=[FIRST])
        (ticket,) = await world.first.call("GetTicket", path=self.path)
        await world.second.call("ImportTicket", "s", ticket)
        await world.second.call("Attach", "sa{sv}", SECOND, {}, path=self.path)

    async def call(self, world: World) -> Any:
        world.first.close()
        return True

    async def check(self, world: World, answer: Any) -> None:
        assert await attached(world.second, self.path) == [(2, SECOND, True)]
        assert (await world.second.call("Attach", "sa{sv}", FIRST, {}, path=self.path))[0] == 3


OPERATIONS: list[type[Operation]] = [
    Allocate,
    AllocateMany,
    RepeatedMemfd,
    RepeatedMany,
    CreateBuffer,
    GetFd,
    Import,
    SetName,
    ReleaseShared,
    ReleaseLast,
    ReleaseLastMemfd,
    EndOfConnection,
    Revive,
    Attach,
    AttachBacked,
    Detach,
    AllocateForDevices,
    EndOfAttached,
]
